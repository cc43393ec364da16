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
from usage.spool import MOMENT_US, Spool
from usage.writer import Writer

INTERVAL_S: Final = 5.0
TIMEOUT_S: Final = 2.0
LAG_S: Final = 12.0
"""Envoy writes its files every 10 s unless it is told otherwise."""
WORST_OF_S: Final = 60.0
"""What ends while Envoy answers hides as much that is missing, so the worst of some comparisons counts."""
KEPT_S: Final = 120.0
"""So long it is known when requests ended; older ones are only counted."""
_TOTAL: Final = f"http.{names.LISTENER_PUBLIC}.downstream_rq_total"
_RUNNING: Final = f"http.{names.LISTENER_PUBLIC}.downstream_rq_active"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyCount:
    """Requests that an Envoy has seen the end of since its start, and those that run; ``at_us`` is when it said so."""

    started_us: int
    at_us: int
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
    ) -> None:
        """``caught_up``: everything has been read that Envoy's journal has."""
        self._spool = spool
        self._archive = archive
        self._writer = writer
        self._http = http
        self._envoy_admin = envoy_admin
        self._caught_up = caught_up
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
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
        if self._counts and self._counts[-1].started_us != count.started_us:
            self._counts.clear()
            self._missing.clear()
        self._counts.append(count)
        if self._caught_up():
            while self._counts[0].at_us <= count.at_us - LAG_S * MICRO:
                await self._look_back(self._counts.popleft())
            self._tell(count)

    async def _look_back(self, count: EnvoyCount) -> None:
        """What is missing by now of the requests that had ended then."""
        known = await self._archive.known(count.started_us, until_us=count.at_us)
        if known is None:
            # Nothing was compared before, or the spool was lost: whatever was missing then nobody can tell any more.
            since_start = await self._archive.ended(since_us=count.started_us, until_us=count.at_us)
            await self._fold(count, before_us=count.started_us, known=count.ended - since_start)
            known = count.ended
        self._missing.append((count, max(0, count.ended - known)))
        before_us = (count.at_us - int(KEPT_S * MICRO)) // MOMENT_US * MOMENT_US
        if before_us > count.started_us:
            known_before = await self._archive.known(count.started_us, until_us=before_us - 1)
            await self._fold(count, before_us=before_us, known=known_before or 0)

    async def _fold(self, count: EnvoyCount, *, before_us: int, known: int) -> None:
        fold = partial(self._spool.fold_ended, count.started_us, before_us=before_us, known=known)
        await self._writer.call(fold)

    def _tell(self, count: EnvoyCount) -> None:
        while self._missing and self._missing[0][0].at_us < count.at_us - (LAG_S + WORST_OF_S) * MICRO:
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
            query = {"format": "json", "filter": f"^({_TOTAL}|{_RUNNING})$"}
            stats = await self._http.get(f"{base}/stats", params=query, timeout=TIMEOUT_S)
            at_us = round(self._clock_s() * MICRO)  # whatever it has counted ended before
            found = {stat["name"]: int(stat["value"]) for stat in stats.json()["stats"] if "name" in stat}
            started_us = round(datetime.fromisoformat(started).timestamp() * MICRO)
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        running = found.get(_RUNNING, 0)
        return EnvoyCount(
            started_us=started_us,
            at_us=at_us,
            ended=found.get(_TOTAL, 0) - running,
            running=running,
        )
