"""Opens the spool, damaged or not: what can be read is kept, and what cannot is found again in the journal."""

from __future__ import annotations

import sqlite3
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.telemetry import Logger
from usage.spool import Spool

CHECKED_MAX_BYTES: Final = 256 * 1024 * 1024
"""A larger file is not looked through at the start; what is damaged in it shows when it is read."""
_HEADER_BYTES: Final = 32
_FRAME_HEADER_BYTES: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The spool. ``damaged``: it is not what was written, so others may know more than it does."""

    spool: Spool
    damaged: bool


def open_spool(path: Path, *, log: Logger) -> Opened:
    """Open or create the spool; a file that is no database any more is put aside, and its readable rows taken over.

    Raises:
        sqlite3.OperationalError: the directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    committed = committed_frames(path.with_name(path.name + "-wal"))
    try:
        spool, frames = _sound(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return Opened(spool=_replaced(path, error, log), damaged=True)
    if committed > frames:
        log.error("spool_tail_cut", frames_lost=committed - frames, meaning="they are read from the journal again")
    return Opened(spool=spool, damaged=committed > frames)


def _sound(path: Path) -> tuple[Spool, int]:
    """The spool, and how many frames of its log count."""
    spool = Spool(path)
    frames = spool.frames()
    if path.stat().st_size <= CHECKED_MAX_BYTES and not spool.is_sound():
        spool.close()
        raise sqlite3.DatabaseError("its check has failed")
    return spool, frames


def _replaced(path: Path, error: sqlite3.DatabaseError, log: Logger) -> Spool:
    aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    spool = Spool(path)
    rows = 0
    try:
        rows = spool.take_over(aside)
    except sqlite3.DatabaseError:
        log.exception("spool_unreadable", aside=str(aside))
    log.error("spool_damaged", error=str(error), aside=str(aside), rows_kept=rows)
    return spool


def committed_frames(wal: Path) -> int:
    """How many frames the log has, up to its last commit, by their headers. SQLite docs: "WAL-mode File Format"."""
    try:
        size = wal.stat().st_size
        with wal.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            if len(header) < _HEADER_BYTES:
                return 0
            page_size, salts = struct.unpack(">8xI4x8s8x", header)
            last = 0
            for frame in range((size - _HEADER_BYTES) // (_FRAME_HEADER_BYTES + page_size)):
                file.seek(_HEADER_BYTES + frame * (_FRAME_HEADER_BYTES + page_size))
                pages_after, frame_salts = struct.unpack(">4xI8s8x", file.read(_FRAME_HEADER_BYTES))
                if frame_salts != salts:
                    break
                if pages_after:
                    last = frame + 1
            return last
    except FileNotFoundError:
        return 0
