"""A limit store under test and what stands behind it: time passes when the test says so, and its keys can be seen."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

from gateway.telemetry import get_logger
from limits.model import Demand
from limits.scripts import prefix
from limits.store import LimitStore
from limits.valkey import open_limits
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget, KeyId, OrganizationId
from tests.harness.memory_limits import MemoryLimits
from tests.harness.valkey import Server

OVERDUE_S = 900.0
CLAIM_KEPT_S = 300.0
DEADLINE_S = 20.0
"""So long that a busy machine fails no test that is not about time."""
NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)

_ids = itertools.count()


def an_organization() -> OrganizationId:
    """One that no other test uses."""
    return OrganizationId(f"org-{next(_ids)}")


def a_demand(organization_id: OrganizationId, **changes: Any) -> Demand:
    """A request of key ``k1`` for 10 + 90 tokens at 10 micro-dollars each, under an id of its own."""
    fields: dict[str, Any] = {
        "request_id": f"r-{next(_ids)}",
        "organization_id": organization_id,
        "key_id": KeyId("k1"),
        "tokens_input": 10,
        "tokens_output": 90,
        "micro_usd": 1000,
        "input_cost": 100_000,
        "output_price": 10_000,
    }
    return Demand(**(fields | changes))


def a_budget(period: Literal["DAILY", "MONTHLY"], unit: Literal["micro_usd", "tokens"], limit: int) -> Budget:
    """A budget in one unit."""
    return Budget(period=period, **{f"limit_{unit}": limit})


def limits_of(
    org: SubjectLimits | None = None, key: SubjectLimits | None = None, *, clamp_output: bool = False
) -> CallerLimits:
    """Limits of a caller: its organisation's, and its key's."""
    subjects = (org or SubjectLimits(subject="org"), key or SubjectLimits(subject="key/k1"))
    return CallerLimits(subjects=subjects, clamp_output=clamp_output)


def limits_for(subject: str, **fields: Any) -> CallerLimits:
    """Limits of ``org`` or of a key alone."""
    limits = SubjectLimits(subject=subject, **fields)
    return limits_of(org=limits) if subject == "org" else limits_of(key=limits)


class Case(Protocol):
    """A store and what stands behind it."""

    store: LimitStore

    def pass_time(self, organization_id: OrganizationId, seconds: float) -> None:
        """Let time pass; less than nothing: the clock goes back."""

    def end_period(self, organization_id: OrganizationId, period: Literal["DAILY", "MONTHLY"]) -> None:
        """Let the running day or month become the one before."""

    def now_ms(self) -> int:
        """Unix time of the store."""

    def uses(self, organization_id: OrganizationId) -> dict[str, dict[str, int]]:
        """What is kept of each period: by names such as ``org:DAILY:2026-11-25``."""

    def running(self, organization_id: OrganizationId) -> set[str]:
        """Ids that are in some set of parallel requests, or in that of open entries."""

    def kept(self, organization_id: OrganizationId) -> Any:
        """All that is kept; equal when nothing has changed."""


def _before(name: str) -> str:
    """The same with the period before: of a day or of a month."""
    head, _, date = name.rpartition(":")
    before = datetime.strptime((date + "-01")[:10], "%Y-%m-%d") - timedelta(days=1)
    return f"{head}:{before.strftime('%Y-%m-%d')[: len(date)]}"


class MemoryCase:
    """The store in memory."""

    def __init__(self) -> None:
        self.now_s = NOON.timestamp()
        self.memory = MemoryLimits(clock_s=lambda: self.now_s, overdue_s=OVERDUE_S, claim_kept_s=CLAIM_KEPT_S)
        self.store: LimitStore = self.memory

    def pass_time(self, organization_id: OrganizationId, seconds: float) -> None:
        """See :class:`Case`."""
        self.now_s += seconds

    def end_period(self, organization_id: OrganizationId, period: Literal["DAILY", "MONTHLY"]) -> None:
        """See :class:`Case`."""
        uses = self.memory.of[organization_id].uses
        for name in sorted(name for name in uses if f":{period}:" in name):
            uses[_before(name)] = uses.pop(name)

    def now_ms(self) -> int:
        """See :class:`Case`."""
        return int(self.now_s * 1000)

    def uses(self, organization_id: OrganizationId) -> dict[str, dict[str, int]]:
        """See :class:`Case`."""
        return {
            name: {
                "spent_tokens": use.spent[0],
                "spent_micro_usd": use.spent[1],
                "reserved_tokens": use.reserved[0],
                "reserved_micro_usd": use.reserved[1],
                "credited_tokens": use.credited[0],
                "credited_micro_usd": use.credited[1],
                "resets": use.resets,
            }
            for name, use in self.memory.of[organization_id].uses.items()
        }

    def running(self, organization_id: OrganizationId) -> set[str]:
        """See :class:`Case`."""
        known = self.memory.of[organization_id]
        opened = {request_id for request_id, entry in known.entries.items() if entry.state == "open"}
        return opened.union(*known.parallel.values())

    def kept(self, organization_id: OrganizationId) -> Any:
        """See :class:`Case`."""
        return copy.deepcopy(self.memory.of[organization_id].used())


_AGE = """
local by_us = tonumber(ARGV[1])
local by_ms = by_us / 1000
for _, key in ipairs(KEYS) do
  local kind = redis.call('TYPE', key).ok
  if kind == 'zset' then
    for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do redis.call('ZINCRBY', key, tostring(-by_ms), id) end
  elseif string.find(key, ':rate:', 1, true) then
    local requests_left, tokens_left, since_us, resets = cmsgpack.unpack(redis.call('GET', key))
    redis.call('SET', key, cmsgpack.pack(requests_left, tokens_left, since_us - by_us, resets), 'KEEPTTL')
  elseif string.find(key, ':entry:', 1, true) and redis.call('GET', key) ~= 'closed' then
    local entry = {cmsgpack.unpack(redis.call('GET', key))}
    entry[2], entry[3] = entry[2] - by_ms, entry[3] - by_ms
    redis.call('SET', key, cmsgpack.pack(unpack(entry)), 'KEEPTTL')
  end
  local ttl = redis.call('PTTL', key)
  if ttl >= 0 then redis.call('PEXPIRE', key, string.format('%.0f', ttl - by_ms)) end
