"""HTTP of the ext_proc supervisor: readiness for Envoy's status route, metrics of all workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from extproc.keys.redis_store import redis_client
from extproc.policy import FollowedPolicy
from extproc.status import StatusReporter
from gateway.endpoints import READYZ_PATH
from gateway.http import serve, tcp_listener, unix_listener
from gateway.settings import AUDIT_SOCKET, ExtprocSettings
from gateway.telemetry import Logger


def build_app(reporter: StatusReporter, *, metrics_dir: Path, workers: Callable[[], tuple[int, int]]) -> Starlette:
    """Readiness for Envoy's status route and ``/metrics`` for Prometheus."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(metrics_dir))  # type: ignore[no-untyped-call]
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    running = Gauge("router_extproc_workers", "Worker processes that run now.", registry=registry)
    running.set_function(lambda: workers()[0])

    async def readyz(_: Request) -> Response:
        report = await reporter.report()
        return JSONResponse(report.body, status_code=report.http_status)

    async def metrics(_: Request) -> Response:
        text = await asyncio.to_thread(generate_latest, registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route(READYZ_PATH, readyz), Route("/metrics", metrics)])


@contextlib.asynccontextmanager
async def _store_ping(settings: ExtprocSettings) -> AsyncIterator[Callable[[], Awaitable[object]] | None]:
    if not settings.redis_addr:
        yield None
        return
    client = redis_client(settings.redis_addr)
    try:
        yield client.ping
    finally:
        await client.aclose()


async def serve_status(
    settings: ExtprocSettings,
    *,
    socket: Path,
    metrics_dir: Path,
    workers: Callable[[], tuple[int, int]],
    version: str,
    log: Logger,
) -> None:
    """Serve status and metrics until cancelled."""
    policy = FollowedPolicy(settings, log=log)
    to_ledger = httpx.AsyncHTTPTransport(uds=str(settings.run_dir / AUDIT_SOCKET))
    async with (
        httpx.AsyncClient(trust_env=False) as http,
        httpx.AsyncClient(transport=to_ledger) as ledger,
        _store_ping(settings) as ping_store,
    ):
        reporter = StatusReporter(
            http=http,
            envoy_admin=settings.envoy_admin_address,
            xds_admin=settings.xds_admin_address or f"127.0.0.1:{settings.admin_port}",
            policy=lambda: policy.table().index.policy,
            workers=workers,
            ping_store=ping_store,
            ledger=ledger,
            service=settings.service_name,
            version=version,
        )
        app = build_app(reporter, metrics_dir=metrics_dir, workers=workers)
        following = asyncio.create_task(policy.follow())
        try:
            await serve(app, unix_listener(socket), tcp_listener("0.0.0.0", settings.extproc_metrics_port))
        finally:
            following.cancel()
