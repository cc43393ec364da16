"""The queue between log and store: nothing is settled twice, nothing waits for what fails, and it has a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

from prometheus_client import CollectorRegistry

from gateway.errors import StoreUnavailable
from limits.model import Closing, Settlement
from tests.unit.usage.usage_builders import a_finished, until
from usage.access_log import Finished
from usage.ledger import BATCH_MAX, REPEATS_KNOWN_S, Ledger
from usage.metrics import LedgerMetrics

WAIT_S = 10.0


class Store:
    """A store that keeps what it is told. While ``loses_answers`` it takes a settlement and says that it is down."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.up.set()
        self.loses_answers = False
        self.refuses: set[str] = set()
        self.breaks: set[str] = set()
        self.taken: list[Settlement] = []
        self.closed: set[str] = set()
        self.calls = 0
        self.most_at_once = 0
        self._at_once = 0

    async def is_up(self, timeout_s: float) -> bool:
        """Whether it is up within so long."""
        try:
            await asyncio.wait_for(self.up.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def settle(self, settlement: Settlement) -> Closing:
        """Take a settlement, as far as it does."""
        self.calls += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0)
        self._at_once -= 1
        if settlement.request_id in self.breaks:
            raise AssertionError("a bug")
        if not self.up.is_set() or settlement.request_id in self.refuses:
            raise StoreUnavailable("no")
        known = settlement.request_id in self.closed
        self.closed.add(settlement.request_id)
        if not known:
            self.taken.append(settlement)
        if self.loses_answers:
            raise StoreUnavailable("the connection was lost")
        outcome = "repeated" if known else "settled"
        return Closing(outcome=outcome, tokens=settlement.tokens, micro_usd=settlement.micro_usd)  # type: ignore[arg-type]


class Log:
    """A logger that remembers the events it was told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.warning = self.error = self._note

    def _note(self, event: str, **_: object) -> None:
        self.events.append(event)


class Running:
    """A ledger on a store, with a clock that stands still until it is moved."""

    def __init__(self, *, entries_max: int = 1000, retry_s: float = 0.001) -> None:
        self.store, self.log, self.now_s = Store(), Log(), 0.0
        self.registry = CollectorRegistry()
        self.ledger = Ledger(
            self.store.settle,
            store_is_up=self.store.is_up,
            metrics=LedgerMetrics(self.registry),
            log=cast(Any, self.log),
            clock_s=lambda: self.now_s,
            entries_max=entries_max,
            retry_s=retry_s,
        )

    def metric(self, name: str, **labels: str) -> float:
        """Value of a metric; 0 where it was never counted."""
        return self.registry.get_sample_value(f"router_usage_{name}", labels) or 0


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Running]:
    run = Running(**options)
    task = asyncio.create_task(run.ledger.run())
    try:
        yield run
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ended(count: int, *, start: int = 0) -> list[Finished]:
    return [a_finished(request_id=f"r{number}") for number in range(start, start + count)]


def ids(settlements: list[Settlement]) -> list[str]:
    return [settlement.request_id for settlement in settlements]


async def test_what_arrives_is_settled_once() -> None:
    async with running() as run:
        run.ledger.take(ended(3))
        run.ledger.take(ended(2, start=3))
        assert await run.ledger.drain(WAIT_S) == 0
        assert ids(run.store.taken) == ["r0", "r1", "r2", "r3", "r4"]
        assert run.metric("settlements_total", outcome="settled") == 5
        assert run.metric("queue_entries") == 0
        assert run.log.events == []


async def test_reply_that_left_nothing_open_is_never_sent() -> None:
    async with running() as run:
        run.ledger.take([replace(each, closed=True) for each in ended(3)])
        assert await run.ledger.drain(WAIT_S) == 0
        assert run.store.calls == 0


async def test_many_are_settled_at_once_but_never_more_than_a_batch() -> None:
    async with running(entries_max=5 * BATCH_MAX) as run:
        run.ledger.take(ended(2 * BATCH_MAX + 7))
        assert await run.ledger.drain(WAIT_S) == 0
        assert run.store.most_at_once == BATCH_MAX
        assert len(run.store.taken) == 2 * BATCH_MAX + 7


async def test_while_the_store_is_down_the_queue_holds_and_then_drains() -> None:
    async with running() as run:
        run.store.up.clear()
        run.ledger.take(ended(300))
        assert await run.ledger.drain(0.05) == 300
        assert run.metric("queue_entries") == 300
        assert run.store.calls == 0
        run.store.up.set()
        assert await run.ledger.drain(WAIT_S) == 0
        assert sorted(ids(run.store.taken)) == sorted(f"r{number}" for number in range(300))


async def test_full_queue_drops_what_comes_last_and_counts_it() -> None:
    async with running(entries_max=10) as run:
        run.store.up.clear()
        for start in range(0, 16, 4):
            run.ledger.take(ended(4, start=start))
        assert run.metric("queue_entries") == 10
        assert run.metric("dropped_total") == 6
        assert run.log.events == ["queue_full"]
        run.store.up.set()
        assert await run.ledger.drain(WAIT_S) == 0
        assert ids(run.store.taken) == [f"r{number}" for number in range(10)]
        run.ledger.take(ended(1, start=100))
        assert await run.ledger.drain(WAIT_S) == 0
        assert run.metric("dropped_total") == 6


async def test_settlement_whose_answer_was_lost_is_sent_again_and_charged_once() -> None:
    async with running() as run:
        run.store.loses_answers = True
        run.ledger.take(ended(2))
        await until(lambda: run.store.calls >= 4)
        run.store.loses_answers = False
        assert await run.ledger.drain(WAIT_S) == 0
        assert ids(run.store.taken) == ["r0", "r1"]
        assert run.metric("settlements_total", outcome="repeated") == 2
        assert run.log.events == ["settlements_postponed"]


async def test_settlement_that_the_store_refuses_keeps_no_other_waiting() -> None:
    async with running() as run:
        run.store.refuses = {"r1"}
        run.ledger.take(ended(3))
        await until(lambda: run.store.calls > 10)
        run.ledger.take(ended(1, start=3))
        await until(lambda: "r3" in run.store.closed)
        assert run.metric("queue_entries") == 1
        run.store.refuses = set()
        assert await run.ledger.drain(WAIT_S) == 0
        assert ids(run.store.taken) == ["r0", "r2", "r3", "r1"]


async def test_bug_in_one_settlement_ends_that_one() -> None:
    async with running() as run:
        run.store.breaks = {"r1"}
        run.ledger.take(ended(3))
        assert await run.ledger.drain(WAIT_S) == 0
        assert ids(run.store.taken) == ["r0", "r2"]
        assert run.metric("dropped_total") == 1
        assert run.log.events == ["settlement_failed"]


async def test_what_the_store_may_have_forgotten_is_not_charged_without_an_entry() -> None:
    async with running() as run:
        run.store.refuses = {"r0", "r1"}
        run.ledger.take(ended(1))
        await until(lambda: run.store.calls >= 2)
        run.now_s = REPEATS_KNOWN_S + 1
        run.ledger.take(ended(1, start=1))
        await until(lambda: run.store.calls >= 4)
        run.store.refuses = set()
        assert await run.ledger.drain(WAIT_S) == 0
        charged = {settlement.request_id: settlement.charge_to for settlement in run.store.taken}
        assert charged == {"r0": "", "r1": "org:DAILY org:MONTHLY"}
