"""What a snapshot promises: versions by content, order by name, no reference into nothing."""

from __future__ import annotations

import pytest

from xds.snapshot import CLUSTER, ENDPOINTS, ROUTE, SCOPED_ROUTE, Snapshot, SnapshotInconsistent


def test_equal_content_has_equal_versions_whatever_its_order() -> None:
    one = Snapshot.build({CLUSTER: {"a": b"1", "b": b"2"}, ROUTE: {"r": b"3"}})
    two = Snapshot.build({ROUTE: {"r": b"3"}, CLUSTER: {"b": b"2", "a": b"1"}})
    assert one.version == two.version
    assert list(two.of(CLUSTER)) == ["a", "b"]


def test_a_change_shows_in_its_resource_its_type_and_the_whole_only() -> None:
    one = Snapshot.build({CLUSTER: {"a": b"1", "b": b"2"}, ROUTE: {"r": b"3"}})
    two = Snapshot.build({CLUSTER: {"a": b"1", "b": b"changed"}, ROUTE: {"r": b"3"}}, previous=one)
    assert one.version != two.version
    assert one.version_of(CLUSTER) != two.version_of(CLUSTER)
    assert one.version_of(ROUTE) == two.version_of(ROUTE)
    assert two.of(CLUSTER)["a"] is one.of(CLUSTER)["a"]
    assert two.of(CLUSTER)["b"].version != one.of(CLUSTER)["b"].version


def test_a_type_without_resources_has_a_version_and_no_names() -> None:
    snapshot = Snapshot.build({})
    assert snapshot.of(ENDPOINTS) == {}
    assert snapshot.version_of(ENDPOINTS) == Snapshot.build({ENDPOINTS: {}}).version_of(ENDPOINTS)


def test_every_reference_into_nothing_is_named() -> None:
    with pytest.raises(SnapshotInconsistent) as caught:
        Snapshot.build(
            {SCOPED_ROUTE: {"s": b""}, ROUTE: {"r": b""}, CLUSTER: {"a": b""}},
            references={
                (SCOPED_ROUTE, "s"): frozenset({(ROUTE, "q")}),
                (ROUTE, "r"): frozenset({(CLUSTER, "a"), (CLUSTER, "b")}),
                (CLUSTER, "a"): frozenset({(ENDPOINTS, "ea")}),
            },
        )
    assert caught.value.problems == (
        "scoped_route 's' refers to route 'q', which does not exist",
        "route 'r' refers to cluster 'b', which does not exist",
        "cluster 'a' refers to endpoints 'ea', which does not exist",
    )


def test_references_can_be_followed_by_type() -> None:
    snapshot = Snapshot.build(
        {CLUSTER: {"a": b""}, ENDPOINTS: {"x": b"", "y": b""}},
        references={(CLUSTER, "a"): frozenset({(ENDPOINTS, "y"), (ENDPOINTS, "x")})},
    )
    assert snapshot.referred(CLUSTER, "a", ENDPOINTS) == ("x", "y")
    assert snapshot.referred(CLUSTER, "b", ENDPOINTS) == ()


def test_a_snapshot_cannot_be_changed() -> None:
    snapshot = Snapshot.build({CLUSTER: {"a": b"1"}})
    with pytest.raises(TypeError):
        snapshot.of(CLUSTER)["b"] = snapshot.of(CLUSTER)["a"]  # type: ignore[index]
