"""Dialogues between a session and a client, in both protocols where both have the words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from envoy_model import a_snapshot

from xds.messages import DeltaRequest, DeltaResponse, SotwRequest, SotwResponse
from xds.session import DeltaSession, History, SotwSession
from xds.snapshot import CLUSTER, ENDPOINTS, LISTENER, ROUTE, SCOPED_ROUTE, SECRET, Snapshot


class Dialogue:
    """A client that says what the test wants it to say."""

    def __init__(self, session: DeltaSession | SotwSession) -> None:
        self.session = session
        self.heard: list[DeltaResponse | SotwResponse] = []
        self.names: dict[str, tuple[str, ...]] = {}
        self.nonces: dict[str, str] = {}

    def publishes(self, snapshot: Snapshot) -> list[str]:
        return self._hear(self.session.on_snapshot(snapshot))

    def asks(self, type_url: str, *names: str, nonce: str | None = None) -> list[str]:
        """Ask for names besides those asked for before, or for all there is."""
        self.names[type_url] = (*self.names.get(type_url, ()), *names)
        return self._say(type_url, names, nonce)

    def acks(self, type_url: str, nonce: str | None = None) -> list[str]:
        return self._say(type_url, (), self.nonces[type_url] if nonce is None else nonce)

    def nacks(self, type_url: str, message: str = "no", nonce: str | None = None) -> list[str]:
        return self._say(type_url, (), self.nonces[type_url] if nonce is None else nonce, error=message)

    def _say(self, type_url: str, names: tuple[str, ...], nonce: str | None, error: str | None = None) -> list[str]:
        if isinstance(self.session, DeltaSession):
            request = DeltaRequest(
                type_url=type_url, subscribe=names, response_nonce=nonce or "", error_detail=error, node="envoy"
            )
            return self._hear(self.session.on_request(request))
        last = self.nonces.get(type_url, "") if nonce is None else nonce
        return self._hear(
            self.session.on_request(
                SotwRequest(
                    type_url=type_url,
                    resource_names=self.names.get(type_url, ()),
                    response_nonce=last,
                    error_detail=error,
                    node="envoy",
                )
            )
        )

    def _hear(self, responses: list[DeltaResponse] | list[SotwResponse]) -> list[str]:
        self.heard.extend(responses)
        for response in responses:
            self.nonces[response.type_url] = response.nonce
        return [said(response) for response in responses]


def said(response: DeltaResponse | SotwResponse) -> str:
    """``cluster +a +b -c``: what a response brings and takes."""
    kind = response.type_url.rsplit(".", 1)[1]
    brought = [f"+{resource.name}" for resource in response.resources]
    return " ".join([kind, *brought, *(f"-{name}" for name in getattr(response, "removed", ()))])


@pytest.fixture(params=[DeltaSession, SotwSession], ids=["delta", "sotw"])
def dialogue(request: pytest.FixtureRequest) -> Dialogue:
    return Dialogue(request.param())


@pytest.fixture
def delta() -> Dialogue:
    return Dialogue(DeltaSession())


@pytest.fixture
def sotw() -> Dialogue:
    return Dialogue(SotwSession())


def running(dialogue: Dialogue, snapshot: Snapshot) -> Dialogue:
    """A client that has all of a snapshot with cluster ``a``, scope ``s`` and route ``r``."""
    dialogue.publishes(snapshot)
    for ask in ((CLUSTER,), (SCOPED_ROUTE,), (ROUTE, "r")):
        assert dialogue.asks(*ask)
        assert not dialogue.acks(ask[0])
    assert dialogue.session.converged
    return dialogue


OLD = a_snapshot(clusters={"a": "1"}, scopes={"s": "1 r"}, routes={"r": "1 a"})
NEW = a_snapshot(clusters={"b": "1"}, scopes={"s": "1 r"}, routes={"r": "1 b"})


def test_an_empty_first_request_means_everything(dialogue: Dialogue) -> None:
    dialogue.publishes(a_snapshot(clusters={"a": "1", "b": "1"}))
    assert dialogue.asks(CLUSTER) == ["Cluster +a +b"]


def test_an_empty_first_request_is_answered_though_there_is_nothing(dialogue: Dialogue) -> None:
    dialogue.publishes(a_snapshot())
    assert dialogue.asks(LISTENER) == ["Listener"]
    assert dialogue.acks(LISTENER) == []


def test_an_empty_first_request_for_routes_means_none(dialogue: Dialogue) -> None:
    dialogue.publishes(OLD)
    assert dialogue.asks(ROUTE) == []


def test_a_star_means_everything(dialogue: Dialogue) -> None:
    dialogue.publishes(a_snapshot(clusters={"a": "1"}))
    assert dialogue.asks(CLUSTER, "*") == ["Cluster +a"]


def test_requests_wait_for_the_first_snapshot(dialogue: Dialogue) -> None:
    assert dialogue.asks(CLUSTER) == []
    assert dialogue.asks(ROUTE, "r") == []
    assert dialogue.publishes(OLD) == ["Cluster +a"]
    assert dialogue.acks(CLUSTER) == ["RouteConfiguration +r"]


def test_nothing_is_sent_while_nothing_changes(dialogue: Dialogue) -> None:
    running(dialogue, OLD)
    same = a_snapshot(clusters={"a": "1"}, scopes={"s": "1 r"}, routes={"r": "1 a"})
    assert dialogue.publishes(same) == []


def test_clusters_come_first_and_go_last(delta: Dialogue) -> None:
    running(delta, OLD)
    assert delta.publishes(NEW) == ["Cluster +b"]
    assert delta.acks(CLUSTER) == ["RouteConfiguration +r"]
    assert delta.acks(ROUTE) == ["Cluster -a"]
    assert not delta.session.converged
    assert delta.acks(CLUSTER) == []
    assert delta.session.converged


def test_clusters_come_first_and_go_last_in_complete_responses(sotw: Dialogue) -> None:
    running(sotw, OLD)
    assert sotw.publishes(NEW) == ["Cluster +a +b"]
    assert sotw.acks(CLUSTER) == ["RouteConfiguration +r"]
    assert sotw.acks(ROUTE) == ["Cluster +b"]
    assert sotw.acks(CLUSTER) == []
    assert sotw.session.converged


def test_routes_go_only_after_their_scopes(delta: Dialogue) -> None:
    running(delta, OLD)
    assert delta.publishes(a_snapshot(clusters={"a": "1"})) == ["ScopedRouteConfiguration -s"]
    assert delta.acks(SCOPED_ROUTE) == ["RouteConfiguration -r"]


def test_secrets_clusters_and_endpoints_go_in_this_order(delta: Dialogue) -> None:
    delta.asks(ENDPOINTS, "ea")
    delta.asks(CLUSTER)
    delta.asks(SECRET, "key")
    snapshot = Snapshot.build({SECRET: {"key": b"1"}, CLUSTER: {"a": b"1 ea"}, ENDPOINTS: {"ea": b"1"}})
    assert delta.publishes(snapshot) == ["Secret +key", "Cluster +a", "ClusterLoadAssignment +ea"]


def test_a_type_nobody_asked_for_blocks_nothing(dialogue: Dialogue) -> None:
    dialogue.publishes(OLD)
    assert dialogue.asks(ROUTE, "r") == ["RouteConfiguration +r"]


def test_a_stale_ack_does_not_open_the_next_stage(dialogue: Dialogue) -> None:
    running(dialogue, OLD)
    stale = dialogue.nonces[CLUSTER]
    dialogue.publishes(NEW)
    assert dialogue.acks(CLUSTER, nonce=stale) == []
    assert dialogue.acks(CLUSTER) == ["RouteConfiguration +r"]


def test_a_stale_nack_is_ignored(dialogue: Dialogue) -> None:
    running(dialogue, OLD)
    stale = dialogue.nonces[CLUSTER]
    dialogue.publishes(NEW)
    dialogue.nacks(CLUSTER, nonce=stale)
    assert all(state.nack is None for state in dialogue.session.states)


def test_nack_keeps_last_good_snapshot(dialogue: Dialogue) -> None:
    running(dialogue, OLD)
    dialogue.publishes(NEW)
    assert dialogue.nacks(CLUSTER, "unknown filter") == [], "neither routes nor the same clusters again"
    [nack] = [state.nack for state in dialogue.session.states if state.nack]
    assert (nack.type_url, nack.message) == (CLUSTER, "unknown filter")
    assert nack.version == dialogue.heard[-1].version
    assert not dialogue.session.converged


def test_a_newly_asked_route_during_a_refused_change_is_that_of_the_last_good_snapshot(delta: Dialogue) -> None:
    old = a_snapshot(clusters={"a": "1"}, scopes={"s": "1 r"}, routes={"r": "1 a", "q": "1 a"})
    running(delta, old)
    delta.publishes(a_snapshot(clusters={"a": "1", "b": "1"}, routes={"r": "2 b", "q": "2 b"}, scopes={"s": "1 r"}))
    delta.nacks(CLUSTER)
    assert delta.asks(ROUTE, "q") == ["RouteConfiguration +q"]
    assert delta.heard[-1].resources[0] == old.of(ROUTE)["q"]


def test_a_fixed_cluster_heals_a_refused_change(dialogue: Dialogue) -> None:
    running(dialogue, OLD)
    dialogue.publishes(NEW)
    dialogue.nacks(CLUSTER)
    fixed = a_snapshot(clusters={"b": "2"}, scopes={"s": "1 r"}, routes={"r": "1 b"})
    assert len(dialogue.publishes(fixed)) == 1
    assert dialogue.acks(CLUSTER) == ["RouteConfiguration +r"]
    dialogue.acks(ROUTE)
    dialogue.acks(CLUSTER)
    assert dialogue.session.converged


def test_going_back_after_a_nack_sends_the_old_cluster_again(dialogue: Dialogue) -> None:
    running(dialogue, OLD)
    dialogue.publishes(a_snapshot(clusters={"a": "2"}, scopes={"s": "1 r"}, routes={"r": "1 a"}))
    dialogue.nacks(CLUSTER)
    assert dialogue.publishes(OLD) == ["Cluster +a"]
    dialogue.acks(CLUSTER)
    assert dialogue.session.converged


def test_the_good_companions_of_a_refused_route_go_again_with_its_fix(delta: Dialogue) -> None:
    def snapshot(r: str, q: str, p: str = "1 a") -> Snapshot:
        routes = {"r": f"{r} a", "q": f"{q} a", "p": p}
        return a_snapshot(clusters={"a": "1"}, scopes={"s": "1 r"}, routes=routes)

    running(delta, snapshot("1", "1"))
    delta.asks(ROUTE, "q", "p")
    delta.acks(ROUTE)
    assert delta.publishes(snapshot("2", "2")) == ["RouteConfiguration +q +r"]
    assert delta.nacks(ROUTE) == []
    assert delta.publishes(snapshot("2", "2", p="2 a")) == ["RouteConfiguration +p"], "others are not held up"
    assert delta.acks(ROUTE) == []
    assert not delta.session.converged
    assert delta.publishes(snapshot("3", "2", p="2 a")) == ["RouteConfiguration +q +r"]
    delta.acks(ROUTE)
    assert delta.session.converged


def test_a_refused_route_keeps_its_old_clusters(delta: Dialogue) -> None:
    running(delta, OLD)
    delta.publishes(NEW)
    delta.acks(CLUSTER)
    assert delta.nacks(ROUTE) == []
    other = a_snapshot(clusters={"b": "1", "c": "1"}, scopes={"s": "1 r"}, routes={"r": "1 b"})
    assert delta.publishes(other) == ["Cluster +c"]
    assert delta.acks(CLUSTER) == [], "the client's route still points at a"


def test_a_newer_snapshot_replaces_one_that_is_under_way(delta: Dialogue) -> None:
    running(delta, OLD)
    delta.publishes(NEW)
    newest = a_snapshot(clusters={"c": "1"}, scopes={"s": "1 r"}, routes={"r": "1 c"})
    assert delta.publishes(newest) == [], "one response of a type is in flight"
    assert delta.acks(CLUSTER) == ["Cluster +c"]
    assert delta.acks(CLUSTER) == ["RouteConfiguration +r"]
    assert delta.heard[-1].resources[0] == newest.of(ROUTE)["r"]
    assert delta.acks(ROUTE) == ["Cluster -a -b"]


def test_a_changed_cluster_gets_its_endpoints_again(dialogue: Dialogue) -> None:
    def snapshot(edition: str) -> Snapshot:
        return a_snapshot(clusters={"a": f"{edition} ea", "b": "1 eb"}, endpoints={"ea": "1", "eb": "1"})

    dialogue.publishes(snapshot("1"))
    dialogue.asks(CLUSTER)
    dialogue.asks(ENDPOINTS, "ea", "eb")
    dialogue.acks(CLUSTER)
    dialogue.acks(ENDPOINTS)
    clusters, endpoints = dialogue.publishes(snapshot("2"))
    assert clusters.startswith("Cluster +a")
    assert endpoints == "ClusterLoadAssignment +ea"


@pytest.mark.parametrize("type_url", [ENDPOINTS, SECRET], ids=["endpoints", "secret"])
def test_what_does_not_exist_yet_comes_when_it_does(dialogue: Dialogue, type_url: str) -> None:
    dialogue.publishes(Snapshot.build({}))
    kind = type_url.rsplit(".", 1)[1]
    missing = [f"{kind} -x"] if isinstance(dialogue.session, DeltaSession) else []
    assert dialogue.asks(type_url, "x") == missing
    if missing:
        dialogue.acks(type_url)
    assert dialogue.publishes(Snapshot.build({type_url: {"x": b"1"}})) == [f"{kind} +x"]


def test_asking_again_sends_again(delta: Dialogue) -> None:
    running(delta, OLD)
    assert delta.asks(ROUTE, "r") == ["RouteConfiguration +r"]


def test_a_stale_nonce_does_not_spoil_a_delta_subscription(delta: Dialogue) -> None:
    delta.publishes(OLD)
    delta.asks(ROUTE)
    assert delta.asks(ROUTE, "r", nonce="stale") == ["RouteConfiguration +r"]


def test_a_stale_sotw_request_is_ignored_and_the_next_one_says_the_same(sotw: Dialogue) -> None:
    snapshot = a_snapshot(clusters={"a": "1"}, routes={"r": "1 a", "q": "1 a"}, scopes={"s": "1 r"})
    running(sotw, snapshot)
    assert sotw.asks(ROUTE, "q", nonce="0") == []
    assert sotw.acks(ROUTE) == ["RouteConfiguration +q"], "only what is new in the list"


def test_leaving_out_a_name_ends_its_subscription(sotw: Dialogue) -> None:
    running(sotw, OLD)
    sotw.names[ROUTE] = ()
    assert sotw.acks(ROUTE) == []
    changed = a_snapshot(clusters={"a": "1"}, scopes={"s": "1 r"}, routes={"r": "2 a"})
    assert sotw.publishes(changed) == []
    assert sotw.asks(ROUTE, "r") == ["RouteConfiguration +r"]


def test_unsubscribing_ends_updates(delta: Dialogue) -> None:
    running(delta, OLD)
    delta.session.on_request(DeltaRequest(type_url=ROUTE, unsubscribe=("r",)))  # type: ignore[arg-type]
    assert delta.publishes(a_snapshot(clusters={"a": "1"}, scopes={"s": "1 r"}, routes={"r": "2 a"})) == []


def test_unsubscribing_from_the_star_leaves_the_names(delta: Dialogue) -> None:
    delta.publishes(a_snapshot(clusters={"a": "1", "b": "1"}))
    delta.asks(CLUSTER, "*", "a")
    delta.acks(CLUSTER)
    delta.session.on_request(DeltaRequest(type_url=CLUSTER, unsubscribe=("*",)))  # type: ignore[arg-type]
    assert delta.publishes(a_snapshot(clusters={"a": "2", "b": "2"})) == ["Cluster +a"]


def reconnects(snapshot: Snapshot, type_url: str, known: Snapshot, *names: str) -> tuple[DeltaSession, list[str]]:
    session = DeltaSession(snapshot)
    return session, [said(response) for response in again(session, type_url, known, *names)]


def again(session: DeltaSession, type_url: str, known: Snapshot, *names: str) -> list[DeltaResponse]:
    versions = {name: resource.version for name, resource in known.of(type_url).items()}
    return session.on_request(DeltaRequest(type_url=type_url, subscribe=names, initial_resource_versions=versions))


def test_a_reconnecting_client_gets_nothing_it_has() -> None:
    session, heard = reconnects(OLD, CLUSTER, OLD)
    assert heard == []
    assert again(session, ROUTE, OLD, "r") == []
    assert session.converged


def test_a_reconnecting_client_keeps_old_clusters_until_its_routes_have_left_them() -> None:
    session, heard = reconnects(NEW, CLUSTER, OLD)
    assert heard == ["Cluster +b"]
    assert again(session, ROUTE, OLD, "r") == []
    [routes] = session.on_request(DeltaRequest(type_url=CLUSTER, response_nonce="1"))
    assert said(routes) == "RouteConfiguration +r"
    [clusters] = session.on_request(DeltaRequest(type_url=ROUTE, response_nonce=routes.nonce))
    assert said(clusters) == "Cluster -a"


def test_a_reconnecting_client_is_asked_for_a_sign_before_anything_is_taken() -> None:
    both = a_snapshot(clusters={"a": "1", "b": "1"}, scopes={"s": "1 r"}, routes={"r": "1 a"})
    session, heard = reconnects(NEW, CLUSTER, both)
    assert heard == ["Cluster"], "its ACK comes after the requests for the other types"
    assert again(session, ROUTE, both, "r") == []


def test_a_reconnecting_sotw_client_keeps_old_clusters_if_its_version_is_known() -> None:
    history = History()
    first = running(Dialogue(SotwSession(history=history)), OLD)
    version = next(state.acked_version for state in first.session.states if state.type_url == CLUSTER)
    session = SotwSession(NEW, history=history)
    [clusters] = session.on_request(SotwRequest(type_url=CLUSTER, version_info=version))
    assert said(clusters) == "Cluster +a +b"
    assert SotwSession(OLD).on_request(SotwRequest(type_url=CLUSTER, version_info=version)) == []


@pytest.mark.parametrize("make", [DeltaSession, SotwSession], ids=["delta", "sotw"])
def test_large_changes_go_in_pieces(make: Callable[[], DeltaSession | SotwSession]) -> None:
    dialogue = Dialogue(make())
    names = [f"r{n}" for n in range(5)]
    dialogue.publishes(Snapshot.build({ROUTE: {name: bytes(200_000) for name in names}}))
    assert dialogue.asks(ROUTE, *names) == ["RouteConfiguration +r0 +r1"]
    assert dialogue.acks(ROUTE) == ["RouteConfiguration +r2 +r3"]
    assert dialogue.acks(ROUTE) == ["RouteConfiguration +r4"]
