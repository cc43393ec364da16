"""Opens the spool, damaged or not: what can be read is kept, and what cannot is found again in the journal."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.telemetry import Logger
from usage.schema import TABLES
from usage.spool import (
    ALLOWED_MARK,
    AUDIT_MARK,
    ENDED_MARK,
    EVENTS_MARK,
    JOURNAL_MARK,
    RECORDS_MARK,
    RECOVERING_MARK,
    Changes,
    Spool,
)

CHECKED_MAX_BYTES: Final = 256 * 1024 * 1024
"""A larger file is not looked through at the start; what is damaged in it shows when it is read."""
MARKER: Final = ".damaged"
"""Suffix of an empty file: the spool beside it was found damaged by somebody who used it."""
TAKEN_OVER: Final = ".taken-over"
"""Suffix of a new spool that has all that can be had, and only has to be put in the old one's place."""
RECOVERING: Final = Changes(marks={RECOVERING_MARK: 1})
_PARTS: Final = ("", "-wal", "-shm")
RESERVE_BYTES: Final = 4 * 1024 * 1024
"""Left free when a spool is made whole: what Envoy's journal takes meanwhile."""
_HEADER_BYTES: Final = 32
_FRAME_HEADER_BYTES: Final = 24
_PAGE_BYTES: Final = 4096
_MAGIC: Final = 0x377F0683
"""Of a log whose checksums are big-endian; one less where they are little-endian."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The spool. ``damaged``: it is not what was written, so others may know more, until the journal has been read."""

    spool: Spool
    damaged: bool


