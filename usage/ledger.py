"""The queue between the access log and the limit store: what it holds is settled until the store has taken it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.model import Closing, Settlement
from usage.access_log import Finished
from usage.metrics import LedgerMetrics
from usage.settle import settlement_of

QUEUE_MAX: Final = 100_000
BATCH_MAX: Final = 200
"""Settlements under way at once: what the store answers well within one call's deadline."""
RETRY_S: Final = 1.0
STORE_WAIT_S: Final = 60.0
REPEATS_KNOWN_S: Final = 540.0
"""So long after it was closed the store still knows that an entry was; it keeps that for ten minutes."""


@dataclass(slots=True)
class _Waiting:
    """A settlement; ``tried_s`` is when the store may have taken it without an answer that reached us."""

    settlement: Settlement
    tried_s: float | None = None


class Ledger:
    """Takes requests that have ended; :meth:`run` settles them."""

    def __init__(
        self,
        settle: Callable[[Settlement], Awaitable[Closing]],
        *,
        store_is_up: Callable[[float], Awaitable[bool]],
        metrics: LedgerMetrics,
        log: Logger,
        clock_s: Callable[[], float],
        entries_max: int = QUEUE_MAX,
        retry_s: float = RETRY_S,
    ) -> None:
        """``settle`` is the store's, ``store_is_up`` waits for it at most so many seconds, ``clock_s`` is monotonic."""
        self._settle = settle
        self._store_is_up = store_is_up
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._entries_max = entries_max
        self._retry_s = retry_s
        self._queue: deque[_Waiting] = deque()
        self._held = 0  # in the queue, under way, or waiting to be tried again
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._full = False

    def take(self, ended: Iterable[Finished]) -> None:
        """Queue what is to be settled; what there is no room for is left to the sweep."""
        settlements = [s for s in map(settlement_of, ended) if s is not None]
        if not settlements:
            return
        room = self._entries_max - self._held
        dropped = len(settlements) - room
        if dropped > 0:
            self._metrics.dropped.inc(dropped)
            if not self._full:
                self._log.error("queue_full", queue_entries=self._held)
        self._full = dropped > 0
        self._queue.extend(map(_Waiting, settlements[:room]))
        self._hold(min(len(settlements), room))
        self._arrived.set()

    async def run(self) -> None:
        """Settle what arrives, until cancelled."""
        while True:
            await self._arrived.wait()
            if not await self._store_is_up(STORE_WAIT_S):
                continue
            batch = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
            if not self._queue:
                self._arrived.clear()
            await self._send(batch)

    async def drain(self, within_s: float) -> int:
        """Wait until everything is settled; how much is not, after so long."""
        try:
            await asyncio.wait_for(self._empty.wait(), within_s)
        except TimeoutError:
            return self._held
        return 0

    async def _send(self, batch: list[_Waiting]) -> None:
        calls = (self._settle(self._to_send(waiting)) for waiting in batch)
        postponed: list[_Waiting] = []
        why = ""
        for waiting, result in zip(batch, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            match result:
                case Closing():
                    self._metrics.settlements.labels(result.outcome).inc()
                case StoreUnavailable():
                    if waiting.tried_s is None:
                        why, waiting.tried_s = str(result), self._clock_s()
                    postponed.append(waiting)
                case _:  # our bug, and no reason to keep the others waiting
                    self._metrics.dropped.inc()
                    self._log.error("settlement_failed", request_id=waiting.settlement.request_id, exc_info=result)
        self._hold(len(postponed) - len(batch))
        if postponed:
            asyncio.get_running_loop().call_later(self._retry_s, self._put_back, postponed)
        if why:
            self._log.warning("settlements_postponed", entries=len(postponed), error=why)

    def _to_send(self, waiting: _Waiting) -> Settlement:
        """Once the store no longer knows whether it took it before, nothing is charged that has no entry."""
        if waiting.tried_s is not None and self._clock_s() - waiting.tried_s > REPEATS_KNOWN_S:
            return replace(waiting.settlement, charge_to="")
        return waiting.settlement

    def _put_back(self, postponed: list[_Waiting]) -> None:
        self._queue.extend(postponed)
        self._arrived.set()

    def _hold(self, more: int) -> None:
        self._held += more
        self._metrics.queue_entries.set(self._held)
        if self._held:
            self._empty.clear()
        else:
            self._empty.set()
