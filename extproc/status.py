"""Readiness with component checks, answered in well under a second also when everything behind it hangs.

Ready means: Envoy is live, a worker serves, a policy is in force and a backend can take a request. A store, a
control plane or a ledger that is down is shown, but serving goes on without them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from gateway import names
from policies.candidates import killed
from policies.model import Policy

CHECK_TIMEOUT_S = 0.5
FRESH_S = 0.5
"""A report is used again for so long, so that many probes cost one look."""

BackendStatus = Literal["healthy", "ejected", "unhealthy", "killed", "degraded", "unknown"]
_SERVING: frozenset[BackendStatus] = frozenset({"healthy", "degraded", "unknown"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One thing that was looked at."""

    status: Literal["up", "down", "not_configured"]
    detail: Mapping[str, object] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """For the response body."""
        return {"status": self.status, **self.detail}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What readiness answers: HTTP status and JSON body."""

    http_status: int
    body: Mapping[str, object]


def _host_status(host: Mapping[str, Any]) -> BackendStatus:
    health = host.get("health_status", {})
    if health.get("failed_outlier_check"):
        return "ejected"
    if health.get("failed_active_health_check"):
        return "unhealthy"
    return "healthy"


def _envoy_clusters(found: Mapping[str, Any]) -> dict[str, list[BackendStatus]]:
    return {
        str(cluster.get("name")): [_host_status(host) for host in cluster.get("host_statuses", [])]
        for cluster in found.get("cluster_statuses", [])
    }


def backend_statuses(policy: Policy, clusters: Mapping[str, list[BackendStatus]] | None) -> dict[str, BackendStatus]:
    """Status of every backend: what the policy says of it first, then what Envoy sees."""
    switched_off = killed(policy)
    degraded = {backend_id for entry in policy.models for backend_id in entry.degraded_backends}

    def status(backend_id: Any) -> BackendStatus:
        if backend_id in switched_off:
            return "killed"
        hosts = clusters.get(names.backend_cluster(backend_id), []) if clusters is not None else []
        seen: BackendStatus = "unknown"
        for candidate in ("healthy", "unhealthy", "ejected"):
            if candidate in hosts:
                seen = candidate
                break
        return "degraded" if seen in _SERVING and backend_id in degraded else seen

    return {backend.id: status(backend.id) for backend in policy.backends}


class StatusReporter:
    """Looks at every component at once, each with its own deadline."""

    def __init__(
        self,
        *,
        http: httpx.AsyncClient,
        envoy_admin: str,
        xds_admin: str,
        policy: Callable[[], Policy],
        workers: Callable[[], tuple[int, int]],
        ping_store: Callable[[], Awaitable[object]] | None,
        ledger: httpx.AsyncClient,
        service: str,
        version: str,
    ) -> None:
        """``workers`` gives how many run and how many should; ``ping_store`` is None where none is configured.

        ``ledger`` is connected to the ledger's socket, whatever the host of a URL is.
        """
        self._http = http
        self._envoy_admin = envoy_admin
        self._xds_admin = xds_admin
        self._policy = policy
        self._workers = workers
        self._ping_store = ping_store
        self._ledger = ledger
        self._service = service
        self._version = version
        self._looking: asyncio.Task[Report] | None = None
        self._looked_s = float("-inf")

    async def report(self) -> Report:
        """The report, not older than FRESH_S; concurrent callers share one look."""
        now_s = time.monotonic()
        if self._looking is None or (self._looking.done() and now_s - self._looked_s > FRESH_S):
            self._looked_s = now_s
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    async def _look(self) -> Report:
        (envoy, clusters), xds, store, usage = await asyncio.gather(
            self._envoy(), self._xds(), self._store(), self._usage()
        )
        running, wanted = self._workers()
        serving = [s for s in clusters.get(names.CLUSTER_EXTPROC, []) if s == "healthy"] if clusters else []
        extproc = Component(
            status="up" if running and (serving or clusters is None) else "down",
            detail={"workers": running, "workers_wanted": wanted, "workers_serving": len(serving)},
        )
        backends = backend_statuses(self._policy(), clusters)
        ready_backends = sum(status in _SERVING for status in backends.values())
        ready = envoy.status == "up" and extproc.status == "up" and ready_backends > 0
        components = {"envoy": envoy, "xds": xds, "extproc": extproc, "usage": usage, "store": store}
        whole = (
            all(component.status != "down" for component in components.values())
            and not xds.detail.get("warnings")
            and not usage.detail.get("warnings")
            and running == wanted
            and all(status == "healthy" for status in backends.values())
        )
        body = {
            "status": ("ready" if whole else "degraded") if ready else "not_ready",
            "service": self._service,
            "version": self._version,
            "components": {name: component.as_json() for name, component in components.items()},
            "backends": {
                "total": len(backends),
                "ready": ready_backends,
                "degraded": sum(status != "healthy" for status in backends.values()),
                "items": [{"id": backend_id, "status": status} for backend_id, status in sorted(backends.items())],
            },
        }
        return Report(http_status=200 if ready else 503, body=body)

    async def _get(self, url: str, http: httpx.AsyncClient | None = None) -> Any:
        """JSON at ``url``, or None when it did not come in time."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                response = await (http or self._http).get(url)
                return response.json()
        except (TimeoutError, httpx.HTTPError, ValueError):
            return None

    async def _envoy(self) -> tuple[Component, dict[str, list[BackendStatus]] | None]:
        found = await self._get(f"http://{self._envoy_admin}/clusters?format=json")
        if found is None:
            return Component(status="down"), None
        return Component(status="up"), _envoy_clusters(found)

    async def _xds(self) -> Component:
        found = await self._get(f"http://{self._xds_admin}/status")
        if found is None:
            return Component(status="down")
        return Component(
            status="up",
            detail={
                "policy": found.get("policy"),
                "source": found.get("source"),
                "warnings": [*found.get("problems", []), *found.get("fleet", {}).get("behind", [])],
            },
        )

    async def _usage(self) -> Component:
        found = await self._get("http://ledger/healthz", self._ledger)
        if found is None:
            return Component(status="down")
        told = ("undelivered", "oldest_undelivered_s", "unaccounted", "warnings")
        return Component(status="up", detail={name: found[name] for name in told if name in found})

    async def _store(self) -> Component:
        if self._ping_store is None:
            return Component(status="not_configured")
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self._ping_store()
        except Exception as error:  # noqa: BLE001 - whatever a client library raises, the store is not there
            return Component(status="down", detail={"error": type(error).__name__})
        return Component(status="up")
