"""What the limit store in memory keeps, and how it holds a request against it. No I/O, no clock."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from limits.model import Credit, Demand, Figure, LimitKind, StoredAnswer
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget

SLACK = 1e-6
CLOCK_MS = 0.01
SLOT_WAIT_MS = 1000
SLOT_KEPT_US = 300_000_000
CLOSED_KEPT_US = 600_000_000
EXPIRED_KEPT_US = 86_400_000_000
Period = Literal["DAILY", "MONTHLY"]
PERIODS: tuple[Period, ...] = ("DAILY", "MONTHLY")


@dataclass(slots=True)
class Use:
    """What a subject has used of one period."""

    spent: list[int] = field(default_factory=lambda: [0, 0])  # tokens, micro-dollars, here and below
    reserved: list[int] = field(default_factory=lambda: [0, 0])
    credited: list[int] = field(default_factory=lambda: [0, 0])
    resets: int = 0

    def left(self, unit: int, limit: int) -> int:
        """What is left of a budget."""
        return limit + self.credited[unit] - self.spent[unit] - self.reserved[unit]

    def forgive(self, name: str) -> Credit:
        """Credit what was used, so that all of a budget is left."""
        tokens, micro_usd = -self.left(0, 0), -self.left(1, 0)
        self.credited = [self.credited[0] + tokens, self.credited[1] + micro_usd]
        self.resets += 1
        return Credit(period=name, tokens=tokens, micro_usd=micro_usd)


@dataclass(slots=True)
class Bucket:
    """How much is in it, and since when; None: it is full."""

    level: float | None = None
    since_us: int = 0

    def level_at(self, now_us: int, capacity: int, per_s: float) -> float:
        """How much is in it now."""
        if self.level is None:
            return capacity
        return min(capacity, self.level + max(0, now_us - self.since_us) * per_s / 1e6)


@dataclass(slots=True)
class Entry:
    """A request that was admitted, or what is left of it."""

    state: Literal["open", "expired", "closed"]
    until_us: int
    demand: Demand | None = None
    granted: int = 0
    micro_usd: int = 0
    admitted_us: int = 0
    spends: list[tuple[Use, int]] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)

    @property
    def reserved(self) -> tuple[int, int]:
        """Tokens and micro-dollars."""
        assert self.demand is not None
        return self.demand.tokens_input + self.granted, self.micro_usd


@dataclass(slots=True)
class Key:
    """An idempotency key in use."""

    owner: str
    fingerprint: str
    until_us: int
    state: Literal["running", "too_large", "done"] = "running"
    answer: StoredAnswer | None = None


@dataclass(slots=True)
class Organization:
    """All that is known of one."""

    entries: dict[str, Entry] = field(default_factory=dict)
    uses: defaultdict[str, Use] = field(default_factory=lambda: defaultdict(Use))
    requests: defaultdict[str, Bucket] = field(default_factory=lambda: defaultdict(Bucket))
    tokens: defaultdict[str, Bucket] = field(default_factory=lambda: defaultdict(Bucket))
    parallel: defaultdict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    budgets: dict[tuple[str, str, str], int] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)

    def used(self) -> dict[str, object]:
        """What it keeps, without buckets that nobody has taken from."""
        kept: dict[str, object] = {name: getattr(self, name) for name in ("entries", "uses", "budgets", "keys")}
        kept["parallel"] = {name: running for name, running in self.parallel.items() if running}
        for name, buckets in (("requests", self.requests), ("tokens", self.tokens)):
            kept[name] = {subject: bucket for subject, bucket in buckets.items() if bucket.level is not None}
        return kept


@dataclass(slots=True, kw_only=True)
class Line:
    """One limit while a request is held against it."""

    kind: LimitKind
    subject: str
    limit: int
    left: float
    need: int
    per_s: float = 0.0
    ends_us: int = 0
    bucket: Bucket | None = None

    @property
    def gives_back(self) -> bool:
        """Whether a settlement corrects it."""
        return self.kind is LimitKind.TOKENS

    def wait_ms(self) -> int | None:
        """How long until it lets the request pass: 0 now, None never."""
        if self.ends_us:
            return None if self.need > max(0, self.left) else 0
        if self.bucket is None:
            return SLOT_WAIT_MS if self.left < 1 else 0
        short = min(self.need, self.limit) - self.left
        return math.floor(short / self.per_s * 1000 + CLOCK_MS) + 1 if short > SLACK else 0

    def figure(self, now_us: int, *, taken: bool) -> Figure:
        """What is told of it."""
        left = self.left - (self.need if taken else 0)
        if self.ends_us:
            return Figure(self.kind, self.subject, self.limit, int(left), self.ends_us // 1000 - now_us // 1000)
        reset_ms = 0 if self.bucket is None else math.ceil(max(0.0, (self.limit - left) / self.per_s * 1000))
        return Figure(self.kind, self.subject, self.limit, math.floor(max(0.0, left + SLACK)), reset_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetOf:
    """The budgets of one subject in one period. ``name`` is that of the use; limits: tokens, micro-dollars."""

    subject: str
    name: str
    kinds: tuple[LimitKind, LimitKind]
    limits: tuple[int | None, int | None]
    ends_us: int


def budgets_of(organization: Organization, limits: CallerLimits, now_us: int) -> Iterator[BudgetOf]:
    """Every subject's day and month, with the budgets that were set in the place of the policy's."""
    for subject in limits.subjects:
        for period in PERIODS:
            name, ends_us = period_at(period, now_us // 1_000_000)
            given = next((b for b in subject.budgets if b.period == period), Budget(period=period))
            put = organization.budgets
            yield BudgetOf(
                subject=subject.subject,
                name=f"{subject.subject}:{name}",
                kinds=(LimitKind[f"{period}_TOKENS"], LimitKind[f"{period}_MICRO_USD"]),
                limits=(
                    put.get((subject.subject, period, "tokens"), given.limit_tokens),
                    put.get((subject.subject, period, "micro_usd"), given.limit_micro_usd),
                ),
                ends_us=ends_us,
            )


def lines_of(organization: Organization, limits: CallerLimits, needs: tuple[int, int], now_us: int) -> list[Line]:
    """Every limit, while a request needs so many tokens and micro-dollars."""
    lines = []
    for budget in budgets_of(organization, limits, now_us):
        use = organization.uses.get(budget.name) or Use()
        for unit in (1, 0):
            limit = budget.limits[unit]
            if limit is not None:
                line = Line(
                    kind=budget.kinds[unit],
                    subject=budget.subject,
                    limit=limit,
                    left=use.left(unit, limit),
                    need=needs[unit],
                    ends_us=budget.ends_us,
                )
                lines.append(line)
    for subject in limits.subjects:
        lines += _rate_lines(organization, subject, needs[0], now_us)
    return lines


def _rate_lines(organization: Organization, subject: SubjectLimits, tokens: int, now_us: int) -> Iterator[Line]:
    name = subject.subject
    buckets = (
        (LimitKind.REQUESTS, organization.requests, subject.burst, subject.requests_per_second, 1),
        (LimitKind.TOKENS, organization.tokens, subject.tokens_per_minute, subject.tokens_per_minute, tokens),
    )
    for kind, kept, capacity, rate, need in buckets:
        if capacity is not None and rate is not None:
            per_s = rate / 60 if kind is LimitKind.TOKENS else float(rate)
            bucket = kept[name]
            left = bucket.level_at(now_us, capacity, per_s)
            yield Line(kind=kind, subject=name, limit=capacity, left=left, need=need, per_s=per_s, bucket=bucket)
    if subject.max_parallel is not None:
        running = sum(until_us >= now_us for until_us in organization.parallel[name].values())
        limit = subject.max_parallel
        yield Line(kind=LimitKind.PARALLEL, subject=name, limit=limit, left=limit - running, need=1)


def granted(organization: Organization, demand: Demand, limits: CallerLimits, now_us: int) -> tuple[int, int]:
    """Output tokens, cut to what every budget pays for, and micro-dollars that are reserved."""
    asked = output = demand.tokens_output
    if not limits.clamp_output or asked == 0:
        return asked, demand.micro_usd
    for budget in budgets_of(organization, limits, now_us):
        use, (tokens, usd) = organization.uses.get(budget.name) or Use(), budget.limits
        if tokens is not None:
            output = min(output, use.left(0, tokens) - demand.tokens_input)
        if usd is not None and demand.output_price > 0:
            output = min(output, (use.left(1, usd) * 1000 - demand.input_cost) // demand.output_price)
    output = output // demand.choices * demand.choices
    if output < demand.choices or output == asked:
        return asked, demand.micro_usd
    return output, -(-(demand.input_cost + output * demand.output_price) // 1000)


def period_at(period: str, at_s: int) -> tuple[str, int]:
    """Name of the period that a moment lies in, and the microsecond at which it ends."""
    at = datetime.fromtimestamp(at_s, UTC)
    if period == "DAILY":
        return f"DAILY:{at:%Y-%m-%d}", (at_s // 86400 + 1) * 86_400_000_000
    after = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
    return f"MONTHLY:{at:%Y-%m}", int(after.timestamp()) * 1_000_000
