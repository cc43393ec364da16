"""Follows the journal: takes its lines as they come, and has it rotated."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import httpx

from gateway.telemetry import Logger
from usage.intake import UNHEARD_S, Intake
from usage.journal_file import JournalFile
from usage.metrics import LedgerMetrics
from usage.record import MICRO
from usage.spool import RECOVERING_MARK, Changes
from usage.writer import Writer

POLL_S: Final = 0.2
REOPEN_TIMEOUT_S: Final = 2.0
BEHIND_BYTES: Final = 1024 * 1024
UNWRITTEN_MAX: Final = 8
"""Parts of the journal that are read on while earlier ones are being written: the disk takes as long as the rest."""


class JournalFollower:
    """See above. ``reopen`` tells Envoy to open its log files anew. ``clock_s`` is unix seconds."""

    def __init__(
        self,
        journal: JournalFile,
        intake: Intake,
        writer: Writer,
        *,
        reopen: Callable[[], Awaitable[None]],
        clock_s: Callable[[], float],
        metrics: LedgerMetrics,
        log: Logger,
        poll_s: float = POLL_S,
    ) -> None:
        self._journal = journal
        self._intake = intake
        self._writer = writer
        self._reopen = reopen
        self._clock_s = clock_s
        self._metrics = metrics
        self._log = log
        self._poll_s = poll_s
        self._failing = False
        self._unwritten: deque[asyncio.Future[None]] = deque()
        self.caught_up = asyncio.Event()
        """Set once everything has been read that was there; whatever is missing then has been lost on the way."""

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                if await self._step():
                    continue
                self._failing = False
            except (OSError, httpx.HTTPError) as error:
                if not self._failing:
                    self._failing = True
                    self._log.error("journal_unusable", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._poll_s)

    async def _step(self) -> bool:
        """Whether there may be more."""
        unread_bytes = self._journal.unread_bytes
        self._metrics.journal_unread_bytes.set(unread_bytes)
        if unread_bytes > BEHIND_BYTES:
            self.caught_up.clear()
        lines = self._journal.read()
        if lines:
            self._unwritten.append(await self._intake.take_journal(lines, self._journal.position.written()))
            await self._written(UNWRITTEN_MAX)
            await asyncio.sleep(0)  # others are to be heard between two parts
            return True
        await self._written(0)
        self._intake.forget(int((self._clock_s() - UNHEARD_S) * MICRO))
        if not self.caught_up.is_set():
            self._writer.insist(Changes(marks={RECOVERING_MARK: 0}))
            self.caught_up.set()
        if self._journal.has_old:
            # What was in it is in the spool's file, and not only in the log that a crash could cut.
            await self._writer.write_through()
            self._journal.forget_old()
        elif self._journal.is_large:
            self._journal.rotate()
        if self._journal.is_aside:
            await self._reopen()
        return False

    async def _written(self, left: int) -> None:
        """Wait until no more parts than these are still to be written."""
        while len(self._unwritten) > left:
            await self._unwritten.popleft()


def reopener(http: httpx.AsyncClient, envoy_admin: str) -> Callable[[], Awaitable[None]]:
    """Tells the Envoy whose admin interface is at ``host:port``. Envoy docs: "Administration interface"."""

    async def reopen() -> None:
        response = await http.post(f"http://{envoy_admin}/reopen_logs", timeout=REOPEN_TIMEOUT_S)
        response.raise_for_status()

    return reopen
