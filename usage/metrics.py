"""What the ledger counts, and the HTTP server that tells of it."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class LedgerMetrics:
    """Counters and gauges of one ledger; the outcomes are those of :class:`limits.model.Closing`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.log_entries = Counter("router_usage_log_entries_total", "Access log entries received.", registry=registry)
        self.malformed = Counter(
            "router_usage_malformed_total", "Access log entries and messages that cannot be used.", registry=registry
        )
        self.settlements = Counter(
            "router_usage_settlements_total",
            "Requests settled in the limit store, by what became of their entries.",
            ["outcome"],
            registry=registry,
        )
        self.queue_entries = Gauge(
            "router_usage_queue_entries", "Requests received that the limit store has not taken yet.", registry=registry
        )
        self.dropped = Counter(
            "router_usage_dropped_total",
            "Requests not settled but left to the sweep, most because the queue was full.",
            registry=registry,
        )
        self.limit_store_up = Gauge(
            "router_usage_limit_store_up", "Whether the limit store can be used.", registry=registry
        )
        self.swept = Counter(
            "router_usage_swept_total", "Overdue requests closed with what was reserved.", registry=registry
        )


def build_app(registry: CollectorRegistry) -> Starlette:
    """``/metrics`` for Prometheus, ``/healthz`` for whoever wants to know that the program runs."""
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz)])
