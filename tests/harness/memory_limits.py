"""The limit store in the memory of one process, for unit tests only: no server, and a clock that the test turns."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal
from urllib.parse import unquote

from gateway.errors import StoreUnavailable
from limits.model import (
    Admission,
    Admitted,
    Claimed,
    Closing,
    Credit,
    Demand,
    Denied,
    Figure,
    Opened,
    Settlement,
    StoredAnswer,
)
from limits.store import BudgetUnit
from policies.limits import CallerLimits
from policies.model import OrganizationId
from tests.harness.memory_books import (
    CLOSED_KEPT_US,
    EXPIRED_KEPT_US,
    PERIODS,
    SLOT_KEPT_US,
    Entry,
    Key,
    Line,
    Organization,
    Period,
    budgets_of,
    granted,
    lines_of,
    period_at,
)


class MemoryLimits:
    """See :class:`limits.store.LimitStore`. ``clock_s`` gives unix time."""

    def __init__(
        self, *, clock_s: Callable[[], float] = time.time, overdue_s: float = 900.0, claim_kept_s: float = 300.0
    ) -> None:
        self.clock_s = clock_s
        self.of: defaultdict[OrganizationId, Organization] = defaultdict(Organization)
        self._overdue_us = round(overdue_s * 1e6)
        self._claim_kept_us = round(claim_kept_s * 1e6)

    async def admit(self, demand: Demand, limits: CallerLimits) -> Admission:
        """See the Protocol."""
        now_us, organization = self._at(demand.organization_id)
        if demand.claim is not None and (held := organization.keys.get(demand.claim.key)) is not None:
            if held.fingerprint != demand.claim.fingerprint:
                return Claimed(state="mismatch")
            if held.state != "running" or held.owner != demand.request_id:
                return Claimed(state=held.state, answer=held.answer)
        at_ms = now_us // 1000
        opened = organization.entries.get(demand.request_id)
        if opened is not None:
            if opened.state != "open":
                raise StoreUnavailable("the request was given up before the store came to it")
            figures = _figures(lines_of(organization, limits, (0, 0), now_us), now_us, taken=False)
            return Admitted(
                at_ms=opened.admitted_us // 1000,
                tokens_output=opened.granted,
                micro_usd=opened.micro_usd,
                figures=figures,
            )
        output, micro_usd = granted(organization, demand, limits, now_us)
        entry = Entry("open", now_us + self._overdue_us, demand, output, micro_usd, admitted_us=now_us)
        lines = lines_of(organization, limits, entry.reserved, now_us)
        waits = [(line, wait_ms) for line in lines if (wait_ms := line.wait_ms()) != 0]
        figures = _figures(lines, now_us, taken=not waits)
        if waits:
            for line in lines:
                if line.bucket is not None:
                    line.bucket.since_us = min(line.bucket.since_us, now_us)
            denier, wait_ms = next((w for w in waits if w[1] is None), None) or max(waits, key=lambda w: w[1] or 0)
            return Denied(at_ms=at_ms, wait_ms=wait_ms, denier=figures[lines.index(denier)], figures=figures)
        self._open(organization, entry, lines, limits, now_us)
        return Admitted(at_ms=at_ms, tokens_output=output, micro_usd=micro_usd, figures=figures)

    async def look(self, organization_id: OrganizationId, limits: CallerLimits) -> tuple[Figure, ...]:
        """See the Protocol."""
        now_us, organization = self._at(organization_id)
        return _figures(lines_of(organization, limits, (0, 0), now_us), now_us, taken=False)

    async def settle(self, settlement: Settlement) -> Closing:
        """See the Protocol."""
        now_us, organization = self._at(settlement.organization_id)
        used = settlement.tokens, settlement.micro_usd
        entry = organization.entries.get(settlement.request_id)
        if entry is not None and entry.state == "closed":
            return Closing(outcome="repeated", tokens=0, micro_usd=0)
        organization.entries[settlement.request_id] = Entry("closed", now_us + CLOSED_KEPT_US)
        if entry is None:
            for name in settlement.charge_to.split():
                subject, _, period = name.rpartition(":")
                use = organization.uses[f"{unquote(subject)}:{period_at(period, settlement.admitted_s)[0]}"]
                use.spent = [use.spent[0] + used[0], use.spent[1] + used[1]]
            return Closing(outcome="charged", tokens=used[0], micro_usd=used[1])
        if entry.state == "expired":
            before = entry.reserved
            self._close(organization, settlement.request_id, entry, used)
            return Closing(outcome="settled", tokens=used[0] - before[0], micro_usd=used[1] - before[1])
        self._close(organization, settlement.request_id, entry, used)
        return Closing(outcome="settled", tokens=used[0], micro_usd=used[1])

    async def overdue(self, organization_id: OrganizationId, *, most: int) -> tuple[str, ...]:
        """See the Protocol."""
        now_us, organization = self._at(organization_id)
        found = [(e.until_us, request_id) for request_id, e in organization.entries.items() if e.state == "open"]
        return tuple(request_id for until_us, request_id in sorted(found) if until_us <= now_us)[:most]

    async def opened(self, organization_id: OrganizationId, request_id: str) -> Opened | None:
        """See the Protocol."""
        _, organization = self._at(organization_id)
        entry = organization.entries.get(request_id)
        if entry is None or entry.state != "open" or entry.demand is None:
            return None
        return Opened(
            request_id=request_id,
            organization_id=organization_id,
            key_id=entry.demand.key_id,
            admitted_ms=entry.admitted_us // 1000,
            tokens_input=entry.demand.tokens_input,
            tokens_output=entry.granted,
            micro_usd=entry.micro_usd,
            about=entry.demand.about,
        )

    async def extend(self, organization_id: OrganizationId, request_id: str) -> bool:
        """See the Protocol."""
        now_us, organization = self._at(organization_id)
        entry = organization.entries.get(request_id)
        if entry is None or entry.state != "open":
            return False
        entry.until_us = max(entry.until_us, now_us + self._overdue_us)
        for running in organization.parallel.values():
            if request_id in running:
                running[request_id] = max(running[request_id], now_us + min(self._overdue_us, SLOT_KEPT_US))
        return True

    async def expire(self, organization_id: OrganizationId, request_id: str) -> Closing:
        """See the Protocol."""
        now_us, organization = self._at(organization_id)
        entry = organization.entries.get(request_id)
        if entry is not None and entry.state == "closed":
            return Closing(outcome="repeated", tokens=0, micro_usd=0)
        if entry is None or entry.state == "expired" or entry.until_us > now_us:
            return Closing(outcome="none", tokens=0, micro_usd=0)
        self._close(organization, request_id, entry, entry.reserved)
        entry.state, entry.until_us = "expired", now_us + EXPIRED_KEPT_US
        return Closing(outcome="expired", tokens=entry.reserved[0], micro_usd=entry.reserved[1])

    async def finish(
        self,
        organization_id: OrganizationId,
        request_id: str,
        claim_key: str,
        answer: StoredAnswer | Literal["too_large"] | None,
    ) -> bool:
        """See the Protocol."""
        now_us, organization = self._at(organization_id)
        held = organization.keys.get(claim_key)
        if held is None or held.state != "running" or held.owner != request_id:
            return False
        if answer is None:
            del organization.keys[claim_key]
            return True
        held.until_us = now_us + self._claim_kept_us
        if answer == "too_large":
            held.state = "too_large"
        else:
            held.state, held.answer = "done", answer
        return True

    async def reset(self, organization_id: OrganizationId, subjects: Sequence[str]) -> tuple[Credit, ...]:
        """See the Protocol."""
        now_us, organization = self._at(organization_id)
        credited = []
        for subject in subjects:
            # Fresh ones: what is given back to those before goes nowhere.
            for kept in (organization.parallel, organization.requests, organization.tokens):
                kept.pop(subject, None)
            for period in PERIODS:
                name = f"{subject}:{period_at(period, now_us // 1_000_000)[0]}"
                if name in organization.uses:
                    credited.append(organization.uses[name].forgive(name))
        return tuple(credited)

    async def set_budget(
        self, organization_id: OrganizationId, subject: str, period: Period, unit: BudgetUnit, limit: int | None
    ) -> None:
        """See the Protocol."""
        _, organization = self._at(organization_id)
        if limit is None:
            organization.budgets.pop((subject, period, unit), None)
        else:
            organization.budgets[subject, period, unit] = limit

    async def organizations(self) -> tuple[OrganizationId, ...]:
        """See the Protocol."""
        return tuple(sorted(name for name, known in self.of.items() if known.entries))

    def _at(self, organization_id: OrganizationId) -> tuple[int, Organization]:
        """Now, and the organisation without what is out of date."""
        now_us, organization = round(self.clock_s() * 1e6), self.of[organization_id]
        for key in [key for key, held in organization.keys.items() if held.until_us <= now_us]:
            del organization.keys[key]
        gone = [i for i, e in organization.entries.items() if e.state != "open" and e.until_us <= now_us]
        for request_id in gone:
            del organization.entries[request_id]
        return now_us, organization

    @staticmethod
    def _open(organization: Organization, entry: Entry, lines: list[Line], limits: CallerLimits, now_us: int) -> None:
        demand = entry.demand
        assert demand is not None
        for budget in budgets_of(organization, limits, now_us):
            if budget.subject == "org" or budget.limits != (None, None):
                use = organization.uses[budget.name]
                use.reserved = [use.reserved[unit] + entry.reserved[unit] for unit in (0, 1)]
                entry.spends.append((use, use.resets))
        for line in lines:
            if line.bucket is not None:
                line.bucket.level, line.bucket.since_us = line.left - line.need, now_us
                entry.buckets += [line.bucket] if line.gives_back else []
            elif not line.ends_us:
                organization.parallel[line.subject][demand.request_id] = entry.until_us
        organization.entries[demand.request_id] = entry
        if demand.claim is not None:
            key = Key(demand.request_id, demand.claim.fingerprint, entry.until_us)
            organization.keys[demand.claim.key] = key

    @staticmethod
    def _close(organization: Organization, request_id: str, entry: Entry, used: tuple[int, int]) -> None:
        """Put what was used in the place of what was reserved, or of what was spent in its name."""
        more = [used[unit] - entry.reserved[unit] for unit in (0, 1)]
        for use, resets_seen in entry.spends:
            for unit in (0, 1):
                if entry.state == "open":
                    use.reserved[unit] -= entry.reserved[unit]
                    use.spent[unit] += used[unit]
                else:
                    use.spent[unit] += more[unit]
                if use.resets > resets_seen:
                    use.credited[unit] += more[unit]
        if entry.state != "open":
            return
        for bucket in entry.buckets:
            if bucket.level is not None:
                bucket.level -= more[0]
        for running in organization.parallel.values():
            running.pop(request_id, None)
        claim = entry.demand.claim if entry.demand is not None else None
        held = organization.keys.get(claim.key) if claim is not None else None
        if claim is not None and held is not None and held.state == "running" and held.owner == request_id:
            del organization.keys[claim.key]


def _figures(lines: list[Line], now_us: int, *, taken: bool) -> tuple[Figure, ...]:
    return tuple(line.figure(now_us, taken=taken) for line in lines)
