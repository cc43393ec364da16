"""What the workers count, in files that the supervisor adds up (prometheus_client's multiprocess mode)."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

ADMIT_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)


class RequestCounts:
    """Outcomes of requests; both labels come from closed sets (endpoint kinds; refusal reasons and four more)."""

    def __init__(self) -> None:
        counter = Counter(
            "router_requests_total",
            "Requests that ext_proc decided on, by what became of them.",
            ["endpoint", "outcome"],
        )
        self._labels = counter.labels
        self._known: dict[tuple[str, str], Counter] = {}

    def decided(self, endpoint: str, outcome: str) -> None:
        """Count one request."""
        child = self._known.get((endpoint, outcome))
        if child is None:
            child = self._known[endpoint, outcome] = self._labels(endpoint, outcome)
        child.inc()


class LimitMetrics:
    """The limit store as the workers meet it."""

    def __init__(self) -> None:
        self._admit = Histogram(
            "router_limit_admit_seconds",
            "From asking the limit store to its answer.",
            buckets=ADMIT_BUCKETS_S,
        )
        self._without = Counter(
            "router_limit_without_store_total",
            "Requests decided on while the limit store was down: allowed, local, local_denied or denied.",
            ["outcome"],
        )
        self._up = Gauge(
            "router_limit_store_up",
            "Workers that reach the limit store.",
            multiprocess_mode="livesum",
        )
        self._dropped = Counter(
            "router_audit_events_dropped_total",
            "Audit events that were not kept, because too many waited for the store.",
        )

        self._ledger = Gauge(
            "router_limit_ledger_here",
            "Workers that have heard of a ledger lately; the others do not count parallel requests.",
            multiprocess_mode="livesum",
        )
        self._ledger.set(1)
        self._up.set(0)

    def ledger_changed(self, is_here: bool) -> None:
        """The ledger came or went."""
        self._ledger.set(1 if is_here else 0)

    def admitted(self, seconds: float) -> None:
        """The store has answered an admission within so long."""
        self._admit.observe(seconds)

    def without_store(self, outcome: str) -> None:
        """A request was decided on without the store."""
        self._without.labels(outcome).inc()

    def store_changed(self, is_up: bool) -> None:
        """The store went up or down."""
        self._up.set(1 if is_up else 0)

    def audit_dropped(self, events: int) -> None:
        """Audit events were dropped."""
        self._dropped.inc(events)
