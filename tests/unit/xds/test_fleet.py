"""Who runs what, told by the sessions' states; and the admin API that shows it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from xds.admin import PolicyStatus, build_app
from xds.fleet import GONE_MAX, Fleet
from xds.messages import Nack, TypeState
from xds.server import AdsServer
from xds.snapshot import CLUSTER, ROUTE, Snapshot


def a_state(type_url: str = CLUSTER, *, sent: str = "v1", acked: str = "v1", refused: str | None = None) -> TypeState:
    nack = Nack(type_url=type_url, version=sent, nonce="1", message=refused) if refused else None
    return TypeState(type_url=type_url, sent_version=sent, acked_version=acked, nack=nack)


def a_fleet(*node_ids: str) -> Fleet:
    fleet = Fleet()
    for stream, node_id in enumerate(node_ids):
        fleet.connected(stream, node_id=node_id, address="unix:", protocol="delta", now_s=100.0)
    return fleet


def test_a_fleet_of_none_has_not_converged() -> None:
    assert not Fleet().summary("s1").converged


def test_a_fleet_has_converged_when_every_node_runs_the_snapshot() -> None:
    fleet = a_fleet("one", "two")
    fleet.reported(0, [a_state()], snapshot_version="s1", converged=True, now_s=101.0)
    assert [node.id for node in fleet.summary("s1").behind] == ["two"]
    fleet.reported(1, [a_state()], snapshot_version="s1", converged=True, now_s=101.0)
    assert fleet.summary("s1").converged
    assert not fleet.summary("s2").converged


def test_lagging_and_refused_types_are_named() -> None:
    fleet = a_fleet("one")
    states = [a_state(sent="v2"), a_state(ROUTE, refused="no such cluster")]
    fleet.reported(0, states, snapshot_version="s1", converged=False, now_s=101.0)
    [node] = fleet.summary("s1").behind
    assert node.lagging == (CLUSTER,)
    assert node.rejected == (ROUTE,)
    assert node.types[1].message == "no such cluster"


def test_a_type_remembers_when_it_last_changed() -> None:
    fleet = a_fleet("one")
    fleet.reported(0, [a_state()], snapshot_version="s1", converged=True, now_s=101.0)
    fleet.reported(0, [a_state()], snapshot_version="s1", converged=True, now_s=102.0)
    assert fleet.nodes[0].types[0].changed_at_s == 101.0
    fleet.reported(0, [a_state(sent="v2")], snapshot_version="s2", converged=False, now_s=103.0)
    assert fleet.nodes[0].types[0].changed_at_s == 103.0


def test_a_node_that_left_is_shown_until_it_is_back() -> None:
    fleet = a_fleet("one")
    fleet.disconnected(0, now_s=105.0)
    assert [(node.id, node.connected, node.since_s) for node in fleet.nodes] == [("one", False, 105.0)]
    assert fleet.summary("").connected == 0
    fleet.connected(7, node_id="one", address="unix:", protocol="delta", now_s=106.0)
    assert [(node.id, node.connected) for node in fleet.nodes] == [("one", True)]


def test_nodes_that_left_are_bounded() -> None:
    fleet = a_fleet(*(f"n{number}" for number in range(GONE_MAX + 5)))
    for stream in range(GONE_MAX + 5):
        fleet.disconnected(stream, now_s=105.0)
    assert len(fleet.nodes) == GONE_MAX


# --- Admin API


class Admin:
    """The admin application over a server that is not started."""

    def __init__(self) -> None:
        self.server = AdsServer(registry=(registry := CollectorRegistry()))
        self.status: PolicyStatus | None = None
        self.policy: object = None
        self.app = build_app(
            version="0.1.0",
            server=self.server,
            registry=registry,
            policy_status=lambda: self.status,
            effective_policy=lambda: self.policy,
        )
        self.client = TestClient(self.app)


@pytest.fixture
def admin() -> Admin:
    return Admin()


def test_ready_once_a_snapshot_is_set_and_alive_before(admin: Admin) -> None:
    assert admin.client.get("/healthz").status_code == 200
    refused = admin.client.get("/readyz")
    assert (refused.status_code, refused.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
    admin.server.set_snapshot(Snapshot.build({CLUSTER: {"a": b"1"}}))
    assert admin.client.get("/readyz").status_code == 200


def test_status_shows_policy_problems_and_nodes(admin: Admin) -> None:
    snapshot = Snapshot.build({CLUSTER: {"a": b"1"}})
    admin.server.set_snapshot(snapshot)
    admin.status = PolicyStatus(
        digest="d1", loaded_at="2025-01-01T00:00:00Z", source="last_good", problems=("chat.yaml:3: weights sum to 0",)
    )
    fleet = admin.server.fleet
    fleet.connected(1, node_id="envoy", address="unix:", protocol="delta", now_s=1.0)
    fleet.reported(1, [a_state(refused="bad")], snapshot_version=snapshot.version, converged=False, now_s=2.0)
    status = admin.client.get("/status").json()
    assert (status["policy"], status["source"], status["snapshot"]) == ("d1", "last_good", snapshot.version)
    assert status["problems"] == ["chat.yaml:3: weights sum to 0"]
    assert status["fleet"] == {
        "converged": False,
        "connected": 1,
        "behind": [{"id": "envoy", "lagging": [], "rejected": ["cluster"]}],
    }
    assert status["nodes"][0]["types"]["cluster"]["message"] == "bad"


def test_policy_is_shown_once_there_is_one(admin: Admin) -> None:
    assert admin.client.get("/policy").status_code == 503
    admin.policy = {"backends": []}
    assert admin.client.get("/policy").json() == {"backends": []}


def test_metrics_show_the_snapshot(admin: Admin) -> None:
    admin.server.set_snapshot(Snapshot.build({CLUSTER: {"a": b"1"}}))
    assert 'router_xds_snapshot_resources{type="cluster"} 1.0' in admin.client.get("/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nothing", 404, "NOT_FOUND"), ("POST", "/status", 405, "METHOD_NOT_ALLOWED")],
    ids=["path", "method"],
)
def test_errors_are_json(admin: Admin, method: str, path: str, status: int, code: str) -> None:
    response = admin.client.request(method, path)
    assert response.status_code == status
    assert response.json()["code"] == code
