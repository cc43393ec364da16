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
    may: Callable[[], bool],
    settle: Callable[[], None],
    metrics: LedgerMetrics,
    log: Logger,
) -> None:
    """Sweep again and again, until cancelled.

    Args:
        interval_s: between two sweeps.
        store: knows what is overdue.
        writer: takes the estimates.
        may: everything that was told of has been read, and what runs has had the time to be heard of.
        settle: is told that there is something to settle.
        metrics: counts.
        log: is told of what was closed, and why something was not.
    """
    while True:
        await asyncio.sleep(interval_s)
        if not may():
            continue
        try:
            swept = await sweep(store, writer, settle=settle, metrics=metrics)
        except StoreUnavailable as error:
            log.warning("sweep_given_up", error=str(error))
            continue
        if swept:
            log.warning("overdue_closed", requests=swept)


async def sweep(
    store: OpenEntries, writer: Writer, *, metrics: LedgerMetrics, settle: Callable[[], None] = lambda: None
) -> int:
    """Write down an estimate of every overdue request, which then is settled as any; how many there were.

    One that is written down already has been settled before, and the store has lost that: it is settled again.

    Raises:
        StoreUnavailable: the store is down, or a part of it; what is left is found again.
    """
    swept, unavailable = 0, None
    for some in _parts(await store.organizations()):
        calls = (store.overdue(organization, most=OVERDUE_MAX) for organization in some)
        found = await asyncio.gather(*calls, return_exceptions=True)
        for organization, request_ids in zip(some, found, strict=True):
            if isinstance(request_ids, StoreUnavailable):
                unavailable = request_ids
            elif isinstance(request_ids, BaseException):
                raise request_ids
            else:
                swept += await _sweep_one(store, writer, organization, request_ids, settle)
    metrics.swept.inc(swept)
    if unavailable is not None:
        raise unavailable
    return swept


async def _sweep_one(
    store: OpenEntries,
    writer: Writer,
    organization: OrganizationId,
    request_ids: Sequence[str],
    settle: Callable[[], None],
) -> int:
    swept = 0
    for ids in _parts(request_ids):
        kept = await asyncio.gather(*(store.opened(organization, request_id) for request_id in ids))
        estimates = [estimate_of(opened) for opened in kept if opened is not None]
        if estimates:
            await writer.write(Changes(entries=estimates))
            settle()
            swept += len(estimates)
    return swept


def _parts(of: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(of), CALLS_MAX):
        yield of[start : start + CALLS_MAX]
