"""Keys from a file of digests, held in memory and read again when the file changes."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Final

from extproc.keys.key_file import KeyFileInvalid, parse_key_file
from extproc.keys.record import KeyRecord, PresentedKey
from gateway.telemetry import Logger
from policies.model import Place, Problem

CHECK_INTERVAL_S: Final = 0.25
FILE_MAX_BYTES: Final = 64 * 1024 * 1024
SETTLED_AFTER_NS: Final = 100_000_000

_Seen = tuple[int, int, int] | None
"""Inode, size and modification time, or None for no file."""
_NEVER: Final = (-1, -1, -1)


class FileKeys:
    """Keys of one file. A lookup never touches the disk: ``watch`` swaps the table in one assignment.

    An edit that cannot be used, or a file that went away, leaves the last good keys in force.

    Raises:
        KeyFileInvalid: at the start there is no usable file.
    """

    name = "file"

    def __init__(self, path: Path, *, log: Logger) -> None:
        self._path = path
        self._log = log
        self._seen: _Seen = _NEVER  # the first check reads once more, for a change since this read
        self._text = _read(path)
        self._records = _table(self._text, path)

    def __len__(self) -> int:
        return len(self._records)

    def peek(self, key: PresentedKey) -> KeyRecord | None:
        """The key's record, or None when the file does not have it."""
        return self._records.get(key.digest)

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        """As ``peek``: the whole file is in memory."""
        return self._records.get(key.digest)

    async def watch(self, *, interval_s: float = CHECK_INTERVAL_S) -> None:
        """Follow the file until cancelled. Reading and parsing happen in a thread."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file again if it may have changed since it was last read."""
        seen = _look(self._path)
        if seen == self._seen:
            return
        try:
            text = _read(self._path)
            if _look(self._path) != seen:
                return  # being written: the next check reads it
            # A file changed just now may change again within the same tick of its clock: then read it once more.
            self._seen = seen if _settled(seen) else self._seen
            if text == self._text:
                return
            self._text = text
            self._records = _table(text, self._path)
        except KeyFileInvalid as error:
            if seen is None:
                self._seen, self._text = None, b""
            self._log.error("key_file_rejected", problems=[str(problem) for problem in error.problems])
        else:
            self._log.info("key_file_loaded", file=str(self._path), keys=len(self._records))


def _settled(seen: _Seen) -> bool:
    return seen is None or abs(time.time_ns() - seen[2]) > SETTLED_AFTER_NS


def _look(path: Path) -> _Seen:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > FILE_MAX_BYTES:
                raise _unusable(path, f"is larger than {FILE_MAX_BYTES} bytes")
            return file.read()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error


def _table(text: bytes, path: Path) -> dict[str, KeyRecord]:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise _unusable(path, "is not UTF-8", line=text.count(b"\n", 0, error.start) + 1) from None
    return {record.digest: record for record in parse_key_file(decoded, file=str(path))}


def _unusable(path: Path, text: str, *, line: int = 1) -> KeyFileInvalid:
    return KeyFileInvalid([Problem(place=Place(file=str(path), line=line), text=text)])
