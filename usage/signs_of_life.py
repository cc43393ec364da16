"""Requests that still run are not overdue: passes on to the limit store what Envoy says of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from gateway.errors import StoreUnavailable
from policies.model import OrganizationId
from usage.access_log import Running

TOGETHER_MAX: Final = 50


class Deadlines(Protocol):
    """The part of :class:`limits.store.LimitStore` that puts off."""

    async def extend(self, organization_id: OrganizationId, request_id: str, /) -> bool:
        """The request still runs: put off when it is overdue."""
        ...


class SignsOfLife:
    """Takes signs of life; :meth:`run` passes them on. One that the store does not take is followed by another."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._waiting: dict[str, Running] = {}
        self._arrived = asyncio.Event()

    def take(self, running: Sequence[Running]) -> None:
        """Take what Envoy has said; a request once, however often it is told of."""
        self._waiting.update((one.request_id, one) for one in running)
        self._arrived.set()

    async def run(self) -> None:
        """Pass on until cancelled."""
        while True:
            await self._arrived.wait()
            some = list(self._waiting.values())[:TOGETHER_MAX]
            for one in some:
                del self._waiting[one.request_id]
            if not self._waiting:
                self._arrived.clear()
            calls = (self._deadlines.extend(one.organization_id, one.request_id) for one in some)
            for result in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(result, BaseException) and not isinstance(result, StoreUnavailable):
                    raise result
