"""The budget service's word: how it is read, kept, asked for again, and what serves while it fails. Over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from extproc.budget_service import (
    CALLS_MAX,
    REFRESH_SHARE,
    RETRY_S,
    STALE_S,
    BudgetAnswer,
    BudgetService,
    open_budget_service,
)
from extproc.http_service import ANSWER_MAX_BYTES, HttpService, service_client
from extproc.keys.store import ASK
from gateway.errors import StoreUnavailable
from gateway.settings import ExtprocSettings
from gateway.telemetry import get_logger
from tests.harness.budgets import Budgets

TTL_S = 10.0
YES, NO = BudgetAnswer(allowed=True), BudgetAnswer(allowed=False)


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def server() -> Iterator[Budgets]:
    with Budgets().running() as budgets:
        yield budgets


@pytest.fixture
def clock() -> Clock:
    return Clock()


Build = Callable[..., BudgetService]


@pytest.fixture
async def build(server: Budgets, clock: Clock) -> AsyncIterator[Build]:
    made: list[BudgetService] = []
    async with service_client() as client:

        def build(
            *, url: str = server.url, timeout_s: float = 5, ttl_s: float = TTL_S, size: int = 100
        ) -> BudgetService:
            service = HttpService(client, name="budgets", variable="X", url=url, timeout_s=timeout_s)
            made.append(BudgetService(service, ttl_s=ttl_s, log=get_logger(), size=size, clock=clock))
            return made[-1]

        yield build
        for budgets in made:
            await budgets.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the service's thread or a background call is about to do."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the service's thread has no event to set in this loop
            await asyncio.sleep(0.001)


# --- The answer.

ANSWERS: dict[str, tuple[int, Any, BudgetAnswer]] = {
    "all of it": (
        200,
        {"allowed": True, "current_usage": 12.5, "limit": 500, "quota_type": "MONTHLY_USD", "reason": "fine"},
        BudgetAnswer(allowed=True, current_usage=12.5, limit=500, quota_type="MONTHLY_USD", reason="fine"),
    ),
    "only the word": (200, {"allowed": False}, NO),
    "nulls": (200, {"allowed": True, "current_usage": None, "limit": None, "quota_type": None, "reason": None}, YES),
    "more than was asked": (200, {"allowed": True, "currency": {"code": "EUR"}}, YES),
    "402": (402, {"allowed": False, "reason": "spent"}, BudgetAnswer(allowed=False, reason="spent")),
    "403": (403, {"allowed": False}, NO),
    "429": (429, {"allowed": False}, NO),
    "a long reason": (200, {"allowed": False, "reason": "x" * 9000}, BudgetAnswer(allowed=False, reason="x" * 256)),
}


@pytest.mark.parametrize(("status", "body", "answer"), ANSWERS.values(), ids=ANSWERS)
async def test_answer_is_read(build: Build, server: Budgets, status: int, body: Any, answer: BudgetAnswer) -> None:
    server.says("acme", body, status=status)
    assert await build().check("acme") == answer


FAULTS: dict[str, tuple[int, Any]] = {
    "500": (500, {"allowed": False}),
    "503": (503, {"allowed": True}),
    "a redirect": (302, {"allowed": True}),
    "an unknown path": (404, {"allowed": False}),
    "allowed, says a 402": (402, {"allowed": True}),
    "nothing": (200, b""),
    "a page": (200, b"<html>hello</html>"),
    "no UTF-8": (200, b'{"allowed": true, "reason": "\xff"}'),
    "a list": (200, []),
    "no word": (200, {"current_usage": 1}),
    "text": (200, {"allowed": "true"}),
    "a number": (200, {"allowed": 1}),
    "usage in text": (200, {"allowed": True, "current_usage": "12"}),
    "usage that is true": (200, {"allowed": True, "current_usage": True}),
    "no finite limit": (200, b'{"allowed": true, "limit": 1e999}'),
    "NaN": (200, b'{"allowed": true, "limit": NaN}'),
    "too much": (200, b" " * ANSWER_MAX_BYTES + b'{"allowed": true}'),
}


@pytest.mark.parametrize(("status", "body"), FAULTS.values(), ids=FAULTS)
async def test_what_is_no_answer_is_an_outage(build: Build, server: Budgets, status: int, body: Any) -> None:
    server.says("acme", body, status=status)
    with pytest.raises(StoreUnavailable):
        await build().check("acme")


@pytest.mark.parametrize(
    ("organization", "path"),
    [
        ("acme", "/v1/budgets/acme/check"),
        ("00000000-0000-0000-0000-000000000001", "/v1/budgets/00000000-0000-0000-0000-000000000001/check"),
        ("a/b", "/v1/budgets/a%2Fb/check"),
        ("..", "/v1/budgets/%2E%2E/check"),
        ("a?b=c#d%2F", "/v1/budgets/a%3Fb%3Dc%23d%252F/check"),
        ("é 模", "/v1/budgets/%C3%A9%20%E6%A8%A1/check"),
    ],
)
async def test_organization_is_one_step_of_the_path(
    build: Build, server: Budgets, organization: str, path: str
) -> None:
    server.denies(organization)
    assert await build().check(organization) == NO
    assert server.paths == [("GET", path)]


async def test_address_may_have_a_path_of_its_own(build: Build, server: Budgets) -> None:
    with pytest.raises(StoreUnavailable, match="status 404"):
        await build(url=server.url + "/base/").check("acme")
    assert server.paths == [("GET", "/base/v1/budgets/acme/check")]


# --- What is kept.


async def test_answer_is_kept_for_its_time(build: Build, server: Budgets, clock: Clock) -> None:
    budgets = build()
    assert budgets.peek("acme") is ASK
    assert await budgets.check("acme") == YES
    server.denies("acme")
    clock.at += TTL_S * REFRESH_SHARE - 0.001
    assert budgets.peek("acme") == await budgets.check("acme") == YES
    clock.at += TTL_S
    assert budgets.peek("acme") is ASK
    assert await budgets.check("acme") == NO
    assert server.asked == {"acme": 2}


async def test_busy_organization_gets_the_new_answer_without_waiting(
    build: Build, server: Budgets, clock: Clock
) -> None:
    budgets = build()
    await budgets.check("acme")
    server.denies("acme")
    clock.at += TTL_S * REFRESH_SHARE
    with server.held():
        assert [budgets.peek("acme") for _ in range(100)] == [YES] * 100
        await until(lambda: server.asked["acme"] == 2)
        assert await budgets.check("acme") == YES
    await until(lambda: budgets.peek("acme") == NO)
    clock.at += TTL_S * REFRESH_SHARE - 0.001
    assert budgets.peek("acme") == NO
    assert server.asked == {"acme": 2}


async def test_age_of_an_answer_counts_from_the_question(build: Build, server: Budgets, clock: Clock) -> None:
    budgets = build()
    with server.held():
        waiting = asyncio.create_task(budgets.check("acme"))
        await until(lambda: server.asked["acme"] == 1)
        clock.at += TTL_S
    assert await waiting == YES
    assert budgets.peek("acme") is ASK


async def test_burst_of_one_organization_makes_one_call(build: Build, server: Budgets) -> None:
    budgets = build()
    with server.held():
        waiting = [asyncio.create_task(budgets.check("acme")) for _ in range(200)]
        await until(lambda: server.asked["acme"] == 1)
    assert await asyncio.gather(*waiting) == [YES] * 200
    assert server.asked == {"acme": 1}


async def test_cancelled_caller_leaves_the_call_to_the_others(build: Build, server: Budgets) -> None:
    budgets = build()
    with server.held():
        first, second = (asyncio.create_task(budgets.check("acme")) for _ in range(2))
        await until(lambda: server.asked["acme"] == 1)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    assert await second == YES
    assert server.asked == {"acme": 1}


async def test_least_recently_used_organization_goes_first(build: Build) -> None:
    budgets = build(size=2)
    for organization in "abac":
        await budgets.check(organization)
    assert (budgets.peek("a"), budgets.peek("b"), budgets.peek("c")) == (YES, ASK, YES)
    assert len(budgets) == 2


async def test_nothing_is_kept_without_a_time_to_keep_it(build: Build, server: Budgets) -> None:
    budgets = build(ttl_s=0)
    await budgets.check("acme")
    assert budgets.peek("acme") is ASK
    await budgets.check("acme")
    assert server.asked == {"acme": 2}


# --- While it fails.


async def test_last_good_answer_serves_for_a_minute_of_failure(build: Build, server: Budgets, clock: Clock) -> None:
    server.denies("acme")
    budgets = build()
    await budgets.check("acme")
    asked_at = clock.at
    with server.failing():
        clock.at = asked_at + TTL_S
        assert await budgets.check("acme") == NO
        clock.at = asked_at + STALE_S - 0.001
        assert await budgets.check("acme") == NO
        clock.at = asked_at + STALE_S
        with pytest.raises(StoreUnavailable):
            await budgets.check("acme")


async def test_too_old_an_answer_does_not_serve_even_the_first_failure(
    build: Build, server: Budgets, clock: Clock
) -> None:
    budgets = build()
    await budgets.check("acme")
    clock.at += STALE_S
    with server.failing(), pytest.raises(StoreUnavailable, match="status 500"):
        await budgets.check("acme")


async def test_failing_service_is_asked_once_a_pause_and_nobody_waits(
    build: Build, server: Budgets, clock: Clock
) -> None:
    budgets = build()
    await budgets.check("acme")
    clock.at += TTL_S
    with server.failing():
        assert await budgets.check("acme") == YES
        assert server.asked == {"acme": 2}
        clock.at += RETRY_S - 0.001
        assert [budgets.peek("acme") for _ in range(100)] == [YES] * 100
        assert await budgets.check("acme") == YES
        clock.at += 0.001
        assert [budgets.peek("acme") for _ in range(100)] == [YES] * 100
        await until(lambda: server.asked["acme"] == 3)
    assert server.asked == {"acme": 3}


async def test_unknown_organization_is_refused_without_waiting_within_the_pause(
    build: Build, server: Budgets, clock: Clock
) -> None:
    budgets = build()
    with server.failing():
        for _ in range(10):
            with pytest.raises(StoreUnavailable, match="status 500"):
                await budgets.check("acme")
        assert server.asked == {"acme": 1}
    with pytest.raises(StoreUnavailable):
        await budgets.check("acme")
    clock.at += RETRY_S
    assert await budgets.check("acme") == YES


async def test_service_that_is_back_is_heard_again(build: Build, server: Budgets, clock: Clock) -> None:
    budgets = build()
    await budgets.check("acme")
    clock.at += TTL_S
    with capture_logs() as logs:
        with server.failing():
            await budgets.check("acme")
        server.denies("acme")
        clock.at += RETRY_S
        assert budgets.peek("acme") == YES
        await until(lambda: budgets.peek("acme") == NO)
    assert [entry["event"] for entry in logs] == ["budget_service_down", "budget_service_up"]


async def test_one_organizations_failure_is_not_anothers(build: Build, server: Budgets) -> None:
    budgets = build()
    server.says("acme", b"nonsense")
    with pytest.raises(StoreUnavailable, match="malformed"):
        await budgets.check("acme")
    assert await budgets.check("zeta") == YES


async def test_service_that_hangs_is_given_up_at_the_deadline(build: Build, server: Budgets) -> None:
    budgets = build(timeout_s=0.05)
    with server.held(), pytest.raises(StoreUnavailable, match=r"no answer within 0\.05 s"):
        await budgets.check("acme")


async def test_service_that_is_not_there_is_an_outage(build: Build) -> None:
    with pytest.raises(StoreUnavailable, match="Connect"):
        await build(url="http://127.0.0.1:1").check("acme")


async def test_calls_under_way_are_bounded(build: Build, server: Budgets) -> None:
    budgets = build(timeout_s=30)
    with server.held():
        waiting = [asyncio.create_task(budgets.check(str(number))) for number in range(CALLS_MAX)]
        await until(lambda: server.asked)
        with pytest.raises(StoreUnavailable, match="already running"):
            await budgets.check("acme")
    assert await asyncio.gather(*waiting) == [YES] * CALLS_MAX
    assert await budgets.check("acme") == YES


async def test_closing_tells_those_who_wait(build: Build, server: Budgets) -> None:
    budgets = build()
    with server.held():
        waiting = asyncio.create_task(budgets.check("acme"))
        await until(lambda: server.asked["acme"] == 1)
        await budgets.close()
        with pytest.raises(StoreUnavailable, match="closing"):
            await waiting


# --- From the settings.


async def test_opened_service_is_the_one_that_settings_name(server: Budgets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    server.denies("acme", quota_type="TOKENS")
    settings = ExtprocSettings(budget_service_endpoint=server.url)
    async with open_budget_service(settings) as budgets:
        assert await budgets.check("acme") == BudgetAnswer(allowed=False, quota_type="TOKENS")


async def test_address_must_be_http() -> None:
    settings = ExtprocSettings(budget_service_endpoint="budgets:8080")
    with pytest.raises(ValueError, match="BUDGET_SERVICE_ENDPOINT"):
        async with open_budget_service(settings):
            raise AssertionError("opened")


async def test_connection_that_the_service_closed_meanwhile_is_tried_once_more() -> None:
    calls = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise httpx.ReadError("closed", request=request)
        return httpx.Response(200, content=json.dumps({"allowed": True}))

    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
        service = HttpService(client, name="budgets", variable="X", url="http://budgets", timeout_s=5)
        assert await BudgetService(service, ttl_s=1, log=get_logger()).check("acme") == YES
    assert calls == 2
