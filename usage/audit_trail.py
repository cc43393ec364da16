"""From the audit stream in the limit store to the spool: denials, and what operators did.

Whoever has no key can have as many requests denied as he likes, and each is an event that is kept for weeks. So of
those only some are kept.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from gateway.audit import AuditAction, AuditEvent
from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.audit_reader import read_after
from limits.connection import Connection
from usage.metrics import LedgerMetrics
from usage.spool import AUDIT_MARK, Changes
from usage.writer import Writer

POLL_S: Final = 0.5
EVENTS_MAX: Final = 500
UNKNOWN_PER_MINUTE: Final = 600
"""Denials of callers that nobody knows that are kept of each minute."""
MINUTE_S: Final = 60
_MINUTES: Final = 60
"""That are told apart: events come nearly in order."""


class Unknown:
    """Chooses which denials of callers that nobody knows are kept: the first of each minute."""

    def __init__(self, *, metrics: LedgerMetrics, log: Logger, clock_s: Callable[[], float]) -> None:
        """``clock_s`` only has to go forward."""
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._seen: OrderedDict[int, int] = OrderedDict()
        self._untold = 0
        self._told_s = clock_s() - MINUTE_S

    def keeps(self, event: AuditEvent) -> bool:
        """Whether an event is to be kept; what operators did always is."""
        if event.organization_id or event.action is not AuditAction.REQUEST_DENIED:
            return True
        minute = int(event.created_at // MINUTE_S)
        self._seen[minute] = self._seen.get(minute, 0) + 1
        if self._seen[minute] <= UNKNOWN_PER_MINUTE:
            if len(self._seen) > _MINUTES:
                self._seen.popitem(last=False)
            return True
        self._metrics.events_skipped.inc()
        self._untold += 1
        return False

    def tell(self) -> None:
        """Say how many were not kept, once a minute."""
        if self._untold and self._clock_s() - self._told_s >= MINUTE_S:
            self._log.warning("audit_events_skipped", events=self._untold, kept_per_minute=UNKNOWN_PER_MINUTE)
            self._untold, self._told_s = 0, self._clock_s()


async def follow_audit(connection: Connection, writer: Writer, *, metrics: LedgerMetrics, log: Logger) -> None:
    """Copy every event once, until cancelled. The stream keeps AUDIT_EVENTS_MAX for a ledger that is away."""
    after = str(await writer.mark(AUDIT_MARK, "0-0"))
    unknown = Unknown(metrics=metrics, log=log, clock_s=asyncio.get_running_loop().time)
    while True:
        try:
            page = await read_after(connection, after, most=EVENTS_MAX)
        except StoreUnavailable:
            await connection.wait_up(POLL_S)
            await asyncio.sleep(POLL_S)
            continue
        if page.unreadable:
            log.error("audit_events_unreadable", entries=page.unreadable)
        if page.last:
            after = page.last
            kept = [event for event in page.events if unknown.keeps(event)]
            await writer.write(Changes(events=kept, marks={AUDIT_MARK: after}))
        unknown.tell()
        if page.count < EVENTS_MAX:
            await asyncio.sleep(POLL_S)
