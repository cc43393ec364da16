"""Finds requests that nobody has told the end of, once they are overdue, and writes down what was reserved for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.model import Opened
from policies.model import OrganizationId
from usage.entries import estimate_of
from usage.metrics import LedgerMetrics
from usage.spool import Changes
from usage.writer import Writer

OVERDUE_MAX: Final = 1000
"""Of one organisation at a time; the rest is found by the next sweep."""
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

    async def opened(self, organization_id: OrganizationId, request_id: str, /) -> Opened | None:
        """What is kept of an open request."""
        ...


async def sweep_every(
    interval_s: float,
    store: OpenEntries,
    writer: Writer,
    *,
    caught_up: Callable[[], bool],
    metrics: LedgerMetrics,
    log: Logger,
) -> None:
    """Sweep again and again, until cancelled; not before everything that was told of has been read."""
    while True:
        await asyncio.sleep(interval_s)
        if not caught_up():
            continue
        try:
            swept = await sweep(store, writer, metrics=metrics)
        except StoreUnavailable as error:
            log.warning("sweep_given_up", error=str(error))
            continue
        if swept:
            log.warning("overdue_closed", requests=swept)


async def sweep(store: OpenEntries, writer: Writer, *, metrics: LedgerMetrics) -> int:
    """Write down an estimate of every overdue request, which then is settled as any; how many there were.

    Raises:
        StoreUnavailable: the store is down; what is left is found again.
    """
    swept = 0
    for some in _parts(await store.organizations()):
        found = await asyncio.gather(*(store.overdue(organization, most=OVERDUE_MAX) for organization in some))
        for organization, request_ids in zip(some, found, strict=True):
            for ids in _parts(request_ids):
                kept = await asyncio.gather(*(store.opened(organization, request_id) for request_id in ids))
                estimates = [estimate_of(opened) for opened in kept if opened is not None]
                await writer.write(Changes(entries=estimates))
                metrics.swept.inc(len(estimates))
                swept += len(estimates)
    return swept


def _parts(of: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(of), CALLS_MAX):
        yield of[start : start + CALLS_MAX]