end
"""
_RENAME_IN_ENTRY = """
if redis.call('GET', KEYS[1]) == 'closed' then return end
local entry = {cmsgpack.unpack(redis.call('GET', KEYS[1]))}
for i = 12, #entry do if entry[i] == ARGV[1] then entry[i] = ARGV[2] end end
redis.call('SET', KEYS[1], cmsgpack.pack(unpack(entry)), 'KEEPTTL')
"""


class ServerCase:
    """A store on a server. Its clock cannot be turned, so what it keeps is made older."""

    def __init__(self, server: Server, store: LimitStore) -> None:
        self.server = server
        self.store = store

    def pass_time(self, organization_id: OrganizationId, seconds: float) -> None:
        """See :class:`Case`."""
        if keys := self._keys(organization_id):
            self.server.client.eval(_AGE, len(keys), *keys, f"{seconds * 1e6:.0f}")

    def end_period(self, organization_id: OrganizationId, period: Literal["DAILY", "MONTHLY"]) -> None:
        """See :class:`Case`."""
        for key in self._keys(organization_id, f"spend:*:{period}:*"):
            new = _before(key.decode()).encode()
            self.server.client.rename(key, new)
            for entry in self._keys(organization_id, "entry:*"):
                self.server.client.eval(_RENAME_IN_ENTRY, 1, entry, key, new)

    def now_ms(self) -> int:
        """See :class:`Case`."""
        seconds, micros = self.server.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def uses(self, organization_id: OrganizationId) -> dict[str, dict[str, int]]:
        """See :class:`Case`."""
        start = prefix(organization_id) + b"spend:"
        found = self._keys(organization_id, "spend:*")
        return {key.removeprefix(start).decode(): self.server.use(key) for key in found}

    def running(self, organization_id: OrganizationId) -> set[str]:
        """See :class:`Case`."""
        sets = [*self._keys(organization_id, "parallel:*"), prefix(organization_id) + b"open"]
        return {member.decode() for key in sets for member in self.server.client.zrange(key, 0, -1)}

    def kept(self, organization_id: OrganizationId) -> Any:
        """See :class:`Case`."""
        return {key: self.server.client.dump(key) for key in self._keys(organization_id)}

    def _keys(self, organization_id: OrganizationId, pattern: str = "*") -> list[bytes]:
        start = re.sub(r"([*?\[\]\\])", r"\\\1", prefix(organization_id).decode())
        return sorted(self.server.client.scan_iter(start + pattern, count=1000))


@asynccontextmanager
async def a_case(server: Server | None, *, open_store: Callable[..., Any] = open_limits) -> AsyncIterator[Case]:
    """A store on a server, which forgets what it has, or in memory where there is none."""
    if server is None:
        yield MemoryCase()
        return
    server.client.flushall()
    opened = open_store(
        server.address, log=get_logger(), deadline_s=DEADLINE_S, overdue_s=OVERDUE_S, claim_kept_s=CLAIM_KEPT_S
    )
    async with opened as store:
        yield ServerCase(server, store)
