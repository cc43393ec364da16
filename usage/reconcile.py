"""Whether every request that Envoy has counted is known here: Envoy's own count against the ledger's, again and again.

Envoy counts from its start, so what is compared is of the Envoy that runs: of the requests that had ended at a moment,
how many are known some seconds later. Envoy docs: "HTTP connection manager statistics", downstream_rq_total,
downstream_rq_active; "Administration interface", /config_dump.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

import httpx

from gateway import names
from gateway.telemetry import Logger
from usage.archive import Archive
from usage.metrics import LedgerMetrics
from usage.record import MICRO
from usage.spool import Spool
from usage.writer import Writer

INTERVAL_S: Final = 5.0
TIMEOUT_S: Final = 2.0
LAG_S: Final = 12.0
"""Envoy writes its files every 10 s unless it is told otherwise."""
WORST_OF_S: Final = 60.0
"""What ends while Envoy answers hides as much that is missing, so the worst of some comparisons counts."""
KEPT_S: Final = 120.0
"""So long it is known when requests ended; older ones are only counted."""
CLOCK_STEP_S: Final = 1.0
_TOTAL: Final = f"http.{names.LISTENER_PUBLIC}.downstream_rq_total"
_RUNNING: Final = f"http.{names.LISTENER_PUBLIC}.downstream_rq_active"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyCount:
    """Requests that an Envoy has seen the end of since its start, and those that run.

    It said so at ``at_us`` in unix microseconds and ``at_s`` of a clock that nobody sets.
    """

    started_us: int
    at_us: int
    at_s: float
    ended: int
    running: int = 0


class Reconciliation:
    """Compares Envoy's count with the ledger's."""

    def __init__(
        self,
        spool: Spool,
        archive: Archive,
        writer: Writer,
        http: httpx.AsyncClient,
        envoy_admin: str,
        *,
        caught_up: Callable[[], bool],
        metrics: LedgerMetrics,
        log: Logger,
        clock_s: Callable[[], float],
        monotonic_s: Callable[[], float],
    ) -> None:
        """``caught_up``: what Envoy's journal has was read, and can be written."""
        self._spool = spool
        self._archive = archive
        self._writer = writer
        self._http = http
        self._envoy_admin = envoy_admin
        self._caught_up = caught_up
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._monotonic_s = monotonic_s
        self._one = asyncio.Lock()
        self._counts: deque[EnvoyCount] = deque()
        self._missing: deque[tuple[EnvoyCount, int]] = deque()
        self.unaccounted: int | None = None
        """Requests that Envoy has counted and nobody has told of; None until it is known."""

    async def run(self, interval_s: float = INTERVAL_S) -> None:
        """Compare until cancelled."""
        while True:
            try:
                await self.compare()
            except sqlite3.Error as error:
                self._log.error("spool_not_readable", error=str(error))
            await asyncio.sleep(interval_s)

    async def compare(self) -> tuple[EnvoyCount, int] | None:
        """Envoy's count and the ledger's of the same Envoy, both of now; None where Envoy does not answer.

        Raises:
            sqlite3.Error: the spool cannot be read.
        """
        async with self._one:
            count = await self._ask()
            if count is not None:
                await self._take(count)
        if count is None:
            return None
        known = await self._archive.known(count.started_us, until_us=count.at_us)
        if known is None:
            known = await self._archive.ended(since_us=count.started_us, until_us=count.at_us)
        return count, known

    async def _take(self, count: EnvoyCount) -> None:
        last = self._counts[-1] if self._counts else None
        if last is not None and last.started_us != count.started_us:
            self._counts.clear()
            self._missing.clear()
        elif last is not None and abs((count.at_us - last.at_us) / MICRO - (count.at_s - last.at_s)) > CLOCK_STEP_S:
            self._log.warning("clock_was_set", meaning="requests are counted anew")
            self._counts.clear()
            self._missing.clear()
            await self._writer.call(self._spool.forget_ended)
        self._counts.append(count)
        if self._caught_up():
            while self._counts[0].at_s <= count.at_s - LAG_S:
                await self._look_back(self._counts.popleft())
            self._tell(count)

    async def _look_back(self, count: EnvoyCount) -> None:
        """What is missing by now of the requests that had ended then."""
        started_us, at_us = count.started_us, count.at_us
        known = await self._archive.known(started_us, until_us=at_us)
        if known is None:
            # Nothing was compared before, or the spool was lost: whatever was missing then nobody can tell any more.
            known = count.ended
            begin = partial(self._spool.begin_ended, started_us, until_us=at_us, known=known)
            await self._writer.call(begin)
        self._missing.append((count, max(0, count.ended - known)))
        before_us = at_us - int(KEPT_S * MICRO)
        if before_us > started_us:
            await self._writer.call(partial(self._spool.fold_ended, started_us, before_us=before_us))

    def _tell(self, count: EnvoyCount) -> None:
        while self._missing and self._missing[0][0].at_s < count.at_s - LAG_S - WORST_OF_S:
            self._missing.popleft()
        if not self._missing:
            return
        unaccounted = max(missing for _, missing in self._missing)
        if unaccounted and unaccounted != self.unaccounted:
            self._log.error("requests_unaccounted", requests=unaccounted)
        self.unaccounted = unaccounted
        self._metrics.unaccounted.set(unaccounted)

    async def _ask(self) -> EnvoyCount | None:
        base = f"http://{self._envoy_admin}"
        try:
            dump = await self._http.get(f"{base}/config_dump", params={"mask": "last_updated"}, timeout=TIMEOUT_S)
            # The bootstrap is read once, at the start.
            [started] = {config["last_updated"] for config in dump.json()["configs"] if "Bootstrap" in config["@type"]}
            # In this order: what begins between the two does not look as if it had ended.
            total, running = [await self._stat(name) for name in (_TOTAL, _RUNNING)]
            started_us = round(datetime.fromisoformat(started).timestamp() * MICRO)
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return EnvoyCount(
            started_us=started_us,
            at_us=round(self._clock_s() * MICRO),  # whatever it has counted ended before
            at_s=self._monotonic_s(),
            ended=total - running,
            running=running,
        )

    async def _stat(self, name: str) -> int:
        query = {"format": "json", "filter": f"^{name}$"}
        answer = await self._http.get(f"http://{self._envoy_admin}/stats", params=query, timeout=TIMEOUT_S)
        return next((int(stat["value"]) for stat in answer.json()["stats"] if stat.get("name") == name), 0)
