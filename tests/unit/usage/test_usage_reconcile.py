"""Envoy's count and the journal's are of the same Envoy, whatever restarts."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry import get_logger
from tests.unit.usage.usage_builders import metrics, value
from usage.reconcile import KEPT_S, LAG_S, SECONDS_MAX, Reconciliation, Seen

COMPLETED = "http.public.downstream_rq_completed"

# --- What the journal has told.


def seen_at(*seconds: int, written: str = "") -> Seen:
    seen = Seen(written)
    for second in seconds:
        seen.add(second)
    return seen


def test_requests_of_the_running_envoy_are_counted() -> None:
    seen = seen_at(100, 100, 105)
    assert seen.of(100, now_s=110) == 3
    seen.add(111)
    assert seen.of(100, now_s=112) == 4


@pytest.mark.parametrize("drift", [-2, -1, 0, 1, 2])
def test_envoy_whose_age_is_told_in_whole_seconds_is_the_same_one(drift: int) -> None:
    seen = seen_at(100, 105)
    assert seen.of(100, now_s=110) == 2
    seen.add(111)
    assert seen.of(100 + drift, now_s=112) == 3


def test_requests_of_the_envoy_before_do_not_count() -> None:
    seen = seen_at(100, 101)
    assert seen.of(90, now_s=110) == 2
    seen.add(111)
    assert seen.of(120, now_s=121) == 0
    seen.add(121)
    seen.add(119)  # read late: it is the other one's
    assert seen.of(120, now_s=122) == 1


def test_requests_of_the_new_envoy_that_were_read_before_it_was_known_count() -> None:
    seen = seen_at(100)
    assert seen.of(90, now_s=101) == 1
    for second in (118, 121, 122):
        seen.add(second)
    assert seen.of(120, now_s=123) == 2


def test_what_is_known_survives_a_restart_of_the_ledger() -> None:
    before = seen_at(100, 101)
    assert before.of(90, now_s=102) == 2
    before.add(103)
    after = seen_at(104, written=before.written())
    assert after.of(90, now_s=105) == 4
    assert seen_at(written=after.written()).of(103, now_s=106) == 2


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("request"), st.integers(0, 3)),
            st.tuples(st.just("look"), st.just(0)),
            st.tuples(st.just("ledger restarts"), st.just(0)),
            st.tuples(st.just("envoy restarts"), st.integers(3, 20)),
        ),
        max_size=60,
    )
)
def test_count_is_right_whatever_restarts_whenever(steps: list[tuple[str, int]]) -> None:
    """Requests are read as they end; the ledger looks now and then."""
    seen, now_s, started_s, right = Seen(), 1000, 990, 0
    for step, more in steps:
        now_s += more
        match step:
            case "request":
                seen.add(now_s)
                right += 1
            case "look":
                assert seen.of(started_s, now_s=now_s) == right
            case "ledger restarts":
                seen = Seen(seen.written())
            case _:
                started_s, right, now_s = now_s + 3, 0, now_s + 3
    assert seen.of(started_s, now_s=now_s) == right


def test_little_is_remembered() -> None:
    seen = Seen()
    for second in range(10_000):
        seen.add(second)
        seen.of(0, now_s=second)
    assert len(seen.written()) < 20 * KEPT_S


def test_little_is_remembered_while_envoy_does_not_say_how_old_it_is() -> None:
    seen = Seen()
    for second in range(2 * SECONDS_MAX):
        seen.add(second)
    assert len(seen.written()) < 20 * SECONDS_MAX
    assert seen.of(2 * SECONDS_MAX - 7, now_s=2 * SECONDS_MAX) == 7


# --- The comparison.


class Envoy:
    """An admin interface."""

    def __init__(self) -> None:
        self.age_s = 10
        self.completed: int | None = 0
        self.broken: dict[str, Any] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path in self.broken:
            return httpx.Response(200, content=self.broken[request.url.path])
        if request.url.path == "/server_info":
            return httpx.Response(200, json={"uptime_current_epoch": f"{self.age_s}s"})
        stats = [{"histograms": {}}]
        if self.completed is not None:
            stats.append({"name": COMPLETED, "value": self.completed})
        return httpx.Response(200, json={"stats": stats})


class Ledger:
    """A reconciliation, and the time it goes by."""

    def __init__(self) -> None:
        self.envoy = Envoy()
        self.now_s = 1000.0
        self.seen = Seen()
        self.counted = metrics()
        self.reconciliation = Reconciliation(
            self.seen,
            httpx.AsyncClient(transport=httpx.MockTransport(self.envoy)),
            "127.0.0.1:9901",
            metrics=self.counted,
            log=get_logger(),
            clock_s=lambda: self.now_s,
        )

    def pass_s(self, seconds: int) -> None:
        self.now_s += seconds
        self.envoy.age_s += seconds

    async def compare(self) -> tuple[int, int] | None:
        found = await self.reconciliation.compare()
        return None if found is None else (found[0].completed, found[1])


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


async def test_counts_are_of_the_same_envoy(ledger: Ledger) -> None:
    ledger.envoy.completed = 2
    ledger.seen.add(980)
    ledger.seen.add(995)
    assert await ledger.compare() == (2, 1)
    assert ledger.reconciliation.unaccounted is None


async def test_request_is_unaccounted_once_it_should_have_been_in_the_journal(ledger: Ledger) -> None:
    ledger.envoy.completed = 3
    ledger.seen.add(995)
    await ledger.compare()
    ledger.pass_s(int(LAG_S) - 1)
    await ledger.compare()
    assert ledger.reconciliation.unaccounted is None
    ledger.pass_s(1)
    await ledger.compare()
    assert ledger.reconciliation.unaccounted == value(ledger.counted.unaccounted) == 2
    ledger.seen.add(996)
    ledger.seen.add(997)
    await ledger.compare()
    assert ledger.reconciliation.unaccounted == value(ledger.counted.unaccounted) == 0


async def test_what_has_just_ended_is_not_unaccounted(ledger: Ledger) -> None:
    for _ in range(10):
        await ledger.compare()
        ledger.pass_s(5)
        ledger.envoy.completed = (ledger.envoy.completed or 0) + 7
        await ledger.compare()
        assert not ledger.reconciliation.unaccounted
        for _ in range(7):
            ledger.seen.add(int(ledger.now_s))
    assert ledger.reconciliation.unaccounted == 0


async def test_another_envoy_is_not_held_against_the_one_before(ledger: Ledger) -> None:
    ledger.envoy.completed = 5
    for _ in range(5):
        ledger.seen.add(995)
    await ledger.compare()
    ledger.pass_s(20)
    ledger.envoy.age_s, ledger.envoy.completed = 5, 1
    ledger.seen.add(1016)
    assert await ledger.compare() == (1, 1)
    ledger.pass_s(20)
    await ledger.compare()
    assert ledger.reconciliation.unaccounted == 0


async def test_envoy_that_has_completed_nothing_has_no_counter(ledger: Ledger) -> None:
    ledger.envoy.completed = None
    assert await ledger.compare() == (0, 0)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/server_info", b"no json"),
        ("/server_info", b"{}"),
        ("/server_info", b'{"uptime_current_epoch": "long"}'),
        ("/server_info", b"[]"),
        ("/stats", b"no json"),
        ("/stats", b"{}"),
        ("/stats", b'{"stats": [1]}'),
    ],
)
async def test_answer_that_says_nothing_changes_nothing(ledger: Ledger, path: str, answer: bytes) -> None:
    ledger.envoy.broken = {path: answer}
    assert await ledger.compare() is None
    assert ledger.reconciliation.unaccounted is None
