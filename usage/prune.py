"""Removes what has been kept long enough, a little at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from gateway.telemetry import Logger
from usage.record import MICRO
from usage.spool import Spool
from usage.writer import Writer

INTERVAL_S: Final = 60.0
ENDED_KEPT_S: Final = 86_400
"""When requests ended is asked for every few seconds, and not at all while Envoy's admin interface is away."""
PAUSE_S: Final = 0.05
"""Between two deletions, for those who write."""


async def prune_every(
    interval_s: float,
    spool: Spool,
    writer: Writer,
    prune_files: Callable[[float], Awaitable[object]],
    *,
    kept_s: float,
    clock_s: Callable[[], float],
    log: Logger,
) -> None:
    """Prune again and again, until cancelled; what has not been handed on stays."""
    while True:
        before_s, removed = clock_s() - kept_s, 0
        while some := await writer.call(partial(spool.prune, before_us=int(before_s * MICRO))):
            removed += some
            await asyncio.sleep(PAUSE_S)
        await writer.call(partial(spool.prune_ended, before_us=int((clock_s() - ENDED_KEPT_S) * MICRO)))
        try:
            await prune_files(before_s)
        except OSError as error:  # they are looked for again
            log.warning("files_not_pruned", error=str(error))
        if removed:
            log.info("pruned", rows=removed)
        await asyncio.sleep(interval_s)
