"""Ejection: a backend that keeps failing gets no traffic for a while, and what clients hear when none is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from typing import Any

import httpx
import pytest

from tests.harness.backends import refusing_uri
from tests.harness.calls import CHAT, INFERENCE, call, chat, error_code
from tests.harness.process import eventually
from tests.harness.stack import Stack, model_of, policy_of, running_stack

pytestmark = pytest.mark.integration

both_formats = pytest.mark.parametrize("path", [CHAT, INFERENCE])
LONG = "120s"
_round = count()


class Bench:
    """A stack whose backends ``first`` and ``second`` are new to Envoy in every test: ejections are not passed on."""

    def __init__(self, stack: Stack, refusing: str) -> None:
        self.stack = stack
        self.refusing = refusing
        self.first, self.second = "", ""

    def apply(
        self,
        *,
        uris: Mapping[str, str] | None = None,
        threshold: int = 3,
        ejection: str = LONG,
        split: tuple[int, int] = (100, 0),
        backend: Mapping[str, Any] | None = None,
    ) -> None:
        """A policy that prefers ``first``; ``uris`` replaces those of ``first`` and ``second``."""
        number = next(_round)
        self.first, self.second = f"first{number}", f"second{number}"
        of = {"first": self.stack.uris["a"], "second": self.stack.uris["b"], **(uris or {})}
        self.stack.apply(
            policy_of(
                {self.first: of["first"], self.second: of["second"]},
                backend=backend,
                models=[model_of({self.first: split[0], self.second: split[1]})],
                default_policy={"failover_threshold": threshold, "ejection": ejection},
            )
        )

    def is_ejected(self, backend: str) -> bool:
        name = f"cluster.bk_{backend}.outlier_detection.ejections_active"
        return self.stack.stats(name)[name] == 1

    def ejections(self, backend: str) -> int:
        name = f"cluster.bk_{backend}.outlier_detection.ejections_enforced_total"
        return self.stack.stats(name)[name]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with ExitStack() as running:
        refusing = running.enter_context(refusing_uri())
        yield Bench(running.enter_context(running_stack(workers=1)), refusing)


@pytest.fixture(autouse=True)
def _fresh(bench: Bench) -> None:
    bench.stack.reset()


@pytest.fixture
def client(bench: Bench) -> Iterator[httpx.Client]:
    with bench.stack.client() as client:
        yield client


def eject(bench: Bench, client: httpx.Client, *backends: str) -> None:
    """Send requests until Envoy has ejected every one of the backends and its workers know."""

    def all_ejected() -> bool:
        call(client, CHAT)
        return all(bench.is_ejected(backend) for backend in backends)

    def nothing_reaches_them() -> bool:
        before = [bench.stack.mocks[mock].count() for mock in mocks]
        call(client, CHAT)
        return before == [bench.stack.mocks[mock].count() for mock in mocks]

    mocks = [{bench.first: "a", bench.second: "b"}[backend] for backend in backends]
    eventually(all_ejected, f"{backends} are ejected")
    eventually(nothing_reaches_them, f"{backends} get no traffic")


FAILURES: dict[str, dict[str, Any]] = {
    "500": {"kind": "status", "status": 500},
    "503": {"kind": "status", "status": 503},
    "reset": {"kind": "reset"},
    "hang": {"kind": "hang"},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_backend_is_ejected_after_the_threshold_and_gets_no_traffic(
    bench: Bench, client: httpx.Client, failure: str
) -> None:
    # A silent second is long enough for a healthy backend under load, and short enough for a test.
    bench.apply(threshold=3, backend={"timeout": "1s"} if failure == "hang" else None)
    a, b = bench.stack.mocks["a"], bench.stack.mocks["b"]
    a.fail(**FAILURES[failure])
    for sent in range(1, 4):
        assert bench.ejections(bench.first) == 0
        assert call(client, CHAT).headers["x-routing-backend"] == bench.second
        assert a.count() == sent
    eventually(lambda: bench.is_ejected(bench.first), "the backend is ejected")
    eject(bench, client, bench.first)
    a.heal()
    a.clear()
    b.clear()
    for _ in range(30):
        response = call(client, CHAT)
        assert response.status_code == 200
        assert response.headers["x-routing-backend"] == bench.second
        assert response.headers["x-routing-decision"] == "FAILOVER"
    assert a.count() == 0
    assert b.count() == 30


def test_a_refusing_backend_is_ejected(bench: Bench, client: httpx.Client) -> None:
    bench.apply(uris={"first": bench.refusing})
    for _ in range(3):
        assert bench.ejections(bench.first) == 0
        assert call(client, CHAT).headers["x-routing-backend"] == bench.second
    eventually(lambda: bench.is_ejected(bench.first), "the backend is ejected")


def test_failures_that_are_not_consecutive_do_not_eject(bench: Bench, client: httpx.Client) -> None:
    bench.apply(threshold=3)
    a = bench.stack.mocks["a"]
    for _ in range(4):
        a.fail("status", status=500, times=2)
        backends = [call(client, CHAT).headers["x-routing-backend"] for _ in range(3)]
        assert backends == [bench.second, bench.second, bench.first]
    assert bench.ejections(bench.first) == 0


@pytest.mark.parametrize("status", [400, 404, 429])
def test_an_answer_below_500_does_not_eject(bench: Bench, client: httpx.Client, status: int) -> None:
    bench.apply(threshold=1)
    bench.stack.mocks["a"].fail("status", status=status)
    for _ in range(5):
        call(client, CHAT)
    assert bench.stack.mocks["a"].count() == 5
    assert bench.ejections(bench.first) == 0


def test_an_ejected_backend_comes_back_after_its_time(bench: Bench, client: httpx.Client) -> None:
    bench.apply(threshold=2, ejection="1s")
    bench.stack.mocks["a"].fail("status", status=500, times=2)
    for _ in range(2):
        assert call(client, CHAT).headers["x-routing-backend"] == bench.second
    eventually(lambda: bench.ejections(bench.first) == 1, "the backend is ejected")
    eventually(lambda: call(client, CHAT).headers["x-routing-backend"] == bench.first, "the backend is back")
    assert call(client, CHAT).headers["x-routing-decision"] == "PRIMARY"


def test_a_passing_health_check_does_not_end_an_ejection(bench: Bench, client: httpx.Client) -> None:
    bench.apply(threshold=2, backend={"health_check": {"path": "/health", "interval": "50ms"}})
    a = bench.stack.mocks["a"]
    a.fail("status", status=500)
    eject(bench, client, bench.first)
    a.clear()
    checks = a.counts().health
    eventually(lambda: a.counts().health >= checks + 5, "five more health checks have passed")
    for _ in range(10):
        assert call(client, CHAT).headers["x-routing-backend"] == bench.second
    assert a.count() == 0
    assert bench.is_ejected(bench.first)


def test_a_failing_health_check_takes_a_backend_out_until_it_passes(bench: Bench, client: httpx.Client) -> None:
    bench.apply(backend={"health_check": {"path": "/health", "interval": "50ms"}})
    a = bench.stack.mocks["a"]
    assert call(client, CHAT).headers["x-routing-backend"] == bench.first
    a.fail("health", status=503)
    eventually(lambda: call(client, CHAT).headers["x-routing-backend"] == bench.second, "the backend is out")
    a.clear()
    for _ in range(10):
        assert call(client, CHAT).headers["x-routing-backend"] == bench.second
    assert a.count() == 0
    a.heal()
    eventually(lambda: call(client, CHAT).headers["x-routing-backend"] == bench.first, "the backend is back")


def test_a_policy_edit_elsewhere_keeps_an_ejection(bench: Bench, client: httpx.Client) -> None:
    bench.apply(threshold=2)
    bench.stack.mocks["a"].fail("status", status=500)
    eject(bench, client, bench.first)
    bench.stack.reset()
    uris = {bench.first: bench.stack.uris["a"], bench.second: bench.stack.uris["b"]}
    split = {bench.first: 100, bench.second: 0}
    bench.stack.apply(
        policy_of(
            uris,
            models=[model_of(split), model_of(split, model="new")],
            default_policy={"failover_threshold": 2, "ejection": LONG},
        )
    )
    for model in ("gpt-4o", "new"):
        assert call(client, CHAT, model).headers["x-routing-backend"] == bench.second
    assert bench.is_ejected(bench.first)
    assert bench.stack.mocks["a"].count() == 0


@both_formats
def test_with_every_backend_ejected_nothing_is_contacted(bench: Bench, client: httpx.Client, path: str) -> None:
    bench.apply(threshold=2, split=(50, 50))
    for mock in bench.stack.mocks.values():
        mock.fail("status", status=500)
    eject(bench, client, bench.first, bench.second)
    bench.stack.reset()
    for _ in range(5):
        response = call(client, path)
        assert response.status_code == 503
        assert error_code(response) == "NO_BACKEND_AVAILABLE"
    assert bench.stack.contacted() == 0


# What every backend does, and what the client hears of it.
DOWN: dict[str, tuple[dict[str, Any] | None, int, str]] = {
    "500": ({"kind": "status", "status": 500}, 502, "BACKEND_ERROR"),
    "503": ({"kind": "status", "status": 503}, 502, "BACKEND_ERROR"),
    "429": ({"kind": "status", "status": 429}, 502, "BACKEND_ERROR"),
    "401": ({"kind": "status", "status": 401}, 502, "BACKEND_ERROR"),
    "403": ({"kind": "status", "status": 403}, 502, "BACKEND_ERROR"),
    "reset": ({"kind": "reset"}, 502, "BACKEND_ERROR"),
    "closed": ({"kind": "close"}, 502, "BACKEND_ERROR"),
    "refused": (None, 502, "BACKEND_ERROR"),
    "hang": ({"kind": "hang"}, 504, "BACKEND_TIMEOUT"),
}


@both_formats
@pytest.mark.parametrize("failure", DOWN)
def test_with_every_backend_failing_the_client_gets_one_error_of_ours(
    bench: Bench, client: httpx.Client, failure: str, path: str
) -> None:
    fault, status, code = DOWN[failure]
    refused = {"first": bench.refusing, "second": bench.refusing}
    bench.apply(
        threshold=1000,
        uris=refused if fault is None else None,
        backend={"timeout": "200ms"} if failure == "hang" else None,
    )
    for mock in bench.stack.mocks.values():
        if fault is not None:
            mock.fail(**fault, **({"body": "internal: db-7.example"} if fault["kind"] == "status" else {}))
    response = call(client, path)
    assert response.status_code == status
    assert error_code(response) == code
    assert "127.0.0.1" not in response.text
    assert "db-7" not in response.text
    if fault is not None:
        assert [mock.count() for mock in bench.stack.mocks.values()] == [1, 1]


def test_a_stream_that_no_backend_began_is_a_plain_error(bench: Bench, client: httpx.Client) -> None:
    bench.apply(threshold=1000)
    for mock in bench.stack.mocks.values():
        mock.fail("status", status=500)
    response = client.post(CHAT, json=chat(stream=True))
    assert response.status_code == 502
    assert error_code(response) == "BACKEND_ERROR"
