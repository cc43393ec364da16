"""From the audit stream in the limit store to the spool: denials, and what operators did."""

from __future__ import annotations

import asyncio
from typing import Final

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.audit_reader import read_after
from limits.connection import Connection
from usage.spool import Changes
from usage.writer import Writer

POLL_S: Final = 0.5
MARK: Final = "audit_stream"
EVENTS_MAX: Final = 500


async def follow_audit(connection: Connection, writer: Writer, *, log: Logger) -> None:
    """Copy every event once, until cancelled. The stream keeps AUDIT_EVENTS_MAX for a ledger that is away."""
    after = str(await writer.mark(MARK, "0-0"))
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
            await writer.write(Changes(events=list(page.events), marks={MARK: after}))
        if page.count < EVENTS_MAX:
            await asyncio.sleep(POLL_S)
