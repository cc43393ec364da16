"""A damaged spool: what can be read is kept, and what cannot is found again in the journal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry import get_logger
from limits.model import Settlement
from tests.unit.usage.usage_builders import START_S, Told, an_entry, an_event, line_of, metrics
from usage.intake import Intake
from usage.journal_file import JournalFile, Position
from usage.salvage import Opened, committed_frames, keep_copy, mark_damaged, open_spool, take_over
from usage.spool import (
    ALLOWED_MARK,
    EVENTS_MARK,
    JOURNAL_MARK,
    RECORDS_MARK,
    RECOVERING_MARK,
    Changes,
    Refusal,
    Spool,
)
from usage.writer import Writer

LOG = get_logger()
FRAME_BYTES = 24 + 4096
REQUESTS = 120
AT_ONCE = 10


def rows(path: Path, table: str) -> list[tuple[Any, ...]]:
    """What another program reads of a file."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return list(db.execute(f"SELECT * FROM {table}"))


def request_ids(path: Path) -> set[str]:
    return {row[1] for row in rows(path, "requests")}


# --- A ledger that writes down what a journal tells, and dies.


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Files of a ledger that was killed after it had written down every line of its journal."""

    spool: Path
    journal: Path

    @property
    def wal(self) -> Path:
        return self.spool.with_name(self.spool.name + "-wal")


def told(number: int) -> Told:
    started_ns = (START_S + number) * 1_000_000_000
    return Told(request_id=f"r-{number}", started_ns=started_ns, usage={"tokens_output": number})


async def read_journal(opened: Opened, journal: Path) -> None:
    """What the ledger does after its start: everything that the journal has and the spool has not read."""
    spool = opened.spool
    writer = Writer(spool, written=lambda _: None, metrics=metrics(), log=LOG, group_s=0)
    intake = Intake(
        writer,
        tried_s=lambda: 2 * START_S,
        running=lambda _: None,
        metrics=metrics(),
        log=LOG,
        recovered=opened.damaged,
    )
    file = JournalFile(journal, Position.read(str(spool.mark(JOURNAL_MARK, ""))))
    running = asyncio.create_task(writer.run())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("usage.journal_file.READ_MAX_BYTES", AT_ONCE * len(line_of(told(REQUESTS))))
        while lines := file.read():
            position = file.position.written()
            await (await intake.take_journal(lines, position))
    await writer.write(Changes(marks={RECOVERING_MARK: 0}))
    running.cancel()
    writer.close()
    file.close()


@pytest.fixture
def killed(tmp_path: Path) -> Ledger:
    """Half of what it had written is in its file, the rest in the log."""
    at_work = tmp_path / "at work"
    at_work.mkdir()
    journal, path = tmp_path / "requests.jsonl", tmp_path / "usage.db"
    spool = Spool(at_work / "usage.db")

    async def work() -> None:
        for start in (0, REQUESTS // 2):
            with journal.open("ab") as file:
                file.writelines(line_of(told(start + number)) + b"\n" for number in range(REQUESTS // 2))
            await read_journal(Opened(spool=spool, damaged=False), journal)
            if not start:
                spool.checkpoint()

    asyncio.run(work())
    for part in ("usage.db", "usage.db-wal"):  # as a kill leaves them: nothing is folded into the file any more
        (tmp_path / part).write_bytes((at_work / part).read_bytes())
    spool.close()
    return Ledger(spool=path, journal=journal)


def everything_is_there(killed: Ledger) -> Opened:
    """Open what is left, read the journal, and find each request once with its settlement."""
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    asyncio.run(read_journal(opened, killed.journal))
    found = Counter(row[1] for row in rows(killed.spool, "requests"))
    assert found == Counter(f"r-{number}" for number in range(REQUESTS))
    settlements = [entry.settlement for entry in opened.spool.unsettled(most=10 * REQUESTS)]
    assert sum(s.tokens for s in settlements if isinstance(s, Settlement)) == sum(range(REQUESTS))
    opened.spool.close()
    return opened


def test_sound_spool_is_not_called_damaged(killed: Ledger) -> None:
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert not opened.damaged
    assert len(request_ids(killed.spool)) == REQUESTS
    opened.spool.close()


def test_new_spool_is_not_called_damaged(tmp_path: Path) -> None:
    opened = open_spool(tmp_path / "new" / "usage.db", journal=tmp_path / "new" / "requests.jsonl", log=LOG)
    assert not opened.damaged
    opened.spool.close()


# --- A cut tail.


def flip(path: Path, *offsets: int) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("frames", [1, 2, 5, 11])
@pytest.mark.parametrize("at", [16, 20, 24, 100, 4000], ids=["sum", "sum 2", "first byte", "in the page", "its end"])
def test_cut_tail_is_noticed_and_found_again(killed: Ledger, frames: int, at: int) -> None:
    size = killed.wal.stat().st_size
    flip(killed.wal, *(size - number * FRAME_BYTES + at for number in range(1, frames + 1)))
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert opened.damaged
    assert len(request_ids(killed.spool)) < REQUESTS
    opened.spool.close()
    everything_is_there(killed)


@pytest.mark.parametrize("frame", [0, 1, 5])
@pytest.mark.parametrize("at", [0, 8, 12, 16, 30], ids=["page number", "salt", "salt 2", "sum", "page"])
def test_damage_in_the_middle_of_the_log_is_noticed(killed: Ledger, frame: int, at: int) -> None:
    flip(killed.wal, 32 + frame * FRAME_BYTES + at)
    assert everything_is_there(killed).damaged


@pytest.mark.parametrize("at", [0, 8, 12, 16, 20, 24, 28], ids=str)
def test_log_whose_beginning_is_damaged_counts_for_nothing_and_is_noticed(killed: Ledger, at: int) -> None:
    flip(killed.wal, at)
    opened = everything_is_there(killed)
    assert opened.damaged


@pytest.mark.parametrize("bytes_left", [0, 1, 31, 32, 33, 32 + FRAME_BYTES, 32 + 3 * FRAME_BYTES + 7])
def test_log_that_was_cut_short_is_found_again(killed: Ledger, bytes_left: int) -> None:
    killed.wal.write_bytes(killed.wal.read_bytes()[:bytes_left])
    everything_is_there(killed)


def test_what_was_being_written_when_it_died_is_no_damage(killed: Ledger) -> None:
    """Frames without a commit behind them were never acknowledged."""
    content = killed.wal.read_bytes()
    last = content[-FRAME_BYTES:]
    killed.wal.write_bytes(content + last[:4] + bytes(4) + last[8:])
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert not opened.damaged
    opened.spool.close()


def test_what_a_log_has_of_an_earlier_time_is_no_damage(killed: Ledger) -> None:
    """A log begins anew over its old frames, whose salts are others."""
    content = bytearray(killed.wal.read_bytes())
    stale = content[-FRAME_BYTES:]
    stale[8:16] = b"\x01\x02\x03\x04\x05\x06\x07\x08"
    killed.wal.write_bytes(content + stale)
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert not opened.damaged
    opened.spool.close()


def test_frames_of_no_log_are_none(tmp_path: Path) -> None:
    assert committed_frames(tmp_path / "none-wal") == 0
    (tmp_path / "empty-wal").touch()
    assert committed_frames(tmp_path / "empty-wal") == 0


# --- A file that is none any more.


def test_file_overwritten_with_garbage_is_put_aside_and_found_again(killed: Ledger) -> None:
    killed.wal.unlink()
    garbage = random.Random(1).randbytes(killed.spool.stat().st_size)
    killed.spool.write_bytes(garbage)
    assert everything_is_there(killed).damaged
    aside = [path for path in killed.spool.parent.glob("usage.db.damaged-*") if "-wal" not in path.name]
    assert [path.read_bytes() for path in aside if "-shm" not in path.name] == [garbage]


@pytest.mark.parametrize("page", range(1, 40, 3))
def test_garbage_in_the_middle_is_found_again(killed: Ledger, page: int) -> None:
    size = killed.spool.stat().st_size
    offset = page * 4096 % (size - 4096)
    with killed.spool.open("r+b") as file:
        file.seek(offset)
        file.write(random.Random(page).randbytes(4096))
    everything_is_there(killed)


def test_nothing_that_can_still_be_read_is_given_up(killed: Ledger) -> None:
    killed.journal.unlink()
    spoil(killed)
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert opened.damaged
    assert len(request_ids(killed.spool)) == REQUESTS
    opened.spool.close()


@pytest.mark.parametrize("bytes_left", [0, 1, 100, 4096, 8192])
def test_file_that_was_cut_short_is_found_again(killed: Ledger, bytes_left: int) -> None:
    killed.wal.unlink()
    killed.spool.write_bytes(killed.spool.read_bytes()[:bytes_left])
    everything_is_there(killed)


# --- Replacing it, interrupted or not.


def spoil(killed: Ledger) -> None:
    with closing(sqlite3.connect(killed.spool)) as db:
        [(page,)] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'events'")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with killed.spool.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xa5" * 4096)


def test_spool_that_was_found_damaged_at_work_is_replaced_however_sound_it_looks(killed: Ledger) -> None:
    mark_damaged(killed.spool)
    assert everything_is_there(killed).damaged
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert not opened.damaged
    opened.spool.close()


@pytest.mark.parametrize("renamed", range(5))
def test_start_that_was_killed_while_it_replaced_the_spool_is_finished_by_the_next(
    killed: Ledger, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    spoil(killed)
    killed.journal.unlink()  # so that nothing can come from elsewhere
    rename, left = Path.rename, iter(range(renamed))

    def kill(path: Path, to: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with contextlib.suppress(KeyboardInterrupt):
            open_spool(killed.spool, journal=killed.journal, log=LOG).spool.close()
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    opened.spool.close()
    assert len(request_ids(killed.spool)) == REQUESTS
    assert not list(killed.spool.parent.glob("*.making*"))
    assert not list(killed.spool.parent.glob("*.taken-over*"))


def test_start_is_one_after_damage_until_the_journal_was_read(killed: Ledger) -> None:
    """Until then the limit store may know of requests that the spool does not."""
    killed.spool.unlink()
    killed.wal.unlink()
    for _ in range(2):
        opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
        assert opened.damaged
        opened.spool.close()
    assert everything_is_there(killed).damaged
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert not opened.damaged
    opened.spool.close()


def test_everything_is_kept_of_a_file_that_was_removed_while_it_was_open(killed: Ledger) -> None:
    spool = open_spool(killed.spool, journal=killed.journal, log=LOG).spool
    assert not spool.is_gone()
    killed.spool.unlink()
    assert spool.is_gone()
    killed.spool.write_bytes(b"another")
    assert spool.is_gone()
    killed.journal.unlink()  # so that nothing can come from elsewhere
    keep_copy(spool)
    spool.close()
    opened = open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert opened.damaged
    assert len(request_ids(killed.spool)) == REQUESTS
    assert not opened.spool.is_gone()
    opened.spool.close()


def test_spool_stays_where_it_is_while_there_is_no_room_to_take_it_over(
    killed: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(killed)

    def full(*_: object) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("usage.salvage.take_over", full)
        with pytest.raises(sqlite3.OperationalError, match="full"):
            open_spool(killed.spool, journal=killed.journal, log=LOG)
    with monkeypatch.context() as patch:
        patch.setattr("usage.salvage.RESERVE_BYTES", 2**60)
        with pytest.raises(OSError, match="bytes are needed to make it whole"):
            open_spool(killed.spool, journal=killed.journal, log=LOG)
    assert [path.name for path in killed.spool.parent.glob("usage.db.*")] == []  # Envoy needs the room
    assert everything_is_there(killed).damaged


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("mb", range(3, 12))
def test_disk_that_has_no_room_for_the_new_one_never_costs_the_old_one(tmp_path: Path, mb: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        path, count = disk / "usage.db", 1000
        spool = Spool(path)
        for start in range(0, count, 100):
            spool.write(Changes(entries=[an_entry(f"r-{start + n}", told=json.dumps("x" * 3000)) for n in range(100)]))
        spool.close()
        mark_damaged(path)
        room = subprocess.run(["mount", "-o", f"remount,size={mb}m", disk], check=False, stderr=subprocess.DEVNULL)
        with contextlib.suppress(sqlite3.Error, OSError):
            open_spool(path, journal=disk / "requests.jsonl", log=LOG).spool.close()
        assert room.returncode == 0 or mb * 1024 * 1024 < 5_000_000
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        open_spool(path, journal=disk / "requests.jsonl", log=LOG).spool.close()
        assert len(request_ids(path)) == count
    finally:
        subprocess.run(["umount", disk], check=True)


def test_refusal_of_what_is_not_there_any_more_is_forgotten(other: Spool, fresh: Spool) -> None:
    gone = Refusal(stream=RECORDS_MARK, place=2, reason="NO")
    other.write(Changes(entries=[an_entry("r-1"), an_entry("r-2")], events=[an_event()]))
    other.write(Changes(refused=[replace(gone, place=1), gone, Refusal(stream=EVENTS_MARK, place=1, reason="NO")]))
    with closing(sqlite3.connect(other.path, isolation_level=None)) as db:
        db.execute("DELETE FROM requests WHERE seq = 2")
    take_over(fresh.path, other.path)
    assert sorted(row[:2] for row in rows(fresh.path, "refused")) == [(EVENTS_MARK, 1), (RECORDS_MARK, 1)]
    fresh.write(Changes(refused=[gone]))
    assert len(rows(fresh.path, "refused")) == 2


# --- Taking over from another file.


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "other.db")
    yield opened
    opened.close()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "usage.db")
    yield opened
    opened.close()


def test_everything_of_a_sound_file_is_taken_over(other: Spool, fresh: Spool) -> None:
    entries = [an_entry(f"r-{number}") for number in range(5)]
    changes = Changes(entries=entries, events=[an_event()], settled=entries[:2], marks={RECORDS_MARK: 3})
    changes.policies = [("0a", "{}")]
    other.write(changes)
    tables = ("requests", "events", "attempts", "policies", "marks")
    before = {table: rows(other.path, table) for table in tables}
    assert take_over(fresh.path, other.path) > 0
    assert {table: rows(fresh.path, table) for table in tables} == before
    assert [entry.request_id for entry in fresh.unsettled(most=9)] == ["r-2", "r-3", "r-4"]
    assert take_over(fresh.path, other.path) == 0


def test_journal_is_read_again_after_a_file_was_taken_over(other: Spool, fresh: Spool) -> None:
    """What could not be read of the file is found there, so nothing may say that it has been."""
    other.write(Changes(marks={"journal": "70:8", RECORDS_MARK: 1}))
    take_over(fresh.path, other.path)
    assert fresh.mark("journal", "") == ""
    assert fresh.mark(RECORDS_MARK, 0) == 1


@pytest.mark.parametrize("mark", [RECORDS_MARK, ALLOWED_MARK])
def test_what_is_written_after_a_file_was_taken_over_is_handed_on(other: Spool, fresh: Spool, mark: str) -> None:
    """Places up to a mark count as handed on, though the rows that had them are gone."""
    other.write(Changes(entries=[an_entry("r-0")], marks={mark: 41, EVENTS_MARK: 17}))
    take_over(fresh.path, other.path)
    fresh.write(Changes(entries=[an_entry("r-1")], events=[an_event()]))
    assert [row[0] for row in rows(fresh.path, "requests")] == [1, 42]
    assert [row[0] for row in rows(fresh.path, "events")] == [18]
