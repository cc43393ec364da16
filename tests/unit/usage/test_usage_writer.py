"""The queue before the spool: in order, bounded, and however long the disk fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry import get_logger
from tests.unit.usage.usage_builders import a_spool, an_attempt, an_entry, an_event, metrics, until, value
from usage.metrics import LedgerMetrics
from usage.spool import Changes, Entry, Spool
from usage.writer import TOGETHER_MAX, Writer


@dataclass
class Told:
    """Who is told of what is safe."""

    ids: list[str] = field(default_factory=list)

    def __call__(self, entries: Sequence[Entry]) -> None:
        self.ids += [entry.request_id for entry in entries]


class SlowSpool(Spool):
    """Does nothing until it may, and then fails as often as it was told to; keeps how much it was given at once."""

    def __init__(self, path: Path, *, failures: int = 0) -> None:
        super().__init__(path)
        self.may = threading.Event()
        self.may.set()
        self.failures = failures
        self.together: list[int] = []

    def write(self, changes: Changes) -> list[Entry]:
        self.may.wait()
        if self.failures:
            self.failures -= 1
            raise sqlite3.OperationalError("disk I/O error")
        self.together.append(len(changes.entries))
        return super().write(changes)


@pytest.fixture
def counted() -> LedgerMetrics:
    return metrics()


@pytest.fixture
def told() -> Told:
    return Told()


@asynccontextmanager
async def running(
    spool: Spool, counted: LedgerMetrics, told: Callable[[Sequence[Entry]], None], *, entries_max: int = 1000
) -> AsyncIterator[Writer]:
    writer = Writer(
        spool, written=told, metrics=counted, log=get_logger(), entries_max=entries_max, retry_s=0.001, group_s=0
    )
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        if isinstance(spool, SlowSpool):
            spool.may.set()
        task.cancel()
        await asyncio.wait([task])
        writer.close()
        spool.close()


def entries(*numbers: int) -> Changes:
    return Changes(entries=[an_entry(f"r-{number}") for number in numbers])


def in_file(spool: Spool) -> list[str]:
    with closing(sqlite3.connect(f"file:{spool.path}?mode=ro", uri=True)) as db:
        return [row[0] for row in db.execute("SELECT request_id FROM requests ORDER BY seq")]


async def test_what_is_written_is_safe_before_anybody_is_told(
    tmp_path: Path, counted: LedgerMetrics, told: Told
) -> None:
    spool = a_spool(tmp_path)
    safe: list[bool] = []

    def check(some: Sequence[Entry]) -> None:
        safe.append({entry.request_id for entry in some} <= set(in_file(spool)))
        told(some)

    async with running(spool, counted, check) as writer:
        assert writer.offer(entries(1, 2))
        await writer.write(entries(3))
        await until(lambda: told.ids == ["r-1", "r-2", "r-3"])
        assert all(safe)
        assert writer.held == value(counted.queue_entries) == 0


async def test_what_was_there_before_is_told_of_once(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    async with running(a_spool(tmp_path), counted, told) as writer:
        for _ in range(3):
            await writer.write(entries(1, 2))
        await writer.write(entries(3))
    assert told.ids == ["r-1", "r-2", "r-3"]


@given(st.lists(st.tuples(st.sampled_from(["offer", "write", "insist"]), st.integers(0, 4)), max_size=30))
def test_order_is_kept_whichever_way_things_come(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    async def work() -> None:
        spool, count, waiting = a_spool(tmp_path_factory.mktemp("spool")), 0, []
        async with running(spool, metrics(), lambda _: None) as writer:
            for how, size in steps:
                changes = entries(*range(count, count + size))
                count += size
                if how == "write":
                    waiting.append(asyncio.create_task(writer.write(changes)))
                    await asyncio.sleep(0)
                else:
                    assert getattr(writer, how)(changes) is not False
            await asyncio.gather(*waiting)
            assert await writer.drain(10) == 0
            assert in_file(spool) == [f"r-{number}" for number in range(count)]

    asyncio.run(work())


async def test_what_waits_is_written_together_but_not_too_much_of_it(
    tmp_path: Path, counted: LedgerMetrics, told: Told
) -> None:
    spool = SlowSpool(tmp_path / "usage.db")
    spool.may.clear()
    async with running(spool, counted, told, entries_max=10_000) as writer:
        for number in range(2 * TOGETHER_MAX):
            assert writer.offer(entries(number))
        spool.may.set()
        assert await writer.drain(10) == 0
    assert sum(spool.together) == 2 * TOGETHER_MAX
    assert max(spool.together) == TOGETHER_MAX


async def test_nothing_is_lost_while_the_disk_fails_and_an_alarm_is_raised(
    tmp_path: Path, counted: LedgerMetrics, told: Told
) -> None:
    spool = SlowSpool(tmp_path / "usage.db", failures=10**6)
    async with running(spool, counted, told) as writer:
        writing = asyncio.create_task(writer.write(entries(1)))
        await until(lambda: writer.held)
        assert writer.offer(entries(2))
        await until(lambda: value(counted.spool_errors) > 3)
        assert not writer.writable
        assert value(counted.spool_writable) == 0
        assert (writer.held, told.ids, writing.done()) == (2, [], False)
        spool.failures = 0
        await writing
        await until(lambda: told.ids == ["r-1", "r-2"])
        assert writer.writable
        assert value(counted.spool_writable) == 1


async def test_full_disk_is_waited_for(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    spool = a_spool(tmp_path)
    [(pages,)] = spool._db.execute("PRAGMA page_count")
    spool._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    async with running(spool, counted, told) as writer:
        for number in range(100):
            assert writer.offer(Changes(entries=[an_entry(f"r-{number}", told="x" * 2000)]))
        await until(lambda: value(counted.spool_errors))
        assert writer.held
        await writer.call(lambda: spool._db.execute("PRAGMA max_page_count = 1000000"))
        assert await writer.drain(10) == 0
        assert in_file(spool) == told.ids == [f"r-{number}" for number in range(100)]


async def test_call_is_repeated_until_it_can_be_done(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    failures = iter([True, True, False])

    def work() -> str:
        if next(failures):
            raise sqlite3.OperationalError("locked")
        return "done"

    async with running(a_spool(tmp_path), counted, told) as writer:
        assert await writer.call(work) == "done"
    assert value(counted.spool_errors) == 2


async def test_bug_is_no_failure_of_the_disk(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    def work() -> None:
        raise ZeroDivisionError

    async with running(a_spool(tmp_path), counted, told) as writer:
        with pytest.raises(ZeroDivisionError):
            await writer.call(work)
    assert value(counted.spool_errors) == 0


async def test_offer_that_finds_no_room_is_left_to_others(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    spool = SlowSpool(tmp_path / "usage.db")
    spool.may.clear()
    async with running(spool, counted, told, entries_max=3) as writer:
        assert writer.offer(entries(1, 2))
        assert not writer.offer(entries(3, 4))
        assert writer.offer(entries(5))
        assert not writer.offer(entries(6))
        assert value(counted.queue_entries) == writer.held == 3
        spool.may.set()
        assert await writer.drain(10) == 0
        assert writer.offer(entries(7))
        assert await writer.drain(10) == 0
    assert told.ids == ["r-1", "r-2", "r-5", "r-7"]


async def test_attempts_need_room_too(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    spool = SlowSpool(tmp_path / "usage.db")
    spool.may.clear()
    async with running(spool, counted, told, entries_max=100) as writer:
        taken = sum(writer.offer(Changes(attempts=[an_attempt(started_us=number)])) for number in range(1000))
        assert taken == 100
        spool.may.set()
        assert await writer.drain(10) == 0
        assert writer.offer(Changes(attempts=[an_attempt()]))


async def test_write_waits_for_room(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    spool = SlowSpool(tmp_path / "usage.db")
    spool.may.clear()
    async with running(spool, counted, told, entries_max=2) as writer:
        assert writer.offer(entries(1, 2))
        writing = asyncio.create_task(writer.write(entries(3)))
        await asyncio.sleep(0.01)
        assert writer.held == 2
        writer.insist(Changes(marks={"m": 1}))
        spool.may.set()
        await writing
    assert told.ids == ["r-1", "r-2", "r-3"]


async def test_drain_says_how_much_is_left_after_its_time(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    spool = SlowSpool(tmp_path / "usage.db", failures=10**6)
    async with running(spool, counted, told) as writer:
        assert writer.offer(entries(1, 2, 3))
        assert await writer.drain(0.02) == 3
        spool.failures = 0
        assert await writer.drain(10) == 0


async def test_write_that_nobody_waits_for_any_more_is_done_all_the_same(
    tmp_path: Path, counted: LedgerMetrics, told: Told
) -> None:
    spool = SlowSpool(tmp_path / "usage.db")
    spool.may.clear()
    async with running(spool, counted, told) as writer:
        writing = asyncio.create_task(writer.write(entries(1)))
        await until(lambda: writer.held)
        writing.cancel()
        await asyncio.wait([writing])
        spool.may.set()
        assert await writer.drain(10) == 0
    assert told.ids == ["r-1"]


async def test_written_through_is_in_the_file_itself(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    spool = a_spool(tmp_path)
    async with running(spool, counted, told) as writer:
        assert writer.offer(entries(1))
        await writer.write_through()
        assert (tmp_path / "usage.db-wal").stat().st_size == 0
        assert in_file(spool) == ["r-1"]


async def test_written_through_waits_for_whoever_reads(tmp_path: Path, counted: LedgerMetrics, told: Told) -> None:
    """While somebody reads an older state, the log cannot be folded into the file."""
    spool = a_spool(tmp_path)
    spool._db.execute("PRAGMA busy_timeout = 1")
    async with running(spool, counted, told) as writer:
        await writer.write(entries(1))
        with closing(sqlite3.connect(f"file:{spool.path}?mode=ro", uri=True, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM requests").fetchall()
            await writer.write(entries(2))
            writing = asyncio.create_task(writer.write_through())
            done, _ = await asyncio.wait([writing], timeout=0.1)
            assert not done
            reader.execute("ROLLBACK")
            await writing
        assert (tmp_path / "usage.db-wal").stat().st_size == 0


@pytest.mark.parametrize(
    "wrong",
    [Changes(marks={"m": object()}), entries(2), Changes(events=[an_event(created_at=float("inf"))])],  # type: ignore[dict-item]
    ids=["a mark that is no value", "an entry too large", "an event at no time"],
)
async def test_what_can_never_be_written_does_not_hold_up_the_others(
    tmp_path: Path, counted: LedgerMetrics, told: Told, wrong: Changes
) -> None:
    if wrong.entries:
        wrong = Changes(entries=[an_entry("r-2", started_us=2**70)])
    spool = SlowSpool(tmp_path / "usage.db")
    spool.may.clear()
    async with running(spool, counted, told) as writer:
        writer.insist(entries(0))
        for changes in (entries(1), wrong, entries(3)):  # written together
            writer.insist(changes)
        spool.may.set()
        await writer.write(Changes())
        assert told.ids == in_file(spool) == ["r-0", "r-1", "r-3"]
        await writer.write(Changes(entries=[an_entry("r-4"), *wrong.entries], events=[an_event("e-4"), *wrong.events]))
        assert told.ids == in_file(spool) == ["r-0", "r-1", "r-3", "r-4"]
        assert writer.held == 0
    assert value(counted.malformed) == 1 + bool(wrong.entries or wrong.events)
