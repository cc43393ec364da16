"""What Envoy tells, twice: at once by gRPC, and in the journal. Each request is taken once.

By the time the journal's line of a request is read, most requests are known already, and only those have to be counted
that are not kept: of them nobody knows later whether they were.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from gateway.telemetry import Logger
from usage.access_log import Batch, Running
from usage.entries import entry_of
from usage.finished import FailedAttempt, Finished, Malformed
from usage.journal import decode_line, is_attempt, request_id_of
from usage.metrics import LedgerMetrics
from usage.record import MICRO, Kind, kind_of
from usage.spool import JOURNAL_MARK, Changes
from usage.writer import Writer

KNOWN_MAX: Final = 100_000
"""Requests told of by gRPC that the journal has not told of yet."""
UNHEARD_S: Final = 60
"""What gRPC has told of and the journal not so long after its end is not in the journal: Envoy could not write."""
AHEAD_MAX: Final = 10_000
"""Requests of the journal that gRPC has not told of; of most it will not."""


class Intake:
    """Puts what it is told into the writer's queue."""

    def __init__(
        self,
        writer: Writer,
        *,
        tried_s: Callable[[], int | None],
        running: Callable[[Sequence[Running]], None],
        metrics: LedgerMetrics,
        log: Logger,
        recovered: bool = False,
        settles: bool = True,
        known_max: int = KNOWN_MAX,
    ) -> None:
        """The collaborators.

        Args:
            writer: takes what is to be written.
            tried_s: unix second at which the limit store may be told of what is written now; None: it is down.
            running: is told of signs of life.
            metrics: counts.
            log: is told of what cannot be used.
            recovered: the spool is not what it was, so the limit store may know of requests that the spool does not.
            settles: there is a limit store; without one nothing waits to be settled.
            known_max: bounds what is remembered.
        """
        self._writer = writer
        self._tried_s = tried_s
        self._running = running
        self._metrics = metrics
        self._log = log
        self._recovered = recovered
        self._settles = settles
        self._known_max = known_max
        self._known: OrderedDict[str, tuple[Kind, int]] = OrderedDict()
        self._ahead: OrderedDict[str, None] = OrderedDict()

    @property
    def remembered(self) -> int:
        """Requests that were told of one way and not yet the other."""
        return len(self._known) + len(self._ahead)

    def receive(self, batch: Batch) -> None:
        """Take what came by gRPC. Never waits: what there is no room for comes again by the journal."""
        for problem in batch.malformed:
            self._malformed(problem)
        self._metrics.log_entries.inc(len(batch.finished) + len(batch.attempts))
        changes, known, tried_s = Changes(attempts=list(batch.attempts)), {}, self._tried_s()
        for ended in batch.finished:
            if ended.request_id in self._ahead:
                del self._ahead[ended.request_id]
            elif ended.request_id and self._add(changes, ended, tried_s):
                known[ended.request_id] = (kind_of(ended), ended.ended_us)
        if (changes.entries or changes.attempts) and not self._writer.offer(changes):
            self._metrics.dropped.inc(len(changes.entries))
            known = {}
        self._known.update(known)
        _keep_newest(self._known, self._known_max)
        if batch.running:
            self._running(batch.running)

    async def take_journal(self, lines: Sequence[bytes], position: str) -> asyncio.Future[None]:
        """Take lines of the journal; with them it is written down that it has been read up to ``position``.

        Returns:
            Done when that is on the disk.
        """
        changes, tried_s = Changes(marks={JOURNAL_MARK: position}), self._tried_s()
        for line in lines:
            self._take_line(changes, line, tried_s)
        _keep_newest(self._ahead, AHEAD_MAX)
        return await self._writer.begin(changes)

    def forget(self, before_us: int) -> None:
        """Wait no longer for lines of requests that had ended by then; all that the journal has was read."""
        changes = Changes()
        while self._known:
            request_id, (kind, ended_us) = next(iter(self._known.items()))
            if ended_us >= before_us:
                break
            del self._known[request_id]
            if kind == "anonymous":
                changes.anonymous.append(ended_us)
        if changes.anonymous:
            self._writer.insist(changes)

    def _take_line(self, changes: Changes, line: bytes, tried_s: int | None) -> None:
        known = None if is_attempt(line) else self._known.pop(request_id_of(line), None)
        if known is None:
            try:
                told = decode_line(line)
            except Malformed as error:
                self._malformed(f"{error}: {line[:200]!r}")
                return
            if isinstance(told, FailedAttempt):
                changes.attempts.append(told)
                return
            known = kind_of(told), told.ended_us
            if self._recovered:
                tried_s = told.ended_us // MICRO
            self._add(changes, told, tried_s)
            if told.request_id:
                self._ahead[told.request_id] = None
        kind, ended_us = known
        if kind == "anonymous":
            changes.anonymous.append(ended_us)

    def _add(self, changes: Changes, ended: Finished, tried_s: int | None) -> bool:
        try:
            entry = entry_of(ended, tried_s=tried_s)
        except Malformed as error:
            self._malformed(f"{ended.request_id}: {error}")
            return False
        if entry is not None:
            changes.entries.append(entry if self._settles else replace(entry, settlement=None))
        return True

    def _malformed(self, problem: str) -> None:
        self._metrics.malformed.inc()
        self._log.error("access_log_malformed", problem=problem)


def _keep_newest(of: OrderedDict[str, Any], most: int) -> None:
    while len(of) > most:
        of.popitem(last=False)
