"""What Envoy tells twice is taken once, whichever way comes first, and counted once."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import names
from gateway.telemetry import get_logger
from tests.unit.usage.usage_builders import (
    SAID,
    START_S,
    Told,
    a_running,
    a_spool,
    an_entry,
    line_of,
    message_of,
    metrics,
    until,
    value,
)
from usage.access_log import Batch, Running, decode
from usage.intake import Intake
from usage.metrics import LedgerMetrics
from usage.spool import Changes, Spool
from usage.writer import Writer


class Ledger:
    """An intake, and what it has written down."""

    def __init__(self, spool: Spool, *, entries_max: int, known_max: int, recovered: bool) -> None:
        self.counted: LedgerMetrics = metrics()
        self.fresh: list[str] = []
        self.running: list[Running] = []
        self.tried_s: int | None = 5
        self.spool = spool
        self.writer = Writer(
            spool, written=self._written, metrics=self.counted, log=get_logger(), entries_max=entries_max, group_s=0
        )
        self.intake = Intake(
            self.writer,
            tried_s=lambda: self.tried_s,
            running=self.running.extend,
            metrics=self.counted,
            log=get_logger(),
            recovered=recovered,
            known_max=known_max,
        )

    def _written(self, entries: Sequence[Any]) -> None:
        self.fresh += [entry.request_id for entry in entries]

    async def hear(self, *told: Told) -> None:
        """By gRPC."""
        self.intake.receive(decode(message_of(*told), told[0].listener))
        assert await self.writer.drain(10) == 0

    async def read(self, *told: Told | bytes) -> None:
        """In the journal."""
        lines = [each if isinstance(each, bytes) else line_of(each) for each in told]
        await (await self.intake.take_journal(lines, "1:2"))

    def rows(self, columns: str, table: str = "requests") -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.spool.path}?mode=ro", uri=True)) as db:
            return list(db.execute(f"SELECT {columns} FROM {table} ORDER BY 1"))

    @property
    def tallies(self) -> dict[str, int]:
        return dict(self.rows("kind, requests", "tallies"))

    @property
    def counts(self) -> int:
        return sum(requests for [requests] in self.rows("requests", "ended"))


@asynccontextmanager
async def running(
    directory: Path, *, entries_max: int = 1000, known_max: int = 1000, recovered: bool = False
) -> AsyncIterator[Ledger]:
    spool = a_spool(directory)
    ledger = Ledger(spool, entries_max=entries_max, known_max=known_max, recovered=recovered)
    task = asyncio.create_task(ledger.writer.run())
    try:
        yield ledger
    finally:
        task.cancel()
        await asyncio.wait([task])
        ledger.writer.close()
        spool.close()


def told(number: int = 1, **changes: Any) -> Told:
    return Told(request_id=f"r-{number}", **changes)


LIMITED = {**SAID, names.METADATA_REASON: "RATE_LIMIT_EXCEEDED", names.METADATA_CLOSED: True}
NOBODY: dict[str, Any] = {}
FAILED = {"listener": names.LISTENER_BACKENDS, "cluster": "bk_a", "status": 500}

# --- Once, whichever comes first.


@pytest.mark.parametrize("first", ["hear", "read"])
@pytest.mark.parametrize("again", ["hear", "read"])
async def test_request_is_taken_once_whichever_comes_first(tmp_path: Path, first: str, again: str) -> None:
    async with running(tmp_path) as ledger:
        await getattr(ledger, first)(told())
        await getattr(ledger, again)(told())
        assert ledger.fresh == ["r-1"]
        assert ledger.rows("request_id") == [("r-1",)]


@pytest.mark.parametrize("order", ["hear read", "read hear", "hear read hear read"])
async def test_what_was_told_both_ways_is_not_remembered(tmp_path: Path, order: str) -> None:
    async with running(tmp_path) as ledger:
        for way in order.split():
            assert ledger.intake.remembered in {0, 1}
            await getattr(ledger, way)(told())
        assert ledger.intake.remembered == 0


@pytest.mark.parametrize("way", ["hear", "read"])
async def test_both_ways_write_the_same(tmp_path: Path, way: str) -> None:
    told_of = told(usage={"tokens_input": 7, "tokens_output": 9}, flags=("DC",), path='/"é')
    async with running(tmp_path) as ledger:
        await getattr(ledger, way)(told_of)
        [(record, seen, settlement, tried_s)] = ledger.rows("record, told, settlement, tried_s")
    assert json.loads(record)["tokens_output"] == 9
    assert json.loads(seen)["path"] == '/"é'
    assert json.loads(settlement)[0] == 16
    assert tried_s == 5


@given(st.lists(st.tuples(st.sampled_from(["hear", "read"]), st.integers(0, 5)), max_size=20))
def test_every_request_is_written_and_counted_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    told_of = {number for _, number in steps}

    async def work() -> None:
        async with running(tmp_path_factory.mktemp("spool"), known_max=2) as ledger:
            lines: set[int] = set()
            for way, number in steps:
                if way == "hear":
                    await ledger.hear(told(number))
                elif number not in lines:  # a line is read once
                    lines.add(number)
                    await ledger.read(told(number))
            assert sorted(ledger.fresh) == sorted({f"r-{number}" for _, number in steps})
            assert sum(ledger.tallies.values()) == len(told_of) == ledger.counts

    asyncio.run(work())


async def test_what_the_queue_has_no_room_for_comes_by_the_journal(tmp_path: Path) -> None:
    async with running(tmp_path, entries_max=2) as ledger:
        ledger.intake.receive(decode(message_of(told(1), told(2), told(3))))
        assert value(ledger.counted.dropped) == 3
        assert ledger.writer.held == 0
        await ledger.read(told(1), told(2), told(3))
        await until(lambda: ledger.fresh == ["r-1", "r-2", "r-3"])
        assert ledger.tallies == {"forwarded": 3}


async def test_more_than_is_remembered_is_taken_from_the_journal_again_and_counted_once(tmp_path: Path) -> None:
    async with running(tmp_path, known_max=1) as ledger:
        await ledger.hear(told(1), told(2), told(3))
        await ledger.read(told(1), told(2), told(3))
        assert ledger.fresh == ["r-1", "r-2", "r-3"]
        assert ledger.tallies == {"forwarded": 3}


# --- What is counted.


async def test_requests_are_counted_by_kind_and_those_of_nobody_by_the_journal(tmp_path: Path) -> None:
    requests = [told(1), told(2, said=LIMITED), told(3, said=NOBODY), told(4, said=NOBODY)]
    async with running(tmp_path) as ledger:
        await ledger.hear(*requests)
        assert ledger.tallies == {"forwarded": 1, "limited": 1}
        await ledger.read(*requests)
        assert ledger.tallies == {"forwarded": 1, "limited": 1, "anonymous": 2}
        assert ledger.counts == 4
        assert ledger.rows("request_id") == [("r-1",), ("r-2",)]


async def test_what_the_journal_will_not_tell_of_is_counted_all_the_same(tmp_path: Path) -> None:
    """Envoy could not write, or has died before it did."""
    async with running(tmp_path) as ledger:
        await ledger.hear(told(1), told(2, said=NOBODY), told(3, said=NOBODY, started_ns=2 * START_S * 10**9))
        ended_us = told(2).started_ns // 1000 + 1000 * told(2).duration_ms
        ledger.intake.forget(ended_us)
        assert ledger.intake.remembered == 3
        ledger.intake.forget(ended_us + 1)
        assert ledger.intake.remembered == 1
        assert await ledger.writer.drain(10) == 0
        assert ledger.tallies == {"forwarded": 1, "anonymous": 1}
        assert ledger.counts == 2


async def test_estimate_is_counted_once_its_end_is_told(tmp_path: Path) -> None:
    async with running(tmp_path) as ledger:
        await ledger.writer.write(Changes(entries=[an_entry("r-1", revision=0)]))
        assert (ledger.tallies, ledger.counts) == ({}, 0)
        await ledger.read(told(1))
        assert (ledger.tallies, ledger.counts) == ({"forwarded": 1}, 1)


async def test_place_in_the_journal_is_written_with_what_was_read(tmp_path: Path) -> None:
    async with running(tmp_path) as ledger:
        await (await ledger.intake.take_journal([line_of(told())], "77:5"))
        assert dict(ledger.rows("name, value", "marks"))["journal"] == "77:5"


# --- Attempts, signs of life, what cannot be used.


@pytest.mark.parametrize("way", ["hear", "read"])
async def test_failed_attempts_are_kept_once_and_not_counted(tmp_path: Path, way: str) -> None:
    async with running(tmp_path) as ledger:
        for _ in range(2):
            await getattr(ledger, way)(told(**FAILED), told(**FAILED | {"cluster": "bk_b"}))
        assert ledger.rows("backend, status", "attempts") == [("a", 500), ("b", 500)]
        assert (ledger.tallies, ledger.counts, ledger.fresh) == ({}, 0, [])


async def test_attempt_does_not_stand_for_its_request(tmp_path: Path) -> None:
    async with running(tmp_path) as ledger:
        await ledger.hear(told(1))
        await ledger.read(told(1, **FAILED), told(1))
        assert ledger.tallies == {"forwarded": 1}
        assert len(ledger.rows("*", "attempts")) == 1


async def test_signs_of_life_are_passed_on_and_not_written(tmp_path: Path) -> None:
    async with running(tmp_path) as ledger:
        await ledger.hear(told(1, periodic=True), told(2, periodic=True, said=NOBODY))
        assert ledger.running == [a_running("r-1")]
        assert ledger.rows("*") == []


BAD = {**SAID, names.METADATA_PRICES: "garbage"}


@pytest.mark.parametrize("way", ["hear", "read"])
async def test_what_cannot_be_used_is_told_and_does_not_stop_the_others(tmp_path: Path, way: str) -> None:
    async with running(tmp_path) as ledger:
        await getattr(ledger, way)(told(1), told(2, said=BAD), Told(request_id=""), told(3))
        assert ledger.fresh == ["r-1", "r-3"]
        assert value(ledger.counted.malformed) == 2


async def test_lines_that_are_none_are_told(tmp_path: Path) -> None:
    async with running(tmp_path) as ledger:
        await ledger.read(b"", b"{", b"\xff", b"null", b'{"request_id":"r-9"}', told(1))
        assert ledger.fresh == ["r-1"]
        assert value(ledger.counted.malformed) == 5


async def test_bytes_that_are_no_message_are_told(tmp_path: Path) -> None:
    async with running(tmp_path) as ledger:
        ledger.intake.receive(Batch(malformed=("not a message",)))
        assert value(ledger.counted.malformed) == 1


# --- When the limit store may know.


async def test_limit_store_knows_nothing_of_what_is_written_while_it_is_down(tmp_path: Path) -> None:
    async with running(tmp_path) as ledger:
        ledger.tried_s = None
        await ledger.hear(told(1))
        await ledger.read(told(2))
        assert ledger.rows("tried_s") == [(None,), (None,)]


async def test_limit_store_may_know_since_its_end_of_what_a_damaged_spool_has_lost(tmp_path: Path) -> None:
    async with running(tmp_path, recovered=True) as ledger:
        await ledger.read(told(1, duration_ms=2500))
        await ledger.hear(told(2))
        assert ledger.rows("tried_s") == [(5,), (START_S + 2,)]
