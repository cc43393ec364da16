"""Whether a ledger is there to say which requests have ended.

Only the ledger frees the slots of parallel requests. Without it they would fill up, and everybody would be refused
until they are overdue; so while no ledger has been heard of, parallel requests are not counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.connection import Connection
from limits.resp import pack

KEY: Final = b"router:ledger"
BEAT_S: Final = 1.0
RETRY_S: Final = 0.1
"""After a call that failed on a connection that is up, so that nobody else is kept from it."""
SILENT_S: Final = 5
"""After so long without a beat the ledger counts as away."""

_BEAT: Final = pack(b"SET", KEY, b"here", b"EX", b"%d" % SILENT_S)
_LISTEN: Final = pack(b"EXISTS", KEY)


async def beat(connection: Connection, *, interval_s: float = BEAT_S) -> None:
    """Be heard, until cancelled. A store that is down is tried again."""
    while True:
        try:
            await connection.call(_BEAT)
        except StoreUnavailable:
            if await connection.wait_up(interval_s):
                await asyncio.sleep(RETRY_S)
            continue
        await asyncio.sleep(interval_s)


class LedgerWatch:
    """Listens for a ledger; until it has listened for the first time, one is assumed."""

    def __init__(
        self, connection: Connection, *, log: Logger, on_change: Callable[[bool], None] = lambda _: None
    ) -> None:
        self._connection = connection
        self._log = log
        self._on_change = on_change
        self._here = True

    @property
    def is_here(self) -> bool:
        """Whether a ledger has been heard of lately. What was last known holds while the store is down."""
        return self._here

    async def run(self, *, interval_s: float = BEAT_S) -> None:
        """Listen until cancelled."""
        while True:
            try:
                here = await self._connection.call(_LISTEN) == 1
            except StoreUnavailable:
                if await self._connection.wait_up(interval_s):
                    await asyncio.sleep(RETRY_S)
                continue
            if here != self._here:
                self._here = here
                self._on_change(here)
                if here:
                    self._log.info("ledger_here")
                else:
                    self._log.error("ledger_away", meaning="parallel requests are not counted")
            await asyncio.sleep(interval_s)
