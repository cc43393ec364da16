"""Files as the outlet, where there is no Kafka: per topic one append-only file for each UTC hour of delivery.

``usage.records.v1/2026-11-25T08.jsonl`` has one JSON object a line, in the order of delivery. A file never changes
again once a later one is there; when the clock goes back, the latest file goes on. What is delivered is synced to the
disk before it counts as safe, and is there once, whenever the program dies: a line that was cut off is taken away, and
the ids of the last lines are known, so that a batch whose acknowledgement was lost is not written again.

One process has a directory, by a lock (flock) that ends with the process; to another one the outlet is down.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Final

from gateway.telemetry import Logger
from usage.outlet import BATCH_MAX, Message, OutletThread, check_batch, record_message_id

KNOWN_MAX: Final = 10 * BATCH_MAX
"""Ids known of each topic: a batch whose acknowledgement was lost, and as much again of others and for a late mark."""
HOUR_S: Final = 3600
_HOUR: Final = "%Y-%m-%dT%H"
_TOPIC: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,248}")
_FILE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d\.jsonl")


class JsonlOutlet:
    """Delivers to files under one directory."""

    def __init__(self, directory: Path, *, clock_s: Callable[[], float], log: Logger) -> None:
        """``clock_s`` is unix seconds."""
        self._directory = directory
        self._clock_s = clock_s
        self._log = log
        self._lock: int | None = None
        self._topics: dict[str, _Topic] = {}
        self._failed = False
        self._thread: OutletThread | None = OutletThread("usage-jsonl")

    async def deliver(self, messages: Sequence[Message], /) -> int:
        """See :class:`usage.outlet.Outlet`; a full disk is an outlet that is down, until there is room."""
        check_batch(messages)
        return 0 if self._thread is None else await self._thread.call(lambda: self._deliver(messages))

    async def prune(self, before_s: float) -> int:
        """Delete the files of the hours that had ended by then, unix seconds; how many there were.

        Raises:
            OSError: a file cannot be deleted.
        """
        return 0 if self._thread is None else await self._thread.call(lambda: self._prune(before_s))

    async def close(self) -> None:
        """See :class:`usage.outlet.Outlet`."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.call(self._close)
            thread.stop()

    def _deliver(self, messages: Sequence[Message]) -> int:
        by_topic: dict[str, list[Message]] = {}
        for message in messages:
            by_topic.setdefault(message.topic, []).append(message)
        error: OSError | None = None
        failed = set()
        for topic, some in by_topic.items():
            try:
                self._open()
                self._topic(topic).append(some, self._clock_s())
            except OSError as caught:
                error = caught
                failed.add(topic)
        self._tell(error)
        return next((at for at, message in enumerate(messages) if message.topic in failed), len(messages))

    def _open(self) -> None:
        """Take the directory, and repair what is in it, before the first line is written."""
        if self._lock is not None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        _sync(self._directory.parent)
        lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self._directory.iterdir():
                if path.is_dir() and _TOPIC.fullmatch(path.name):
                    self._topic(path.name).open()
        except OSError:
            os.close(lock)
            raise
        self._lock = lock

    def _topic(self, name: str) -> _Topic:
        if name not in self._topics:
            if not _TOPIC.fullmatch(name):
                raise ValueError(f"not a topic: {name!r}")
            self._topics[name] = _Topic(self._directory / name)
        return self._topics[name]

    def _prune(self, before_s: float) -> int:
        self._open()
        pruned = 0
        for path in self._directory.glob("*/*.jsonl"):
            if _is_ours(path) and _hour_s(path) + HOUR_S <= before_s:
                if (topic := self._topics.get(path.parent.name)) is not None:
                    topic.leave(path)
                path.unlink(missing_ok=True)
                pruned += 1
        return pruned

    def _tell(self, error: OSError | None) -> None:
        if error is not None and not self._failed:
            self._log.error("jsonl_not_written", directory=str(self._directory), error=str(error))
        elif self._failed and error is None:
            self._log.info("jsonl_written_again", directory=str(self._directory))
        self._failed = error is not None

    def _close(self) -> None:
        for topic in self._topics.values():
            topic.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Topic:
    """The files of one topic; of the latest one so many bytes are safe, and what is behind them is cut off."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._is_open = False
        self._path: Path | None = None
        self._file: int | None = None
        self._safe_bytes = 0
        self._is_damaged = False
        self._order: deque[str] = deque()
        self._known: set[str] = set()

    def open(self) -> None:
        """Repair the end of the latest file, and know what the last lines are."""
        if self._is_open:
            return
        self._directory.mkdir(exist_ok=True)
        _sync(self._directory.parent)
        files = sorted(filter(_is_ours, self._directory.glob("*.jsonl")), reverse=True)
        self._path = files[0] if files else None
        self._safe_bytes = _repair(files[0]) if files else 0
        _sync(self._directory)
        self._order.clear()
        self._known.clear()
        last = chain.from_iterable(map(_ids_from_end, files))
        self._know(reversed(list(islice(last, KNOWN_MAX))))
        self._is_open = True

    def append(self, messages: Sequence[Message], now_s: float) -> None:
        """Write and sync the messages that are not known.

        Raises:
            OSError: none of these is safe now.
        """
        self.open()
        new = {each.id: each.value for each in messages if each.id not in self._known}
        if not new:
            return
        self._cut()
        file = self._file_at(now_s)
        try:
            _write(file, b"".join(value + b"\n" for value in new.values()))
            os.fsync(file)
        except OSError:
            # After a failed fsync the kernel takes the lines for written: they are cut off, and written again.
            self._is_damaged = True
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._safe_bytes = os.fstat(file).st_size
        self._know(new)

    def leave(self, path: Path) -> None:
        """Let go of a file that is to be deleted."""
        if path == self._path:
            self.close()
            self._is_open = False

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _cut(self) -> None:
        if self._is_damaged and self._path is not None:
            os.truncate(self._path, self._safe_bytes)
            _sync(self._path)
            self._is_damaged = False

    def _file_at(self, now_s: float) -> int:
        path = self._directory / f"{datetime.fromtimestamp(now_s, UTC):{_HOUR}}.jsonl"
        if self._path is None or path.name > self._path.name:
            self.close()
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
            _sync(self._directory)
            self._path, self._safe_bytes = path, os.fstat(self._file).st_size
        elif self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        return self._file

    def _know(self, ids: Iterable[str]) -> None:
        for each in ids:
            self._order.append(each)
            self._known.add(each)
        while len(self._order) > KNOWN_MAX:
            self._known.discard(self._order.popleft())


def _is_ours(path: Path) -> bool:
    return _FILE.fullmatch(path.name) is not None


def _hour_s(path: Path) -> float:
    return datetime.strptime(path.stem, _HOUR).replace(tzinfo=UTC).timestamp()


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _repair(path: Path) -> int:
    """Cut off what a crash has left behind the last whole line, and sync the rest; how many bytes that is."""
    whole = (start + len(line) for start, line in _lines_from_end(path) if line.endswith(b"\n") and b"\0" not in line)
    size = next(whole, 0)
    if size != path.stat().st_size:
        os.truncate(path, size)
    _sync(path)
    return size


def _ids_from_end(path: Path) -> Iterator[str]:
    for _, line in _lines_from_end(path):
        with contextlib.suppress(ValueError):
            match json.loads(line):
                case {"record_id": str(found), "revision": int(revision)}:
                    yield record_message_id(found, revision)
                case {"event_id": str(found)}:
                    yield found


def _lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines and where they start, the last one first."""
    end = path.stat().st_size
    if not end:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            yield start, data[start:end]
            end = start
