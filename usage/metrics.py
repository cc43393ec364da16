"""What the ledger counts, and the HTTP server that tells of it."""

from __future__ import annotations

from collections.abc import Callable

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
        self.log_entries = Counter(
            "router_usage_log_entries_total", "Access log entries received by gRPC.", registry=registry
        )
        self.malformed = Counter(
            "router_usage_malformed_total", "Access log entries and messages that cannot be used.", registry=registry
        )
        self.recorded = Counter(
            "router_usage_requests_total",
            "Requests written down, by what became of them.",
            ["kind"],
            registry=registry,
        )
        self.settlements = Counter(
            "router_usage_settlements_total",
            "Requests settled in the limit store, by what became of their entries.",
            ["outcome"],
            registry=registry,
        )
        self.unsettled = Gauge(
            "router_usage_unsettled_requests",
            "Requests written down that the limit store has not taken yet, as far as they are in memory.",
            registry=registry,
        )
        self.swept = Counter(
            "router_usage_swept_total", "Overdue requests closed with what was reserved.", registry=registry
        )
        self.dropped = Counter(
            "router_usage_dropped_total",
            "Requests left to the journal or the sweep, most because the queue was full.",
            registry=registry,
        )
        self.queue_entries = Gauge(
            "router_usage_queue_entries", "Requests received that are not written down yet.", registry=registry
        )
        self.spool_writable = Gauge(
            "router_usage_spool_writable", "Whether the spool takes what is written to it.", registry=registry
        )
        self.spool_writable.set(1)
        self.spool_errors = Counter(
            "router_usage_spool_errors_total", "Writes to the spool that have failed.", registry=registry
        )
        self.spool_recovered = Counter(
            "router_usage_spool_recovered_total", "Starts that found the spool damaged.", registry=registry
        )
        self.delivered = Counter(
            "router_usage_delivered_total", "Records and audit events handed on.", ["topic"], registry=registry
        )
        self.undeliverable = Counter(
            "router_usage_undeliverable_total",
            "Records and events that the broker refuses for good.",
            registry=registry,
        )
        self.refused = Gauge(
            "router_usage_refused_records", "Records that could not be handed on, kept in the spool.", registry=registry
        )
        self.undelivered = Gauge(
            "router_usage_undelivered_requests", "Requests written down and not handed on yet.", registry=registry
        )
        self.oldest_undelivered_s = Gauge(
            "router_usage_oldest_undelivered_seconds", "Age of the oldest of them; 0: there is none.", registry=registry
        )
        self.events_skipped = Counter(
            "router_usage_audit_events_skipped_total",
            "Denials of callers that nobody knows that were not kept, because there were too many in their minute.",
            registry=registry,
        )
        self.journal_unread_bytes = Gauge(
            "router_usage_journal_unread_bytes", "What is in Envoy's journal and has not been read.", registry=registry
        )
        self.unaccounted = Gauge(
            "router_usage_unaccounted_requests",
            "Requests that Envoy has counted and the ledger does not know.",
            registry=registry,
        )
        self.limit_store_up = Gauge(
            "router_usage_limit_store_up", "Whether the limit store can be used.", registry=registry
        )

    def malformed_so_far(self) -> float:
        """What :attr:`malformed` has counted."""
        samples = (sample for metric in self.malformed.collect() for sample in metric.samples)
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))


def build_app(registry: CollectorRegistry, health: Callable[[], dict[str, object]]) -> Starlette:
    """``/metrics`` for Prometheus, ``/healthz`` for whoever wants to know that the program runs, and how well."""
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok", **health()})

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz)])
