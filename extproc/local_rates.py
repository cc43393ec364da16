"""Rates as one worker counts them for itself, while the limit store is down.

Of N workers each grants 1/N of every rate and burst, at least one request. Its buckets are full when the store goes
down, so a router admits in an outage at most what the limits allow, and once more a burst, or a minute's tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import ceil
from typing import Final

from limits.model import Denied, Figure, LimitKind
from policies.limits import CallerLimits, SubjectLimits
from policies.model import OrganizationId

SUBJECTS_MAX: Final = 10_000


@dataclass(slots=True)
class _Bucket:
    """``level`` units at ``at_s``; below zero after a request larger than the bucket."""

    level: float
    at_s: float

    def refill(self, capacity: float, per_s: float, now_s: float) -> None:
        self.level = min(capacity, self.level + max(0.0, now_s - self.at_s) * per_s)
        self.at_s = now_s


class LocalRates:
    """Buckets of requests and of tokens, full at first. ``workers`` share a limit; how many there are is bounded."""

    def __init__(self, *, workers: int) -> None:
        self._workers = workers
        self._buckets: OrderedDict[tuple[OrganizationId, str, LimitKind], _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def clear(self) -> None:
        """Forget everything: the store counts again."""
        self._buckets.clear()

    def take(
        self, organization_id: OrganizationId, limits: CallerLimits, *, tokens: int, now_s: float
    ) -> Denied | None:
        """Count a request in every bucket, or in none and say which denies. ``now_s`` is unix time."""
        wanted = [each for subject in limits.subjects for each in self._wanted(organization_id, subject, tokens, now_s)]
        longest: Denied | None = None
        for bucket, need, capacity, per_s, figure in wanted:
            short = min(need, capacity) - bucket.level
            if short > 0:
                wait_ms = max(1, ceil(short / per_s * 1000))
                if longest is None or wait_ms > (longest.wait_ms or 0):
                    longest = Denied(at_ms=round(now_s * 1000), wait_ms=wait_ms, denier=figure, figures=(figure,))
        if longest is not None:
            return longest
        for bucket, need, *_ in wanted:
            bucket.level -= need
        return None

    def _wanted(
        self, organization_id: OrganizationId, subject: SubjectLimits, tokens: int, now_s: float
    ) -> list[tuple[_Bucket, float, float, float, Figure]]:
        """Bucket, what is needed of it, capacity, refill a second, and its figure."""
        found = []
        rates: list[tuple[LimitKind, int | None, float, float]] = [
            (LimitKind.REQUESTS, subject.burst, subject.requests_per_second or 0, 1.0),
            (LimitKind.TOKENS, subject.tokens_per_minute, (subject.tokens_per_minute or 0) / 60, float(tokens)),
        ]
        for kind, limit, per_s, need in rates:
            if limit is None:
                continue
            capacity, per_worker_s = max(1.0, limit / self._workers), per_s / self._workers
            bucket = self._bucket((organization_id, subject.subject, kind), capacity, now_s)
            bucket.refill(capacity, per_worker_s, now_s)
            reset_ms = round((capacity - bucket.level) / per_worker_s * 1000)
            remaining = max(0, int(bucket.level))
            figure = Figure(kind, subject.subject, limit, remaining, reset_ms)
            found.append((bucket, need, capacity, per_worker_s, figure))
        return found

    def _bucket(self, key: tuple[OrganizationId, str, LimitKind], capacity: float, now_s: float) -> _Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(capacity, now_s)
            if len(self._buckets) > SUBJECTS_MAX:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket
