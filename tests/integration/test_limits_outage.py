"""The limit store goes away and comes back, seen by clients on the real Envoy."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.harness.calls import CHAT, INFERENCE, call, error_code
from tests.harness.limits import StoreView, limited_policy
from tests.harness.process import eventually
from tests.harness.stack import Stack, running_stack

pytestmark = pytest.mark.integration

NO_WAIT_S = 1.0
"""A dead store costs no waiting; this much is for a busy machine."""
BUDGET = [{"period": "MONTHLY", "usd": 100}]
SECTION = {
    "organizations": {
        "paid": {"budgets": BUDGET, "requests_per_second": 1000},
        "trusted": {"budgets": BUDGET, "on_store_error": "allow"},
        "rated": {"requests_per_second": 1, "burst": 6},
        "strict": {"requests_per_second": 1000, "on_store_error": {"rates": "deny"}},
        "free": {},
    }
}


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack(mocks=("a", "b"), valkey=True) as running:
        running.apply(limited_policy(running.uris, **SECTION))
        yield running


def metric(stack: Stack, name: str) -> float:
    """Sum of a metric of the workers over its labels."""
    lines = stack.http.get(f"{stack.metrics_url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def ask(stack: Stack, organization: str, path: str = CHAT) -> httpx.Response:
    with stack.client(f"dev-{organization}-x") as client:
        began = time.monotonic()
        response = call(client, path)
        assert time.monotonic() - began < NO_WAIT_S
    return response


def until_more(statuses: Counter[int], status: int, *, by: int) -> None:
    """Wait until so many more answers have had a status."""
    before = statuses[status]
    eventually(lambda: statuses[status] >= before + by, f"{by} more answers of {status}")


def kill_store(stack: Stack) -> None:
    assert stack.valkey
    stack.valkey.stop(signal.SIGKILL)
    eventually(lambda: metric(stack, "router_limit_store_up") == 0, "every worker knows that the store is gone")


def test_each_class_of_limits_does_what_the_policy_says_while_the_store_is_down(stack: Stack) -> None:
    kill_store(stack)
    assert ask(stack, "free").status_code == 200
    assert ask(stack, "trusted").status_code == 200
    denied = ask(stack, "paid", INFERENCE)
    assert (denied.status_code, error_code(denied)) == (503, "SERVICE_UNAVAILABLE")
    assert ask(stack, "strict").status_code == 503
    local = Counter(ask(stack, "rated").status_code for _ in range(20))
    assert set(local) == {200, 429}
    assert 1 <= local[200] <= 6 + 20 * NO_WAIT_S
    assert metric(stack, "router_limit_without_store_total") == 24
    readiness = stack.readyz()
    assert readiness is not None
    assert readiness.json()["components"]["store"]["status"] == "down"
    assert readiness.status_code == 200


def test_limits_hold_again_by_themselves_when_the_store_is_back(stack: Stack) -> None:
    kill_store(stack)
    assert stack.valkey
    stack.valkey.start()
    eventually(lambda: metric(stack, "router_limit_store_up") == 2, "every worker has found the store again")
    assert ask(stack, "paid").status_code == 200
    view = StoreView(stack)
    view.settled("paid")
    assert view.spent_micro_usd("paid") > 0
    view.close()


def test_what_was_let_through_without_the_store_is_charged_when_it_is_back(stack: Stack) -> None:
    kill_store(stack)
    usage = ask(stack, "trusted").json()["usage"]
    assert stack.valkey
    stack.valkey.start()
    view = StoreView(stack)
    cost = -(-(usage["prompt_tokens"] * 5000 + usage["completion_tokens"] * 15000) // 1000)
    eventually(lambda: metric(stack, "router_limit_store_up") == 2, "every worker has found the store again")
    eventually(lambda: view.spent_micro_usd("trusted") == cost, "the request has been charged")
    view.close()


def test_denials_of_an_outage_are_audited_when_the_store_is_back(stack: Stack) -> None:
    kill_store(stack)
    answers = [ask(stack, "rated") for _ in range(20)]
    request_ids = {answer.headers["x-request-id"] for answer in answers if answer.status_code == 429}
    assert request_ids
    assert stack.valkey
    stack.valkey.start()
    view = StoreView(stack)
    eventually(lambda: metric(stack, "router_limit_store_up") == 2, "every worker has found the store again")
    eventually(lambda: {e["request_id"] for e in view.audit_events()} >= request_ids, "the denials are in the stream")
    view.close()


def test_nothing_hangs_and_nothing_is_charged_twice_when_the_store_dies_under_load(stack: Stack) -> None:
    usages: list[dict[str, int]] = []
    statuses: Counter[int] = Counter()
    slowest = [0.0]
    stop = threading.Event()

    def load() -> None:
        with stack.client("dev-paid-x") as client:
            while not stop.is_set():
                began = time.monotonic()
                response = call(client, CHAT)
                slowest[0] = max(slowest[0], time.monotonic() - began)
                statuses[response.status_code] += 1
                if response.status_code == 200:
                    usages.append(response.json()["usage"])

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert stack.valkey
    try:
        for _ in range(3):
            until_more(statuses, 200, by=50)
            stack.valkey.stop(signal.SIGKILL)
            until_more(statuses, 503, by=1)
            stack.valkey.start()
        until_more(statuses, 200, by=50)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 503}
    assert slowest[0] < 3
    view = StoreView(stack)
    view.settled("paid")
    cost = sum(-(-(u["prompt_tokens"] * 5000 + u["completion_tokens"] * 15000) // 1000) for u in usages)
    eventually(lambda: view.spent_micro_usd("paid") >= cost, "everything has been charged")
    assert view.spent_micro_usd("paid") == cost
    assert view.spend("paid")["reserved_micro_usd"] == 0
    view.close()


def test_parallel_requests_are_not_counted_while_no_ledger_could_free_their_slots(stack: Stack) -> None:
    stack.apply(limited_policy(stack.uris, default={"max_parallel": 1}))
    stack.usage.stop(signal.SIGKILL)
    eventually(lambda: metric(stack, "router_limit_ledger_here") == 0, "every worker knows that the ledger is away")
    assert [ask(stack, "free").status_code for _ in range(5)] == [200] * 5
    stack.usage.start()
    eventually(lambda: metric(stack, "router_limit_ledger_here") == 2, "every worker has heard of the ledger again")
    for mock in stack.mocks.values():
        mock.fail("hold")
    with stack.client("dev-other-x") as client:
        first = threading.Thread(target=lambda: call(client, CHAT))
        first.start()
        eventually(lambda: sum(mock.counts().held for mock in stack.mocks.values()) == 1, "the first request runs")
        denied = ask(stack, "other")
        for mock in stack.mocks.values():
            mock.heal()
            mock.release()
        first.join()
    assert denied.status_code == 429
