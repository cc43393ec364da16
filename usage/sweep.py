"""Closes what nobody has settled: requests whose access log entry was lost, or that have not ended in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final, Protocol, TypeVar

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.model import Closing
from policies.model import OrganizationId
from usage.metrics import LedgerMetrics

OVERDUE_MAX: Final = 1000
"""Of one organisation at a time."""
CALLS_MAX: Final = 50
"""To the store at once; admissions do not wait behind more."""

T = TypeVar("T")


class OpenEntries(Protocol):
    """The part of :class:`limits.store.LimitStore` that a sweep needs."""

    async def organizations(self) -> tuple[OrganizationId, ...]:
        """Organisations that have used the store."""
        ...

    async def overdue(self, organization_id: OrganizationId, /, *, most: int) -> tuple[str, ...]:
        """Request ids of open entries whose deadline has passed."""
        ...

    async def expire(self, organization_id: OrganizationId, request_id: str, /) -> Closing:
        """Close an overdue entry with what was reserved."""
        ...


async def sweep_every(interval_s: float, store: OpenEntries, *, metrics: LedgerMetrics, log: Logger) -> None:
    """Sweep again and again, until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            swept = await sweep(store, metrics=metrics)
        except StoreUnavailable as error:
            log.warning("sweep_given_up", error=str(error))
            continue
        if swept:
            log.info("overdue_closed", entries=swept)


async def sweep(store: OpenEntries, *, metrics: LedgerMetrics) -> int:
    """Close every overdue entry with what was reserved for it; how many there were.

    Raises:
        StoreUnavailable: the store is down; what is left is found again.
    """
    swept = 0
    for some in _parts(await store.organizations()):
        found = await asyncio.gather(*(store.overdue(organization, most=OVERDUE_MAX) for organization in some))
        for organization, request_ids in zip(some, found, strict=True):
            swept += await _expire(store, organization, request_ids, metrics)
    return swept


async def _expire(
    store: OpenEntries, organization: OrganizationId, request_ids: Sequence[str], metrics: LedgerMetrics
) -> int:
    expired = 0
    while request_ids:
        before = expired
        for some in _parts(request_ids):
            closings = await asyncio.gather(*(store.expire(organization, request_id) for request_id in some))
            closed = sum(closing.outcome == "expired" for closing in closings)
            metrics.swept.inc(closed)
            expired += closed
        if len(request_ids) < OVERDUE_MAX or expired == before:
            break
        request_ids = await store.overdue(organization, most=OVERDUE_MAX)
    return expired


def _parts(of: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(of), CALLS_MAX):
        yield of[start : start + CALLS_MAX]
