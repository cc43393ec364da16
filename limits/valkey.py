"""The limit store on Redis or Valkey: one script, one round trip for each call, on one pipelined connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal

import hiredis

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.admission import CallerPart, admit_command, caller_part, nobody, organization_part, read_admission
from limits.calls import Calls, load_scripts
from limits.commands import (
    expire_command,
    extend_command,
    finish_command,
    opened_command,
    read_closing,
    read_credits,
    read_opened,
    reset_command,
    settle_command,
)
from limits.connection import Connection
from limits.model import Admission, Admitted, Closing, Credit, Demand, Figure, Opened, Settlement, StoredAnswer
from limits.nodes import Nodes
from limits.resp import pack
from limits.scripts import ORGANIZATIONS, prefix, slot
from limits.store import BudgetUnit
from limits.wire import Reply
from policies.limits import CallerLimits
from policies.model import OrganizationId

DEADLINE_S: Final = 0.25
OVERDUE_S: Final = 900.0
CLAIM_KEPT_S: Final = 300.0
CALLERS_MAX: Final = 10_000


@dataclass(slots=True)
class _Organization:
    """What is worked out once: where it is, and its part of an admission."""

    slot: int
    admit: bytes
    registered: bool = False


class ValkeyLimits:
    """See :class:`limits.store.LimitStore`. Use :func:`open_limits`."""

    def __init__(self, nodes: Nodes, calls: Calls, *, overdue_s: float, claim_kept_s: float) -> None:
        self._nodes = nodes
        self._calls = calls
        self._overdue_ms = round(overdue_s * 1000)
        self._claim_kept_ms = round(claim_kept_s * 1000)
        self._callers: dict[int, CallerPart] = {}
        self._organizations: dict[OrganizationId, _Organization] = {}

    @property
    def connection(self) -> Connection:
        """For commands of others; what another node of a cluster is to answer is sent on to it."""
        return self._nodes.seed

    def forget_registrations(self) -> None:
        """Tell the store of every organisation again: it may have lost them."""
        for organization in self._organizations.values():
            organization.registered = False

    async def admit(self, demand: Demand, limits: CallerLimits) -> Admission:
        """One round trip; one more when the connection broke meanwhile or the server had lost the script."""
        caller = self._caller(limits)
        organization = self._organization(demand.organization_id)
        command = admit_command(organization.admit, demand, caller, overdue_ms=self._overdue_ms)
        registering = None if organization.registered else self._registering(demand.organization_id)
        # It may have been counted when the answer is lost. The same request again is not counted twice.
        reply = await self._calls.ask(organization.slot, command, repeatable=True)
        if registering is not None:
            organization.registered = await self._was_done(registering)
        admission = read_admission(reply, caller)
        if admission is None:
            raise StoreUnavailable("the request was given up before the store came to it")
        return admission

    async def look(self, organization_id: OrganizationId, limits: CallerLimits) -> tuple[Figure, ...]:
        """One round trip."""
        caller = self._caller(limits)
        part = organization_part(organization_id, mode=b"look")
        reply = await self._of(organization_id, admit_command(part, nobody(organization_id), caller, overdue_ms=0))
        admission = read_admission(reply, caller)
        assert isinstance(admission, Admitted)  # noqa: S101 - a look is never denied
        return admission.figures

    async def settle(self, settlement: Settlement) -> Closing:
        """One round trip."""
        return read_closing(await self._of(settlement.organization_id, settle_command(settlement)))

    async def overdue(self, organization_id: OrganizationId, *, most: int) -> tuple[str, ...]:
        """Two round trips: the store's clock decides."""
        seconds, _ = await self._of(organization_id, pack(b"TIME"))
        key, now_ms = prefix(organization_id) + b"open", b"%d" % (int(seconds) * 1000)
        oldest = pack(b"ZRANGEBYSCORE", key, b"-inf", now_ms, b"LIMIT", b"0", b"%d" % most)
        return tuple(request_id.decode() for request_id in await self._of(organization_id, oldest))

    async def opened(self, organization_id: OrganizationId, request_id: str) -> Opened | None:
        """One round trip."""
        reply = await self._of(organization_id, opened_command(organization_id, request_id))
        return read_opened(reply, organization_id, request_id)

    async def extend(self, organization_id: OrganizationId, request_id: str) -> bool:
        """One round trip."""
        command = extend_command(organization_id, request_id, overdue_ms=self._overdue_ms)
        return bool(await self._of(organization_id, command))

    async def expire(self, organization_id: OrganizationId, request_id: str) -> Closing:
        """One round trip."""
        return read_closing(await self._of(organization_id, expire_command(organization_id, request_id)))

    async def finish(
        self,
        organization_id: OrganizationId,
        request_id: str,
        claim_key: str,
        answer: StoredAnswer | Literal["too_large"] | None,
    ) -> bool:
        """One round trip."""
        command = finish_command(organization_id, request_id, claim_key, answer, kept_ms=self._claim_kept_ms)
        return bool(await self._of(organization_id, command))

    async def reset(self, organization_id: OrganizationId, subjects: Sequence[str]) -> tuple[Credit, ...]:
        """One round trip."""
        return read_credits(await self._of(organization_id, reset_command(organization_id, subjects)))

    async def set_budget(
        self,
        organization_id: OrganizationId,
        subject: str,
        period: Literal["DAILY", "MONTHLY"],
        unit: BudgetUnit,
        limit: int | None,
    ) -> None:
        """One round trip."""
        key, field = prefix(organization_id) + b"budgets", f"{subject}:{period}:{unit}".encode()
        command = pack(b"HDEL", key, field) if limit is None else pack(b"HSET", key, field, b"%d" % limit)
        await self._of(organization_id, command)

    async def organizations(self) -> tuple[OrganizationId, ...]:
        """One round trip."""
        found = await self._calls.ask(slot(ORGANIZATIONS), pack(b"SMEMBERS", ORGANIZATIONS))
        return tuple(sorted(OrganizationId(name.decode()) for name in found))

    def _organization(self, organization_id: OrganizationId) -> _Organization:
        found = self._organizations.get(organization_id)
        if found is None:
            if len(self._organizations) >= CALLERS_MAX:
                self._organizations.clear()
            part = organization_part(organization_id, mode=b"admit")
            found = self._organizations[organization_id] = _Organization(slot(prefix(organization_id)), part)
        return found

    def _caller(self, limits: CallerLimits) -> CallerPart:
        """Worked out once for each caller: hashing such a value takes longer than the look-up by identity."""
        found = self._callers.get(id(limits))
        if found is None or found.limits is not limits:
            if len(self._callers) >= CALLERS_MAX:
                self._callers.clear()
            found = self._callers[id(limits)] = caller_part(limits)
        return found

    def _registering(self, organization_id: OrganizationId) -> asyncio.Future[Reply]:
        return self._nodes.call(slot(ORGANIZATIONS), pack(b"SADD", ORGANIZATIONS, organization_id.encode()))

    @staticmethod
    async def _was_done(future: asyncio.Future[Reply]) -> bool:
        try:
            return not isinstance(await future, hiredis.ReplyError)
        except StoreUnavailable:
            return False  # the next admission does it

    async def _of(self, organization_id: OrganizationId, command: bytes) -> Reply:
        return await self._calls.ask(self._organization(organization_id).slot, command)


