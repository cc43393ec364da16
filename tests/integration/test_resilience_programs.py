"""Programs that die, hang, come back, or start with a broken policy: what goes on and what is said about it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.harness.process import eventually
from tests.harness.stack import Stack, policy_of, running_stack

pytestmark = pytest.mark.integration

CALL = {"model": "gpt-4o", "prompt": "hi"}
ONLY_A = [{"model": "gpt-4o", "organization_id": "*", "backends": [{"backend_id": "a", "weight": 1}]}]


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running


class Load:
    """Requests one after another on several connections, and what came of them."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.lock = threading.Lock()

    def count(self) -> int:
        with self.lock:
            return self.outcomes.total()


@contextmanager
def load_on(stack: Stack, connections: int) -> Iterator[Load]:
    load, stop = Load(), threading.Event()

    def call() -> None:
        with stack.client() as client:
            while not stop.is_set():
                try:
                    outcome = str(client.post("/v1/completions", json=CALL).status_code)
                except httpx.HTTPError as error:
                    outcome = type(error).__name__
                with load.lock:
                    load.outcomes[outcome] += 1

    threads = [threading.Thread(target=call) for _ in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _worker_pids(stack: Stack) -> dict[int, int]:
    """The process id that each worker last served with."""
    events = (json.loads(line) for line in stack.extproc.log().splitlines() if '"worker_serving"' in line)
    return {event["worker"]: event["pid"] for event in events}


def _serving(stack: Stack) -> int:
    response = stack.readyz()
    return response.json()["components"]["extproc"]["workers_serving"] if response is not None else 0


def _xds_is(stack: Stack, status: str) -> bool:
    response = stack.readyz()
    return response is not None and response.json()["components"]["xds"]["status"] == status


def test_a_killed_worker_costs_at_most_the_requests_in_its_hands(stack: Stack) -> None:
    connections = 8
    eventually(lambda: _serving(stack) == 2, "both workers serve")
    killed = _worker_pids(stack)[0]
    with load_on(stack, connections) as load:
        eventually(lambda: load.count() > 100, "load runs")
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: _worker_pids(stack).get(0, killed) != killed, "the worker is started again")
        eventually(lambda: _serving(stack) == 2, "the worker serves again")
        after = load.count()
        eventually(lambda: load.count() > after + 100, "load goes on")
    assert set(load.outcomes) <= {"200", "503"}
    assert load.outcomes["503"] <= connections


def test_a_worker_told_to_stop_finishes_what_it_has(stack: Stack) -> None:
    with load_on(stack, 8) as load:
        eventually(lambda: load.count() > 100, "load runs")
        before = _worker_pids(stack)[0]
        os.kill(before, signal.SIGTERM)
        eventually(lambda: _worker_pids(stack)[0] != before and _serving(stack) == 2, "a new worker serves")
    assert set(load.outcomes) == {"200"}


def test_without_workers_no_request_passes(stack: Stack) -> None:
    stack.extproc.stop()
    stack.reset()
    with stack.client() as client:
        response = client.post("/v1/completions", json=CALL)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "service_unavailable"
    assert stack.contacted() == 0


def test_traffic_goes_on_without_the_control_plane_and_a_change_arrives_after_its_return(stack: Stack) -> None:
    stack.xds.stop(signal.SIGKILL)
    with stack.client() as client:
        assert {client.post("/v1/completions", json=CALL).status_code for _ in range(20)} == {200}
        eventually(lambda: _xds_is(stack, "down"), "readiness tells that the control plane is down")
        ready = stack.readyz()
        assert ready is not None
        assert ready.status_code == 200
        before = stack.stats("cluster_manager.cluster_updated")
        stack.write_policy(policy_of(stack.uris, models=ONLY_A))
        stack.xds.start()

        def moved() -> bool:
            found = {client.post("/v1/completions", json=CALL).headers["x-routing-backend"] for _ in range(10)}
            return found == {"a"}

        eventually(moved, "the change is in force")
    # Unchanged clusters were not sent again, so their ejections stand.
    assert stack.stats("cluster_manager.cluster_updated") == before


