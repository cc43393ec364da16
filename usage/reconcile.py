"""Three counts that must agree: Envoy's own, what the ledger has written down, and what was handed on.

Envoy counts completed requests from its start; the journal is counted by the second at which a request began, so that
what belongs to the running Envoy can be told from what belongs to the one before. Envoy docs: "HTTP connection manager
statistics", downstream_rq_completed.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httpx

from gateway import names
from gateway.telemetry import Logger
from usage.metrics import LedgerMetrics

INTERVAL_S: Final = 5.0
TIMEOUT_S: Final = 2.0
SAME_EPOCH_S: Final = 2
"""Envoy tells its age in whole seconds: two of its starts that differ by less are one."""
LAG_S: Final = 12.0
"""Envoy writes its files every 10 s unless it is told otherwise."""
KEPT_S: Final = 60
SECONDS_MAX: Final = 3600
"""With requests in them, that are remembered while no Envoy says how old it is."""
_COMPLETED: Final = f"http.{names.LISTENER_PUBLIC}.downstream_rq_completed"
_RUNNING: Final = f"http.{names.LISTENER_PUBLIC}.downstream_rq_active"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyCount:
    """Requests that an Envoy has completed since its start, in unix seconds, and those that run."""

    started_s: int
    completed: int
    running: int = 0


class Seen:
    """Requests that the journal has told of, of the running Envoy."""

    def __init__(self, written: str = "") -> None:
        """``written`` as :meth:`written` had it."""
        kept = json.loads(written) if written else {}
        self._epoch_s: int | None = kept.get("epoch_s")
        self._requests: int = kept.get("requests", 0)
        self._recent = Counter({int(second): count for second, count in kept.get("recent", {}).items()})

    def add(self, started_s: int) -> None:
        """One more, which began in that second."""
        self._recent[started_s] += 1
        if len(self._recent) > SECONDS_MAX:
            del self._recent[min(self._recent)]
        if self._epoch_s is None or started_s >= self._epoch_s:
            self._requests += 1

    def of(self, envoy_started_s: int, *, now_s: float) -> int:
        """How many there were of the Envoy that has been running since then."""
        if self._epoch_s is None or abs(envoy_started_s - self._epoch_s) > SAME_EPOCH_S:
            self._epoch_s = envoy_started_s
            self._requests = sum(count for second, count in self._recent.items() if second >= envoy_started_s)
        # An Envoy that starts from now on begins no request before.
        for second in [second for second in self._recent if second < now_s - KEPT_S]:
            del self._recent[second]
        return self._requests

    def written(self) -> str:
        """As text."""
        return json.dumps({"epoch_s": self._epoch_s, "requests": self._requests, "recent": self._recent})


class Reconciliation:
    """Compares Envoy's count with the journal's, again and again."""

    def __init__(
        self,
        seen: Seen,
        http: httpx.AsyncClient,
        envoy_admin: str,
        *,
        metrics: LedgerMetrics,
        log: Logger,
        clock_s: Callable[[], float],
        lag_s: float = LAG_S,
    ) -> None:
        """``lag_s``: so long after it has ended a request is in the journal."""
        self._seen = seen
        self._http = http
        self._envoy_admin = envoy_admin
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._lag_s = lag_s
        self._counts: deque[tuple[float, EnvoyCount]] = deque()
        self.unaccounted: int | None = None
        """Requests that Envoy counts and the journal has not told of; None until it is known."""

    async def run(self, interval_s: float = INTERVAL_S) -> None:
        """Compare until cancelled."""
        while True:
            await self.compare()
            await asyncio.sleep(interval_s)

    async def compare(self) -> tuple[EnvoyCount, int] | None:
        """Envoy's count and the journal's of the same Envoy, both of now; None where Envoy does not answer."""
        count = await self._ask()
        if count is None:
            return None
        now_s = self._clock_s()
        known = self._seen.of(count.started_s, now_s=now_s)
        while self._counts and abs(self._counts[0][1].started_s - count.started_s) > SAME_EPOCH_S:
            self._counts.popleft()
        self._counts.append((now_s, count))
        while len(self._counts) > 1 and self._counts[1][0] <= now_s - self._lag_s:
            self._counts.popleft()
        if self._counts[0][0] <= now_s - self._lag_s:
            self._tell(max(0, self._counts[0][1].completed - known))
        return count, known

    def _tell(self, unaccounted: int) -> None:
        if unaccounted and unaccounted != self.unaccounted:
            self._log.error("requests_unaccounted", requests=unaccounted)
        self.unaccounted = unaccounted
        self._metrics.unaccounted.set(unaccounted)

    async def _ask(self) -> EnvoyCount | None:
        base = f"http://{self._envoy_admin}"
        try:
            info = await self._http.get(f"{base}/server_info", timeout=TIMEOUT_S)
            asked_s = self._clock_s()
            query = {"format": "json", "filter": f"^({_COMPLETED}|{_RUNNING})$"}
            stats = await self._http.get(f"{base}/stats", params=query, timeout=TIMEOUT_S)
            age_s = int(str(info.json()["uptime_current_epoch"]).removesuffix("s"))
            found = {stat["name"]: int(stat["value"]) for stat in stats.json()["stats"] if "name" in stat}
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return EnvoyCount(
            started_s=int(asked_s) - age_s, completed=found.get(_COMPLETED, 0), running=found.get(_RUNNING, 0)
        )
