"""Laws of a session, whatever happens: drawn snapshots, delays, NACKs, stale requests and broken streams."""

from __future__ import annotations

from envoy_model import Envoy, a_snapshot, points_at
from hypothesis import given, settings
from hypothesis import strategies as st

from xds.snapshot import CLUSTER, ENDPOINTS, ROUTE, SCOPED_ROUTE, Snapshot

NAMES = ("a", "b", "c", "d")
good_edition = st.sampled_from(["1", "2", "3"])
any_edition = st.sampled_from(["1", "2", "3", "bad1", "bad2"])


@st.composite
def snapshots(draw: st.DrawFn, editions: st.SearchStrategy[str] = good_edition) -> Snapshot:
    clusters = draw(st.sets(st.sampled_from(NAMES), min_size=1))
    with_endpoints = draw(st.sets(st.sampled_from(sorted(clusters))))
    routes = draw(
        st.dictionaries(
            st.sampled_from(["m", "n", "o"]),
            st.tuples(editions, st.sets(st.sampled_from(sorted(clusters)), min_size=1)),
            max_size=3,
        )
    )
    scopes = draw(
        st.dictionaries(st.sampled_from(["x", "y", "z"]), st.sampled_from(sorted(routes)) if routes else st.nothing())
        if routes
        else st.just({})
    )
    return a_snapshot(
        scopes={name: f"1 {route}" for name, route in scopes.items()},
        routes={name: f"{edition} {' '.join(sorted(names))}" for name, (edition, names) in routes.items()},
        clusters={
            name: f"{draw(editions)}{f' e{name}' if name in with_endpoints else ''}" for name in sorted(clusters)
        },
        endpoints={f"e{name}": draw(good_edition) for name in sorted(with_endpoints)},
    )


SAY, HEAR, RECONNECT, STALE = "say", "hear", "reconnect", "stale"


def steps(editions: st.SearchStrategy[str], *, reconnects: bool) -> st.SearchStrategy[list[str | Snapshot]]:
    moves = [SAY, HEAR, SAY, HEAR, STALE, *([RECONNECT] if reconnects else [])]
    return st.lists(st.one_of(st.sampled_from(moves), snapshots(editions)), max_size=60)


def play(envoy: Envoy, script: list[str | Snapshot]) -> None:
    for step in script:
        match step:
            case "say":
                envoy.say()
            case "hear":
                envoy.hear()
            case "reconnect":
                envoy.connect()
            case "stale":
                envoy.repeat_last()
            case snapshot:
                assert isinstance(snapshot, Snapshot)
                envoy.publish(snapshot)


def assert_runs(envoy: Envoy, snapshot: Snapshot) -> None:
    """The client holds the snapshot, as far as it needs it."""
    for kind in (CLUSTER, SCOPED_ROUTE):
        assert envoy.held.get(kind, {}) == {name: r.body for name, r in snapshot.of(kind).items()}
    for kind, parent in ((ENDPOINTS, CLUSTER), (ROUTE, SCOPED_ROUTE)):
        needed = {name for r in snapshot.of(parent).values() for name in points_at(r.body)}
        assert envoy.held.get(kind, {}) == {name: snapshot.of(kind)[name].body for name in needed}
    assert envoy.session.converged


@settings(max_examples=100, deadline=None)
@given(script=steps(good_edition, reconnects=True), last=snapshots(), delta=st.booleans())
def test_whatever_happens_routes_point_at_clusters_and_the_client_ends_at_the_snapshot(
    script: list[str | Snapshot], last: Snapshot, delta: bool
) -> None:
    envoy = Envoy(delta=delta)
    play(envoy, script)
    envoy.publish(last)
    envoy.settle()
    assert_runs(envoy, last)


@settings(max_examples=100, deadline=None)
@given(
    script=steps(any_edition, reconnects=False),
    refused=snapshots(any_edition),
    last=snapshots(),
    delta=st.booleans(),
    partial=st.booleans(),
)
def test_refusals_never_loop_and_the_next_good_snapshot_heals(
    script: list[str | Snapshot], refused: Snapshot, last: Snapshot, delta: bool, partial: bool
) -> None:
    envoy = Envoy(delta=delta, partial=partial)
    play(envoy, script)
    envoy.publish(refused)
    envoy.settle()
    envoy.publish(last)
    envoy.settle()
    assert_runs(envoy, last)


@settings(max_examples=60, deadline=None)
@given(script=steps(any_edition, reconnects=True), last=snapshots(), delta=st.booleans())
def test_refusals_and_broken_streams_together(script: list[str | Snapshot], last: Snapshot, delta: bool) -> None:
    envoy = Envoy(delta=delta)
    play(envoy, script)
    envoy.publish(last)
    envoy.settle()
    assert_runs(envoy, last)