def test_an_invalid_edit_changes_nothing_and_shows_as_a_warning(stack: Stack) -> None:
    (stack.policy_dir / "router.yaml").write_text("backends:\n  - id: a\n    uri: ftp://x\n    colour: red\n")
    eventually(lambda: stack.xds_status()["problems"], "the problems are known")
    problems = "\n".join(stack.xds_status()["problems"])
    assert "router.yaml:3" in problems
    assert "router.yaml:4" in problems
    with stack.client() as client:
        assert client.post("/v1/completions", json=CALL).status_code == 200
    eventually(lambda: (r := stack.readyz()) is not None and r.json()["status"] == "degraded", "readiness shows it")
    ready = stack.readyz()
    assert ready is not None
    assert ready.status_code == 200
    assert "router.yaml:4" in str(ready.json()["components"]["xds"]["warnings"])
    assert "router.yaml:4" in stack.xds.log()


def test_a_restart_with_an_invalid_directory_serves_the_last_good_policy(stack: Stack) -> None:
    stack.envoy.stop()
    for process in (stack.extproc, stack.xds):
        process.stop()
    (stack.policy_dir / "router.yaml").write_text("backends: nonsense\n")
    for process in (stack.xds, stack.extproc, stack.envoy):
        process.start()
    eventually(lambda: (r := stack.readyz()) is not None and r.status_code == 200, "the router is ready")
    assert stack.xds_status()["source"] == "last_good"
    with stack.client() as client:
        assert client.post("/v1/completions", json=CALL).status_code == 200


def test_readiness_answers_in_a_second_while_everything_behind_it_hangs(stack: Stack) -> None:
    frozen = [
        stack.xds.pid,
        *_worker_pids(stack).values(),
        stack.mock_processes["a"].pid,
        stack.mock_processes["b"].pid,
    ]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: _xds_is(stack, "down"), "readiness tells that the control plane hangs")
        started_s = time.monotonic()
        assert stack.readyz() is not None
        assert time.monotonic() - started_s < 1.0
        eventually(lambda: (r := stack.readyz()) is not None and r.status_code == 503, "no worker serves")
        os.kill(stack.extproc.pid, signal.SIGSTOP)
        frozen.append(stack.extproc.pid)
        started_s = time.monotonic()
        ready = stack.readyz()
        assert ready is not None
        assert time.monotonic() - started_s < 1.0
        assert (ready.status_code, ready.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
        alive = httpx.get(f"{stack.url}/v1/status/healthz", trust_env=False)
        assert alive.status_code == 200
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)


def test_readiness_counts_backends_and_says_how_each_is(stack: Stack) -> None:
    stack.apply(policy_of(stack.uris, kill_switches=[{"backend_id": "b", "enabled": True, "reason": "test"}]))

    def backends() -> dict[str, object]:
        ready = stack.readyz()
        assert ready is not None
        found: dict[str, object] = ready.json()["backends"]
        return found

    eventually(lambda: backends()["ready"] == 1, "one backend is ready")
    found = backends()
    assert found["items"] == [{"id": "a", "status": "healthy"}, {"id": "b", "status": "killed"}]
    assert (found["total"], found["degraded"]) == (2, 1)


def test_every_program_has_metrics(stack: Stack) -> None:
    with stack.client() as client:
        client.post("/v1/completions", json=CALL)
        client.post("/v1/completions", json={"model": "none", "prompt": "hi"})
    workers = httpx.get(f"{stack.metrics_url}/metrics", trust_env=False).text
    assert 'router_requests_total{endpoint="completion",outcome="forwarded"} 1.0' in workers
    assert 'router_requests_total{endpoint="completion",outcome="model_unknown"} 1.0' in workers
    assert "router_xds_snapshot_info{" in httpx.get(f"{stack.admin_url}/metrics", trust_env=False).text
    assert "envoy_cluster_upstream_rq" in httpx.get(f"{stack.envoy_url}/stats/prometheus", trust_env=False).text
