"""From the spool to the limit store: everything is settled, after whatever fails, and nothing is charged twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import StoreUnavailable
from gateway.telemetry import get_logger
from limits.model import Closing, Settlement
from policies.model import OrganizationId
from tests.unit.usage.usage_builders import CHARGE_TO, START_S, a_settlement, a_spool, an_entry, metrics, until, value
from usage.metrics import LedgerMetrics
from usage.settler import REPEATS_KNOWN_S, Settler
from usage.spool import EXPIRE, Changes, Entry, Spool
from usage.writer import Writer


class Books:
    """A limit store that keeps what it was told; it fails as it is told to."""

    def __init__(self) -> None:
        self.settled: list[Settlement] = []
        self.expired: list[str] = []
        self.down = 0
        """How many calls still find the store down."""
        self.bugs: set[str] = set()
        self.may = asyncio.Event()
        self.may.set()
        self.under_way = 0
        self.most_under_way = 0

    async def settle(self, settlement: Settlement, /) -> Closing:
        await self._answer(settlement.request_id)
        self.settled.append(settlement)
        return Closing(outcome="settled", tokens=settlement.tokens, micro_usd=settlement.micro_usd)

    async def expire(self, organization_id: OrganizationId, request_id: str, /) -> Closing:
        await self._answer(request_id)
        self.expired.append(request_id)
        return Closing(outcome="expired", tokens=0, micro_usd=0)

    async def _answer(self, request_id: str) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.may.wait()
            if self.down:
                self.down -= 1
                raise StoreUnavailable("down")
            if request_id in self.bugs:
                raise ZeroDivisionError
        finally:
            self.under_way -= 1

    @property
    def ids(self) -> list[str]:
        return [settlement.request_id for settlement in self.settled]


class Clock:
    """Unix time, as the test says."""

    def __init__(self) -> None:
        self.now_s = float(START_S)

    def __call__(self) -> float:
        return self.now_s


class Ledger:
    """A settler and the writer that tells it of what is safe."""

    def __init__(self, spool: Spool, books: Books, clock: Clock, counted: LedgerMetrics, waiting_max: int) -> None:
        self.books = books
        self.is_up = True
        self.spool = spool
        self.writer = Writer(spool, written=self._written, metrics=counted, log=get_logger(), retry_s=0.001, group_s=0)
        self.settler = Settler(
            books,
            spool,
            self.writer,
            store_is_up=self._wait_up,
            metrics=counted,
            log=get_logger(),
            clock_s=clock,
            waiting_max=waiting_max,
            retry_s=0.1,
        )

    def _written(self, entries: Any) -> None:
        self.settler.take(entries)

    async def _wait_up(self, within_s: float) -> bool:
        await asyncio.sleep(0)
        return self.is_up

    async def write(self, *entries: Entry) -> None:
        await self.writer.write(Changes(entries=list(entries)))

    async def settled(self) -> None:
        """Wait until there is nothing left to settle, in memory or in the spool."""
        assert await self.settler.drain(10)
        await self.writer.write(Changes())
        assert await self.writer.call(lambda: self.spool.unsettled(most=10)) == []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counted() -> LedgerMetrics:
    return metrics()


@pytest.fixture
async def books() -> Books:
    return Books()


@asynccontextmanager
async def running(
    directory: Path, books: Books, clock: Clock, counted: LedgerMetrics, *, waiting_max: int = 1000
) -> AsyncIterator[Ledger]:
    spool = a_spool(directory)
    ledger = Ledger(spool, books, clock, counted, waiting_max)
    tasks = [asyncio.create_task(ledger.writer.run()), asyncio.create_task(ledger.settler.run())]
    try:
        # After a start it looks in its spool: what is written meanwhile may be settled twice, which changes nothing.
        assert await ledger.settler.drain(10)
        yield ledger
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        ledger.writer.close()
        spool.close()


async def test_what_is_written_is_settled_and_marked_so(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.write(an_entry("r-1"), an_entry("r-2", settlement=None), an_entry("r-3", settlement=EXPIRE))
        await ledger.settled()
    assert books.ids == ["r-1"]
    assert books.expired == ["r-3"]
    assert value(counted.settlements, "settled") == value(counted.settlements, "expired") == 1
    assert value(counted.unsettled) == 0


async def test_it_is_written_down_that_the_store_may_know_before_it_can(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    books.may.clear()
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.write(an_entry("r-1"), an_entry("r-2", tried_s=7))
        await until(lambda: books.under_way == 2)
        found = await ledger.writer.call(lambda: ledger.spool.unsettled(most=10))
        assert [entry.tried_s for entry in found] == [START_S, 7]
        books.may.set()
        await ledger.settled()


async def test_settlement_that_the_store_does_not_take_is_postponed_in_order(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    books.down = 3
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.write(*(an_entry(f"r-{number}") for number in range(5)))
        await until(lambda: value(counted.unsettled) == 3)
        assert not await ledger.settler.drain(0)
        await ledger.settled()
    assert sorted(books.ids) == [f"r-{number}" for number in range(5)]
    assert [request_id for request_id in books.ids if request_id < "r-3"] == ["r-0", "r-1", "r-2"]
    assert value(counted.unsettled) == 0


async def test_nothing_is_tried_while_the_store_is_known_to_be_down(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    async with running(tmp_path, books, clock, counted) as ledger:
        ledger.is_up = False
        await ledger.write(an_entry("r-1"))
        assert not await ledger.settler.drain(0.01)
        assert books.settled == []
        ledger.is_up = True
        await ledger.settled()
    assert books.ids == ["r-1"]


async def test_bug_with_one_settlement_does_not_stop_the_others(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    books.bugs = {"r-1"}
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.write(an_entry("r-1"), an_entry("r-2"))
        assert await ledger.settler.drain(10)
    assert books.ids == ["r-2"]
    assert value(counted.dropped) == 1


# --- After a restart.


async def test_what_was_not_settled_is_settled_after_a_restart(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    async with running(tmp_path, books, clock, counted) as ledger:
        ledger.is_up = False
        await ledger.write(an_entry("r-1"), an_entry("r-2", settlement=EXPIRE))
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.settled()
    assert (books.ids, books.expired) == (["r-1"], ["r-2"])
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.settled()
    assert (books.ids, books.expired) == (["r-1"], ["r-2"])


async def test_settlement_whose_answer_was_lost_is_repeated_after_a_restart(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    books.may.clear()
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.write(an_entry("r-1"))
        await until(lambda: books.under_way)
    books.may.set()
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.settled()
    assert books.settled == [a_settlement("r-1")]


@pytest.mark.parametrize("later_s", [0, REPEATS_KNOWN_S, REPEATS_KNOWN_S + 1])
async def test_nothing_is_charged_without_an_entry_once_the_store_may_have_forgotten(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics, later_s: int
) -> None:
    """It may have taken the settlement before, and knows that for ten minutes."""
    async with running(tmp_path, books, clock, counted) as ledger:
        ledger.is_up = False
        await ledger.write(an_entry("tried", tried_s=START_S), an_entry("new"))
    clock.now_s += later_s
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.settled()
    charged = {settlement.request_id: settlement.charge_to for settlement in books.settled}
    assert charged == {"tried": "" if later_s > REPEATS_KNOWN_S else CHARGE_TO, "new": CHARGE_TO}


async def test_settlement_that_is_postponed_for_long_is_not_charged_without_an_entry(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    books.down = 1
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.write(an_entry("r-1"))
        await until(lambda: value(counted.unsettled) == 1 and not books.down)
        clock.now_s += REPEATS_KNOWN_S + 1
        await ledger.settled()
    assert [settlement.charge_to for settlement in books.settled] == [""]


# --- More than fits into memory.


async def test_what_has_no_room_in_memory_is_found_in_the_spool(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    books.may.clear()
    async with running(tmp_path, books, clock, counted, waiting_max=5) as ledger:
        for number in range(50):
            await ledger.write(an_entry(f"r-{number:02}"))
        assert value(counted.unsettled) <= 10
        books.may.set()
        await ledger.settled()
    assert sorted(set(books.ids)) == [f"r-{number:02}" for number in range(50)]


async def test_what_takes_an_estimates_place_is_settled_though_the_estimate_is_under_way(
    tmp_path: Path, books: Books, clock: Clock, counted: LedgerMetrics
) -> None:
    """The ledger dies between the two, and finds in its spool what is left to do."""
    books.may.clear()
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.write(an_entry("r-1", revision=0, settlement=EXPIRE))
        await until(lambda: books.under_way)
        ledger.is_up = False
        await ledger.write(an_entry("r-1", revision=1))
        books.may.set()
        await until(lambda: books.expired)
        await ledger.writer.write(Changes())
    async with running(tmp_path, books, clock, counted) as ledger:
        await ledger.settled()
    assert (books.expired, books.ids) == (["r-1"], ["r-1"])
