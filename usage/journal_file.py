"""The journal as a file: read from where one left off, over rotations and restarts. Envoy writes it, and never waits.

A position is an offset in the file that begins with certain bytes. The ledger rotates: it renames the file, Envoy
opens a new one when told to, and what is in the old one is read to its end first.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

READ_MAX_BYTES: Final = 256 * 1024
ROTATED_BYTES: Final = 64 * 1024 * 1024
HEAD_BYTES: Final = 512
LINE_MAX_BYTES: Final = 1024 * 1024
"""No request's line is longer; what is longer is skipped up to the next line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a file has been read. ``head`` is the checksum of its first bytes, by which it is known again."""

    offset: int = 0
    head: int = 0

    def written(self) -> str:
        """As text."""
        return f"{self.offset}:{self.head}"

    @classmethod
    def read(cls, text: str) -> Position:
        """What :meth:`written` has put down."""
        offset, _, head = text.partition(":")
        return cls(offset=int(offset or 0), head=int(head or 0))


class JournalFile:
    """See above. A file that is not there yet is empty. Methods raise OSError where the file system fails."""

    def __init__(self, path: Path, position: Position, *, rotated_bytes: int = ROTATED_BYTES) -> None:
        self._path = path
        self._old = path.with_name(path.name + ".old")
        self._position = position
        self._rotated_bytes = rotated_bytes
        self._file: BinaryIO | None = None
        self._reads_old = False

    @property
    def position(self) -> Position:
        """Up to here lines have been returned."""
        return self._position

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> list[bytes]:
        """The next whole lines; none where Envoy has not written more."""
        while self._file is not None or self._open():
            # Looked for before reading: once Envoy has another file, it writes no more to this one.
            left = self._is_left()
            data = self._data()
            whole = data.rfind(b"\n") + 1
            if not whole and len(data) == LINE_MAX_BYTES:
                whole = len(data)
            if whole:
                self._advance(whole)
                return data[:whole].splitlines()
            if not left:
                return []
            self._next()
        return []

    def _data(self) -> bytes:
        """What comes next, at least one line if there is a whole one."""
        assert self._file is not None  # noqa: S101 - whoever reads has opened it
        self._file.seek(self._position.offset)
        data = self._file.read(READ_MAX_BYTES)
        if len(data) == READ_MAX_BYTES and b"\n" not in data:
            data += self._file.read(LINE_MAX_BYTES - READ_MAX_BYTES)
        return data

    def _is_left(self) -> bool:
        """Whether Envoy writes elsewhere by now: to a new file, or anew to one that somebody has emptied."""
        assert self._file is not None  # noqa: S101 - whoever reads has opened it
        here = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        return not os.path.samestat(here, there) or here.st_size < self._position.offset

    @property
    def unread_bytes(self) -> int:
        """What is there and has not been returned."""
        there = -self._position.offset
        for path in (self._old, self._path) if self._reads_old else (self._path,):
            with contextlib.suppress(FileNotFoundError):
                there += path.stat().st_size
        return max(0, there)

    @property
    def is_large(self) -> bool:
        """Whether it is time to rotate."""
        return not self._reads_old and self._position.offset >= self._rotated_bytes and not self._old.exists()

    def rotate(self) -> None:
        """Put the file aside; Envoy is to be told to open a new one."""
        self._path.rename(self._old)
        self._reads_old = True

    @property
    def is_aside(self) -> bool:
        """Whether the file has been put aside and Envoy has not opened a new one."""
        return self._reads_old and not self._path.exists()

    def forget_old(self) -> None:
        """Remove a file that has been read to its end: everything in it is safe elsewhere."""
        if not self._reads_old:
            self._old.unlink(missing_ok=True)

    @property
    def has_old(self) -> bool:
        """Whether a file that has been read to its end is still there."""
        return not self._reads_old and self._old.exists()

    def _advance(self, more: int) -> None:
        offset, head = self._position.offset + more, self._position.head
        if self._position.offset < HEAD_BYTES:
            head = _head(self._file, offset)
        self._position = Position(offset=offset, head=head)

    def _open(self) -> bool:
        """Open the file that the position is in; where that is gone, the oldest there is."""
        opened: list[tuple[Path, BinaryIO]] = []
        for path in (self._old, self._path):
            with contextlib.suppress(FileNotFoundError):
                opened.append((path, path.open("rb", buffering=0)))
        if not opened:
            return False
        at = self._position
        known = [one for one in opened if at.offset and _head(one[1], at.offset) == at.head]
        path, self._file = (known or opened)[0]
        if not known:
            self._position = Position()
        self._reads_old = path == self._old
        for _, other in opened:
            if other is not self._file:
                other.close()
        return True

    def _next(self) -> None:
        """This file has been read to its end: go on with the new one."""
        self.close()
        self._reads_old = False
        self._position = Position()
        self._file = self._path.open("rb", buffering=0)


def _head(file: BinaryIO | None, offset: int) -> int:
    """Checksum of the first bytes of a file; 0 where it is shorter than ``offset``."""
    if file is None or os.fstat(file.fileno()).st_size < offset:
        return 0
    file.seek(0)
    return zlib.crc32(file.read(min(offset, HEAD_BYTES)))
