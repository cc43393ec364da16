"""Requests that are admitted and settled on a limit store again and again, and what holds of them whatever happens."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from gateway.errors import StoreUnavailable
from limits.model import Admitted, Demand, LimitKind, Settlement, charge_to
from limits.valkey import ValkeyLimits, open_limits
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget, KeyId, OrganizationId
from tests.harness.process import WAIT_S

T = TypeVar("T")

ORG = OrganizationId("acme")
COST, TOKENS = 1000, 100
CAP = 10**12
LIMITS = CallerLimits(
    subjects=(
        SubjectLimits(subject="org", max_parallel=1000, budgets=(Budget(period="MONTHLY", limit_micro_usd=CAP),)),
    )
)
DEADLINE_S = 0.3
LATE_S = 1.2 * DEADLINE_S + 0.3
"""What no call takes longer than: the watch looks five times in a deadline, and a busy machine needs time itself."""
AT_ONCE_S = 0.05
"""What is no waiting."""


class Log:
    """A logger that remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.debug = self.info = self.warning = self.error = self._note

    def _note(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


@asynccontextmanager
async def a_store(address: str, **options: Any) -> AsyncIterator[ValkeyLimits]:
    """The store at an address, with a deadline that tests can wait for."""
    fields = {"deadline_s": DEADLINE_S, "log": cast(Any, Log())} | options
    async with open_limits(address, **fields) as store:
        yield store


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition`` gives something true."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, f"not within {WAIT_S} s: {what}"
        await asyncio.sleep(0.005)


class Load:
    """So many clients at once, of which each admits a request, settles it, and begins anew."""

    def __init__(self, store: ValkeyLimits, *, clients: int = 20, org: OrganizationId = ORG) -> None:
        self._store = store
        self._clients = clients
        self._org = org
        self._numbers = itertools.count()
        self.asked: list[str] = []
        self.done = 0
        self.failed: list[str] = []
        self.slowest_s = 0.0
        self._failing_from_s = 0.0
        self._failing_s: list[float] = []
        self.stopping = False

    def demand(self, request_id: str) -> Demand:
        """A request under that id."""
        return Demand(
            request_id=request_id,
            organization_id=self._org,
            key_id=KeyId("k1"),
            tokens_input=10,
            tokens_output=TOKENS - 10,
            micro_usd=COST,
        )

    def settlement(self, request_id: str) -> Settlement:
        """It used half of what was reserved, and is charged though the store has forgotten it."""
        return Settlement(
            request_id=request_id,
            organization_id=self._org,
            tokens=TOKENS // 2,
            micro_usd=COST // 2,
            admitted_s=int(time.time()),
            charge_to=charge_to(LIMITS),
        )

    async def _client(self) -> None:
        while not self.stopping:
            request_id = f"r-{next(self._numbers)}"
            self.asked.append(request_id)
            try:
                admission = await self._timed(self._store.admit(self.demand(request_id), LIMITS))
                assert isinstance(admission, Admitted), admission
                await self._timed(self._store.settle(self.settlement(request_id)))
                self.done += 1
            except StoreUnavailable as error:
                self.failed.append(str(error))
                await asyncio.sleep(0.002)  # or clients of a dead store take all of the processor

    async def _timed(self, call: Awaitable[T]) -> T:
        began_s = time.monotonic()
        failed = True
        try:
            answer = await call
            failed = False
            return answer
        finally:
            took_s = time.monotonic() - began_s
            self.slowest_s = max(self.slowest_s, took_s)
            if failed and began_s >= self._failing_from_s:
                self._failing_s.append(took_s)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Clients come and go while the block runs."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._clients):
                tasks.create_task(self._client())
            try:
                yield self
            finally:
                self.stopping = True

    async def more(self, count: int) -> None:
        """Wait until so many more requests were admitted and settled."""
        goal = self.done + count
        await until(lambda: self.done >= goal, f"{count} more requests")

    async def fail_at_once(self, count: int) -> None:
        """Wait until so many more requests have failed; those that begin now wait for nothing."""
        self._failing_from_s, self._failing_s = time.monotonic(), []
        goal = len(self.failed) + count
        await until(lambda: len(self.failed) >= goal, f"{count} more failures")
        assert sorted(self._failing_s)[9 * len(self._failing_s) // 10] < AT_ONCE_S  # a machine may stumble

    async def everything_counts_once(self) -> None:
        """Settle every request that was ever asked for, once more or at last; each has been charged once then."""
        for start in range(0, len(self.asked), 200):
            some = self.asked[start : start + 200]
            await asyncio.gather(*(self._store.settle(self.settlement(request_id)) for request_id in some))
        parallel = [f for f in await self._store.look(self._org, LIMITS) if f.kind is LimitKind.PARALLEL]
        assert [figure.remaining for figure in parallel] == [1000]
        (budget,) = [f for f in await self._store.look(self._org, LIMITS) if f.kind is LimitKind.MONTHLY_MICRO_USD]
        assert CAP - budget.remaining == len(self.asked) * (COST // 2)
