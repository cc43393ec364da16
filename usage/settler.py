"""From the spool to the limit store: what has been written down is settled until the store has taken it.

What waits is in memory as far as there is room, and is found in the spool where there is none, or after a restart.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.model import Closing, Settlement
from policies.model import OrganizationId
from usage.metrics import LedgerMetrics
from usage.spool import EXPIRE, Changes, Entry, Spool
from usage.writer import Writer

WAITING_MAX: Final = 10_000
TOGETHER_MAX: Final = 200
"""Settlements under way at once: what the store answers well within one call's deadline."""
RETRY_S: Final = 1.0
STORE_WAIT_S: Final = 60.0
REPEATS_KNOWN_S: Final = 540
"""So long after it was closed the store still knows that an entry was; it keeps that for ten minutes."""


class Books(Protocol):
    """The part of :class:`limits.store.LimitStore` that settles."""

    async def settle(self, settlement: Settlement, /) -> Closing:
        """Close a request's entry with what it used. Again: changes nothing."""
        ...

    async def expire(self, organization_id: OrganizationId, request_id: str, /) -> Closing:
        """Close an overdue entry with what was reserved."""
        ...


class Settler:
    """Takes entries that have been written; :meth:`run` settles them."""

    def __init__(
        self,
        books: Books,
        spool: Spool,
        writer: Writer,
        *,
        store_is_up: Callable[[float], Awaitable[bool]],
        metrics: LedgerMetrics,
        log: Logger,
        clock_s: Callable[[], float],
        waiting_max: int = WAITING_MAX,
        retry_s: float = RETRY_S,
    ) -> None:
        """``store_is_up`` waits for the store at most so many seconds and says whether; ``clock_s`` is unix time."""
        self._books = books
        self._spool = spool
        self._writer = writer
        self._wait_up = store_is_up
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._waiting_max = waiting_max
        self._retry_s = retry_s
        self._waiting: deque[Entry] = deque()
        self._arrived = asyncio.Event()
        self._arrived.set()
        self._in_spool = True  # after a start nobody knows
        self._postponed = 0
        self._idle = asyncio.Event()

    def take(self, entries: Sequence[Entry]) -> None:
        """Settle what has been written; what there is no room for is found in the spool."""
        open_ones = [entry for entry in entries if entry.settlement is not None]
        if not open_ones:
            return
        if self._in_spool or len(self._waiting) + len(open_ones) > self._waiting_max:
            self._in_spool = True
        else:
            self._waiting.extend(open_ones)
        self._idle.clear()
        self._arrived.set()
        self._measure()

    def look(self) -> None:
        """There is something in the spool to be settled, again or at last."""
        self._in_spool = True
        self._idle.clear()
        self._arrived.set()

    async def run(self) -> None:
        """Settle what arrives, until cancelled."""
        while True:
            await self._arrived.wait()
            if not await self._wait_up(STORE_WAIT_S):
                continue
            if not self._waiting and self._in_spool:
                await self._look_in_spool()
            batch = [self._waiting.popleft() for _ in range(min(TOGETHER_MAX, len(self._waiting)))]
            if batch:
                await self._send(batch)
            elif not self._in_spool:
                self._arrived.clear()
                if not self._postponed:
                    self._idle.set()

    async def drain(self, within_s: float) -> bool:
        """Wait until everything is settled, but no longer than this; whether it is."""
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _look_in_spool(self) -> None:
        # What comes from now on is taken from memory; whatever comes both ways is settled once all the same.
        self._in_spool = False
        await self._writer.write(Changes())  # what has been settled is marked so
        found = await self._writer.call(lambda: self._spool.unsettled(most=self._waiting_max))
        self._waiting.extend(found)
        if len(found) >= self._waiting_max:
            self._in_spool = True

    async def _send(self, batch: list[Entry]) -> None:
        batch = await self._marked_as_tried(batch)
        results = await asyncio.gather(*map(self._close, batch), return_exceptions=True)
        settled: list[Entry] = []
        postponed, why = [], ""
        for entry, result in zip(batch, results, strict=True):
            match result:
                case Closing():
                    self._metrics.settlements.labels(result.outcome).inc()
                    settled.append(entry)
                case StoreUnavailable():
                    why = str(result)
                    postponed.append(entry)
                case _:  # our bug, and no reason to keep the others waiting
                    self._metrics.dropped.inc()
                    self._log.error("settlement_failed", request_id=entry.request_id, exc_info=result)
        if settled:
            self._writer.insist(Changes(settled=settled))
        if postponed:
            self._postponed += len(postponed)
            asyncio.get_running_loop().call_later(self._retry_s, self._put_back, postponed)
            self._log.warning("settlements_postponed", entries=len(postponed), error=why)
        self._measure()

    async def _marked_as_tried(self, batch: list[Entry]) -> list[Entry]:
        """It is written down that the store may know of a settlement, before it can."""
        now_s = int(self._clock_s())
        untried = [(now_s, entry) for entry in batch if entry.tried_s is None]
        if not untried:
            return batch
        await self._writer.write(Changes(tried=untried))
        return [replace(entry, tried_s=now_s) if entry.tried_s is None else entry for entry in batch]

    async def _close(self, entry: Entry) -> Closing:
        settlement = entry.settlement
        assert settlement is not None  # noqa: S101 - only such entries are taken
        if settlement == EXPIRE:
            return await self._books.expire(entry.organization_id, entry.request_id)
        # Once the store no longer knows whether it took it before, nothing is charged that has no entry.
        if entry.tried_s is not None and self._clock_s() - entry.tried_s > REPEATS_KNOWN_S:
            settlement = replace(settlement, charge_to="")
        return await self._books.settle(settlement)

    def _measure(self) -> None:
        self._metrics.unsettled.set(len(self._waiting) + self._postponed)

    def _put_back(self, postponed: list[Entry]) -> None:
        self._postponed -= len(postponed)
        self._waiting.extendleft(reversed(postponed))
        self._arrived.set()
