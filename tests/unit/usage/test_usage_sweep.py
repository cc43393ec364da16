"""The sweep: every overdue entry of every organisation, and nothing for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from gateway.errors import StoreUnavailable
from limits.model import Closing
from policies.model import OrganizationId
from tests.unit.usage.usage_builders import until
from usage.metrics import LedgerMetrics
from usage.sweep import CALLS_MAX, OVERDUE_MAX, sweep, sweep_every


class Entries:
    """Overdue entries by organisation; those in ``stuck`` cannot be closed."""

    def __init__(self, **overdue: Sequence[str]) -> None:
        self.overdue_of = {OrganizationId(name): list(entries) for name, entries in overdue.items()}
        self.stuck: set[str] = set()
        self.is_down = False
        self.looks = 0
        self.most_at_once = 0
        self._at_once = 0

    async def organizations(self) -> tuple[OrganizationId, ...]:
        """All that have entries."""
        self.looks += 1
        if self.is_down:
            raise StoreUnavailable("no")
        return tuple(self.overdue_of)

    async def overdue(self, organization_id: OrganizationId, *, most: int) -> tuple[str, ...]:
        """The oldest."""
        await self._wait()
        return tuple(self.overdue_of[organization_id][:most])

    async def expire(self, organization_id: OrganizationId, request_id: str) -> Closing:
        """Close one."""
        await self._wait()
        if request_id in self.stuck:
            return Closing(outcome="repeated", tokens=0, micro_usd=0)
        self.overdue_of[organization_id].remove(request_id)
        return Closing(outcome="expired", tokens=1, micro_usd=1)

    async def _wait(self) -> None:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0)
        self._at_once -= 1

    @property
    def left(self) -> int:
        """How many there are."""
        return sum(map(len, self.overdue_of.values()))


def requests(count: int) -> list[str]:
    return [f"r{number}" for number in range(count)]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


async def test_everything_overdue_is_closed_and_counted(registry: CollectorRegistry) -> None:
    entries = Entries(acme=requests(3), other=requests(2 * OVERDUE_MAX + 1), idle=())
    assert await sweep(entries, metrics=LedgerMetrics(registry)) == 2 * OVERDUE_MAX + 4
    assert entries.left == 0
    assert registry.get_sample_value("router_usage_swept_total") == 2 * OVERDUE_MAX + 4


async def test_store_is_never_asked_more_at_once_than_admissions_can_bear(registry: CollectorRegistry) -> None:
    entries = Entries(**{f"o{number}": requests(2) for number in range(3 * CALLS_MAX)}, acme=requests(500))
    assert await sweep(entries, metrics=LedgerMetrics(registry)) == 6 * CALLS_MAX + 500
    assert entries.most_at_once == CALLS_MAX


async def test_entries_that_cannot_be_closed_are_left_for_the_next_time(registry: CollectorRegistry) -> None:
    entries = Entries(acme=requests(OVERDUE_MAX + 10))
    entries.stuck = set(requests(OVERDUE_MAX))
    assert await sweep(entries, metrics=LedgerMetrics(registry)) == 0
    assert registry.get_sample_value("router_usage_swept_total") == 0


async def test_sweeping_goes_on_when_the_store_is_back(registry: CollectorRegistry) -> None:
    class Log:
        def __init__(self) -> None:
            self.events: list[str] = []
            self.info = self.warning = self._note

        def _note(self, event: str, **_: object) -> None:
            self.events.append(event)

    entries, log = Entries(acme=requests(3)), Log()
    entries.is_down = True
    sweeping = asyncio.create_task(sweep_every(0.001, entries, metrics=LedgerMetrics(registry), log=cast(Any, log)))
    try:
        await until(lambda: entries.looks >= 2)
        entries.is_down = False
        await until(lambda: "overdue_closed" in log.events)
    finally:
        sweeping.cancel()
    assert entries.left == 0
    assert log.events[0] == "sweep_given_up"