def open_spool(path: Path, *, journal: Path, log: Logger) -> Opened:
    """Open or create the spool; a file that is no database any more is put aside, and its readable rows taken over.

    A spool that is not there while Envoy has written a journal has been lost, as far as anybody can tell.

    Raises:
        sqlite3.OperationalError: the directory cannot be written.
        OSError: that, or there is no room to make the spool whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    spool = _opened(path, journal, log)
    return Opened(spool=spool, damaged=bool(spool.mark(RECOVERING_MARK, 0)))


def _opened(path: Path, journal: Path, log: Logger) -> Spool:
    if _beside(path, TAKEN_OVER).exists():  # a start before this one did not come to its end
        return _put_in_place(path, log)
    if not _bytes_of(path) and (_bytes_of(journal) or _bytes_of(_beside(journal, ".old"))):
        log.warning("spool_missing", path=str(path), meaning="everything in the journal is taken again")
        return _replaced(path, log)
    if _beside(path, MARKER).exists():
        return _replaced(path, log)
    committed = committed_frames(_beside(path, "-wal"))
    try:
        spool, frames = _sound(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        log.error("spool_damaged", error=str(error), path=str(path))  # noqa: TRY400 - of interest is the file
        return _replaced(path, log)
    if committed > frames:
        log.error("spool_tail_cut", frames_lost=committed - frames, meaning="they are read from the journal again")
        spool.write(RECOVERING)
    return spool


def keep_copy(spool: Spool) -> None:
    """Have the next start begin with what an open spool has whose file was removed.

    Raises:
        sqlite3.Error: it cannot be read.
        OSError: there is no room.
    """
    making = _made_room(spool.path, spool.size_bytes)
    spool.write(RECOVERING)
    try:
        spool.copy_to(making)
    except BaseException:
        _clear(making)  # Envoy needs the room for its journal
        raise
    making.rename(_beside(spool.path, TAKEN_OVER))


def mark_damaged(path: Path) -> None:
    """Have whoever opens the spool next replace it, however sound it looks.

    Raises:
        OSError: the directory cannot be written.
    """
    _beside(path, MARKER).touch()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sound(path: Path) -> tuple[Spool, int]:
    """The spool, and how many frames of its log count."""
    spool = Spool(path)
    frames = spool.frames()
    if path.stat().st_size <= CHECKED_MAX_BYTES and not spool.is_sound():
        spool.close()
        raise sqlite3.DatabaseError("its check has failed")
    return spool, frames


def _replaced(path: Path, log: Logger) -> Spool:
    """Take over what can be read into a new file. Killed at any moment, the next start has it to do, or has it done."""
    making = _made_room(path, _bytes_of(path) + _bytes_of(_beside(path, "-wal")))
    try:
        with closing(Spool(making)) as fresh:
            fresh.write(RECOVERING)
        with closing(sqlite3.connect(making, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = DELETE")  # with a log it would need twice the room, and not be one file
        if _bytes_of(path):
            _take_what_can_be_read(making, path, log)
    except BaseException:
        _clear(making)
        raise
    making.rename(_beside(path, TAKEN_OVER))
    return _put_in_place(path, log)


def _take_what_can_be_read(making: Path, path: Path, log: Logger) -> None:
    try:
        log.warning("spool_taken_over", path=str(path), rows=take_over(making, path))
    except sqlite3.OperationalError:
        raise  # there is no room, say: nothing is given up for that
    except sqlite3.DatabaseError:
        log.exception("spool_unreadable", path=str(path))


def _made_room(path: Path, needed_bytes: int) -> Path:
    """Where a new spool is made, with nothing there.

    Raises:
        OSError: there is no room for so much.
    """
    making = _beside(path, ".making")
    _clear(making)
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < needed_bytes + RESERVE_BYTES:
        needed = f"{needed_bytes + RESERVE_BYTES:,} bytes are needed to make it whole, {free_bytes:,} are free"
        raise OSError(errno.ENOSPC, needed, str(path))
    return making


def _clear(making: Path) -> None:
    for suffix in (*_PARTS, "-journal"):
        _beside(making, suffix).unlink(missing_ok=True)


def _put_in_place(path: Path, log: Logger) -> Spool:
    aside = _beside(path, f"{MARKER}-{time.time_ns() // 1_000_000}")
    for suffix in _PARTS:
        if _beside(path, suffix).exists():
            _beside(path, suffix).rename(_beside(aside, suffix))
    _beside(path, TAKEN_OVER).rename(path)
    _beside(path, MARKER).unlink(missing_ok=True)
    log.warning("spool_replaced", path=str(path), aside=str(aside) if aside.exists() else None)
    return Spool(path)


def take_over(path: Path, damaged: Path) -> int:
    """Copy into a fresh spool what can still be read of a damaged one; how many rows.

    The rest is in the journal, so that is read anew.
    """
    uri = f"file:{damaged}?mode=ro"
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as fresh,
        closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as other,
    ):
        other.text_factory = lambda text: text.decode(errors="replace")
        fresh.execute("BEGIN IMMEDIATE")
        # From both ends up to the damage.
        copied = sum(
            _copy(other, fresh, table, f"{key} {order}") for table, key in TABLES.items() for order in ("ASC", "DESC")
        )
        # Journal and audit trail are read again; of what Envoy has counted nobody knows any more how much was known.
        fresh.execute("DELETE FROM marks WHERE name IN (?, ?, ?)", (JOURNAL_MARK, AUDIT_MARK, ENDED_MARK))
        fresh.execute(
            "DELETE FROM refused WHERE stream <> ? AND place NOT IN (SELECT seq FROM requests)", (EVENTS_MARK,)
        )
        fresh.execute("DELETE FROM refused WHERE stream = ? AND place NOT IN (SELECT seq FROM events)", (EVENTS_MARK,))
        _begin_after(fresh, "requests", RECORDS_MARK, ALLOWED_MARK)
        _begin_after(fresh, "events", EVENTS_MARK)
        fresh.execute("COMMIT")
    return copied


def _copy(other: sqlite3.Connection, fresh: sqlite3.Connection, table: str, order: str) -> int:
    copied = 0
    for row in _readable(other, f"SELECT * FROM {table} ORDER BY {order}"):  # noqa: S608 - names of ours
        marks = ", ".join("?" * len(row))
        if not fresh.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row).rowcount:  # noqa: S608
            break  # the other end has come as far as this
        copied += 1
    return copied


def _readable(db: sqlite3.Connection, query: str) -> Iterator[tuple[Any, ...]]:
    """Rows up to the damage."""
    try:
        yield from db.execute(query)
    except sqlite3.DatabaseError:
        return


def _begin_after(fresh: sqlite3.Connection, table: str, *marks: str) -> None:
    """Whatever comes has a later place than any mark: up to a mark everything counts as handed on."""
    fresh.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
    fresh.execute(
        f"INSERT INTO sqlite_sequence SELECT ?, max((SELECT coalesce(max(seq), 0) FROM {table}),"  # noqa: S608
        f" (SELECT coalesce(max(value), 0) FROM marks WHERE name IN ({', '.join('?' * len(marks))})))",
        (table, *marks),
    )


def committed_frames(wal: Path) -> int:
    """How many frames the log has, up to its last commit, by their headers. SQLite docs: "WAL-mode File Format".

    What SQLite itself counts ends at the first frame that is not as it was written.
    """
    try:
        size = wal.stat().st_size - _HEADER_BYTES
        with wal.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            if size <= 0:
                return 0
            if not _is_as_written(header):
                return -(-size // (_FRAME_HEADER_BYTES + _PAGE_BYTES))
            page_size, salts = struct.unpack(">8xI4x8s8x", header)
            last = 0
            for frame in range(size // (_FRAME_HEADER_BYTES + page_size)):
                file.seek(_HEADER_BYTES + frame * (_FRAME_HEADER_BYTES + page_size))
                pages_after, frame_salts = struct.unpack(">4xI8s8x", file.read(_FRAME_HEADER_BYTES))
                # Of other salts are frames of an earlier time, and one that is damaged: then others follow.
                if frame_salts == salts and pages_after:
                    last = frame + 1
            return last
    except FileNotFoundError:
        return 0


def _is_as_written(header: bytes) -> bool:
    """Whether a log's header has the checksum that it says."""
    [magic] = struct.unpack(">I", header[:4])
    words = struct.unpack(f"{'>' if magic & 1 else '<'}6I", header[:24])
    one = other = 0
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + other) & 0xFFFFFFFF
        other = (other + second + one) & 0xFFFFFFFF
    return magic | 1 == _MAGIC and (one, other) == struct.unpack(">2I", header[24:])
