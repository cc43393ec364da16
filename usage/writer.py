"""The queue before the spool: what it has taken is written down in order, however long the disk fails."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from gateway.telemetry import Logger
from usage.metrics import LedgerMetrics
from usage.spool import Changes, Entry, Spool, is_damage

ENTRIES_MAX: Final = 50_000
"""Entries and attempts that wait to be written; a request has some 2 kB."""
TOGETHER_MAX: Final = 500
RETRY_S: Final = 0.5
GROUP_S: Final = 0.04
"""Between two writes, unless there is much to write: each costs the disk and the processor what 20 entries do."""
UNWRITABLE: Final = (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError, sqlite3.IntegrityError)
"""It is what is to be written that is wrong, and not the disk."""
T = TypeVar("T")
Part = tuple[Changes, asyncio.Future[None] | None]
"""Changes, and who waits until they are on the disk."""


class Writer:
    """Owns the thread that writes. ``written`` is told of entries that were not there before, once they are safe;
    ``damaged`` of an error after which trying again will not do.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        written: Callable[[Sequence[Entry]], None],
        metrics: LedgerMetrics,
        log: Logger,
        damaged: Callable[[sqlite3.Error], None] = lambda _: None,
        entries_max: int = ENTRIES_MAX,
        retry_s: float = RETRY_S,
        group_s: float = GROUP_S,
    ) -> None:
        self._spool = spool
        self._written = written
        self._metrics = metrics
        self._log = log
        self._damaged = damaged
        self._entries_max = entries_max
        self._retry_s = retry_s
        self._group_s = group_s
        self._queue: deque[Part] = deque()
        self._held = 0
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self.writable = True

    @property
    def held(self) -> int:
        """Entries and attempts that are not written yet."""
        return self._held

    def offer(self, changes: Changes) -> bool:
        """Take changes to be written; False where there is no room."""
        if self._held + changes.size > self._entries_max:
            return False
        self._take(changes, None)
        return True

    def insist(self, changes: Changes) -> None:
        """Take changes to be written, room or not: for small ones that must not be lost."""
        self._take(changes, None)

    async def write(self, changes: Changes) -> None:
        """Wait for room, and until everything is on the disk."""
        await (await self.begin(changes))

    async def begin(self, changes: Changes) -> asyncio.Future[None]:
        """Wait for room; the future is done when everything is on the disk."""
        await self._room.wait()
        safe: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._take(changes, safe)
        return safe

    async def call(self, work: Callable[[], T]) -> T:
        """Do something with the spool, in its thread, until the disk lets it be done."""
        while True:
            try:
                done = await asyncio.get_running_loop().run_in_executor(self._thread, work)
            except UNWRITABLE:
                raise
            except sqlite3.Error as error:
                self._failed(error)
                await asyncio.sleep(self._retry_s)
                continue
            if not self.writable:
                self.writable = True
                self._metrics.spool_writable.set(1)
                self._log.info("spool_writable", entries=self._held)
            return done

    async def mark(self, name: str, default: Any) -> Any:
        """A mark as it was last written, once it can be read."""
        return await self.call(partial(self._spool.mark, name, default))

    async def write_through(self) -> None:
        """Wait until everything so far is in the spool's own file."""
        await self.write(Changes())
        while not await self.call(self._spool.checkpoint):  # noqa: ASYNC110 - whoever reads tells nobody of it
            await asyncio.sleep(self._retry_s)

    async def run(self) -> None:
        """Write what arrives, until cancelled."""
        began_s = float("-inf")
        while True:
            await self._arrived.wait()
            pause_s = began_s + self._group_s - time.monotonic()
            if pause_s > 0 and self._held < TOGETHER_MAX:
                await asyncio.sleep(pause_s)
            began_s = time.monotonic()
            together, parts = self._next()
            fresh = await self._write(together, parts)
            self._hold(-together.size)
            for _, future in parts:
                if future is not None and not future.done():
                    future.set_result(None)
            if fresh:
                self._written(fresh)

    async def drain(self, within_s: float) -> int:
        """Wait until everything is written; how much is not, after so long."""
        try:
            async with asyncio.timeout(within_s):
                await self.write(Changes())
        except TimeoutError:
            return self._held
        return 0

    def close(self) -> None:
        """End the thread; what is not written is lost."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _take(self, changes: Changes, safe: asyncio.Future[None] | None) -> None:
        self._queue.append((changes, safe))
        self._hold(changes.size)
        self._arrived.set()

    async def _write(self, together: Changes, parts: Sequence[Part]) -> list[Entry]:
        """Write in one go; where something in it cannot be written ever, without that."""
        try:
            return await self.call(partial(self._spool.write, together))
        except Exception as error:  # noqa: BLE001 - our bug or a stranger's value, and no reason to lose the others
            smaller = [part for part, _ in parts] if len(parts) > 1 else _pieces(together)
            if len(smaller) > 1:
                return [entry for piece in smaller for entry in await self._write(piece, [(piece, None)])]
            self._metrics.malformed.inc()
            self._log.exception("not_written", error=str(error), requests=[one.request_id for one in together.entries])
            return []

    def _next(self) -> tuple[Changes, list[Part]]:
        """What is written in one go, and of what it consists."""
        together, parts = Changes(), []
        while self._queue and together.size < TOGETHER_MAX:
            part = self._queue.popleft()
            together.add(part[0])
            parts.append(part)
        if not self._queue:
            self._arrived.clear()
        return together, parts

    def _failed(self, error: sqlite3.Error) -> None:
        self._metrics.spool_errors.inc()
        if is_damage(error):
            self._damaged(error)
        if self.writable:
            self.writable = False
            self._metrics.spool_writable.set(0)
            self._log.error("spool_not_writable", error=str(error), path=str(self._spool.path))

    def _hold(self, more: int) -> None:
        self._held += more
        self._metrics.queue_entries.set(self._held)
        if self._held >= self._entries_max:
            self._room.clear()
        else:
            self._room.set()


def _pieces(of: Changes) -> list[Changes]:
    """The same changes, each entry and event by itself."""
    pieces = [Changes(entries=[entry]) for entry in of.entries] + [Changes(events=[event]) for event in of.events]
    rest = replace(of, entries=[], events=[])
    return pieces if rest == Changes() else [*pieces, rest]