@asynccontextmanager
async def open_limits(
    address: str,
    *,
    log: Logger,
    deadline_s: float = DEADLINE_S,
    overdue_s: float = OVERDUE_S,
    claim_kept_s: float = CLAIM_KEPT_S,
    on_change: Callable[[bool], None] = lambda _: None,
) -> AsyncIterator[ValkeyLimits]:
    """The store at an address, connected while the block runs. A server that is down does not fail the start.

    Args:
        address: ``host:port``, ``redis://…``, ``rediss://…`` or ``unix:///path``; of a cluster, any node's.
        log: is told when the store goes down or up.
        deadline_s: for one call; a server that takes longer counts as down.
        overdue_s: after so long an entry that nobody has settled may be expired.
        claim_kept_s: how long an answer is kept for repetition.
        on_change: is told when the store goes up or down.

    Raises:
        ValueError: the address has no known form.
    """
    store: ValkeyLimits

    def changed(is_up: bool) -> None:
        store.forget_registrations()
        on_change(is_up)

    nodes = Nodes(address, prepare=load_scripts, deadline_s=deadline_s, log=log, on_change=changed)
    calls = Calls(nodes, deadline_s=deadline_s, log=log)
    store = ValkeyLimits(nodes, calls, overdue_s=overdue_s, claim_kept_s=claim_kept_s)
    try:
        await nodes.seed.wait_up(deadline_s)
        yield store
    finally:
        await nodes.close()
