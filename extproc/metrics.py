"""What the workers count, in files that the supervisor adds up (prometheus_client's multiprocess mode)."""

from __future__ import annotations

from prometheus_client import Counter


class RequestCounts:
    """Outcomes of requests; both labels come from closed sets (endpoint kinds; refusal reasons and three more)."""

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
