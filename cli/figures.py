"""Figures of limits as the commands show them: where each comes from, as rows of a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from rich.markup import escape
from rich.table import Table

from cli.shown import duration, iso, plain, usd
from limits.context import context_of
from limits.model import MONEY_KINDS, Figure, LimitKind
from limits.standing import BUDGETS, Standing
from policies.limits import ORGANIZATION_SUBJECT, CallerLimits, SubjectLimits
from policies.model import Budget, OrganizationId

Source = Literal["policy", "set", "none"]
"""``set`` by ``router budget set`` in the place of the policy's; ``none``: used is counted, but nothing limits it."""

NO_LIMIT: Final = 10**15
"""Stands for a budget that there is not, so that the store says what is used of it."""

_LABELS: Final[Mapping[LimitKind, str]] = {
    LimitKind.REQUESTS: "requests",
    LimitKind.TOKENS: "tokens",
    LimitKind.PARALLEL: "requests at once",
    LimitKind.DAILY_MICRO_USD: "daily usd",
    LimitKind.DAILY_TOKENS: "daily tokens",
    LimitKind.MONTHLY_MICRO_USD: "monthly usd",
    LimitKind.MONTHLY_TOKENS: "monthly tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure and where its limit comes from; ``rate`` says how fast a bucket fills."""

    figure: Figure
    source: Source
    rate: str = ""

    @property
    def used(self) -> int:
        """What is used of the limit."""
        return self.figure.limit - self.figure.remaining

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing passes any more."""
        return self.source != "none" and self.figure.remaining <= 0

    @property
    def label(self) -> str:
        """What the limit is about."""
        return _LABELS[self.figure.kind]


def amount(kind: LimitKind, value: int) -> str:
    """A number of requests or tokens, or dollars."""
    return usd(value) if kind in MONEY_KINDS else f"{value:,}"


def not_used(organization_id: OrganizationId) -> str:
    """What is said of an organisation without a request so far: its name may be misspelt."""
    return f"{plain(organization_id)} has not used anything: the store does not know it."


def with_every_budget(limits: CallerLimits) -> CallerLimits:
    """The limits with a budget of each period and unit for the organisation, whose use is counted without one too."""
    return replace(limits, subjects=tuple(_with_every_budget(subject) for subject in limits.subjects))


def _with_every_budget(subject: SubjectLimits) -> SubjectLimits:
    if subject.subject != ORGANIZATION_SUBJECT:
        return subject
    own = {budget.period: budget for budget in subject.budgets}
    periods: tuple[Literal["DAILY", "MONTHLY"], ...] = ("DAILY", "MONTHLY")
    filled = []
    for period in periods:
        budget = own.get(period) or Budget(period=period)
        usd_max = NO_LIMIT if budget.limit_micro_usd is None else budget.limit_micro_usd
        tokens_max = NO_LIMIT if budget.limit_tokens is None else budget.limit_tokens
        filled.append(Budget(period=period, limit_micro_usd=usd_max, limit_tokens=tokens_max))
    return replace(subject, budgets=tuple(filled))


def policy_budget(limits: CallerLimits, subject: str, kind: LimitKind) -> int | None:
    """What the policy gives a subject for a period; None: no budget."""
    period, unit = BUDGETS[kind]
    for limited in limits.subjects:
        for budget in limited.budgets:
            if limited.subject == subject and budget.period == period:
                return budget.limit_micro_usd if unit == "micro_usd" else budget.limit_tokens
    return None


def rows_of(figures: Iterable[Figure], limits: CallerLimits, standing: Standing) -> tuple[Row, ...]:
    """Rows of what a look with ``limits``, or with every budget of them, has given; the organisation's first."""
    subjects = {subject.subject: subject for subject in limits.subjects}
    ordered = sorted(figures, key=lambda figure: (figure.subject != ORGANIZATION_SUBJECT, figure.kind))
    return tuple(_row(figure, subjects[figure.subject], limits, standing) for figure in ordered)


def _row(figure: Figure, subject: SubjectLimits, limits: CallerLimits, standing: Standing) -> Row:
    match figure.kind:
        case LimitKind.REQUESTS:
            return Row(figure=figure, source="policy", rate=f"{subject.requests_per_second:,} a second")
        case LimitKind.TOKENS:
            return Row(figure=figure, source="policy", rate=f"{subject.tokens_per_minute:,} a minute")
        case LimitKind.PARALLEL:
            return Row(figure=figure, source="policy")
    if (figure.subject, figure.kind) in standing.budgets:
        return Row(figure=figure, source="set")
    limited = policy_budget(limits, figure.subject, figure.kind) is not None
    return Row(figure=figure, source="policy" if limited else "none")


def row_json(row: Row, standing: Standing) -> dict[str, Any]:
    """A row in the words of a refusal's ``limit_context``; money in dollars, and exactly in micro-dollars."""
    figure = row.figure
    limited = row.source != "none"
    fields = context_of(figure, at_ms=standing.at_ms).as_json()
    if not limited:
        fields |= {"limit": None, "remaining": None}
    if figure.kind in MONEY_KINDS:
        fields["micro_usd"] = {
            "limit": figure.limit if limited else None,
            "current_usage": row.used,
            "remaining": figure.remaining if limited else None,
        }
    return {**fields, "source": row.source}


def table_of(rows: Sequence[Row], standing: Standing) -> Table:
    """The rows, a line each."""
    table = Table(box=None, header_style="bold")
    for heading in ("WHOSE", "WHAT"):
        table.add_column(heading, overflow="fold")
    for heading in ("LIMIT", "USED", "REMAINING"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("RESETS")
    table.add_column("FROM")
    for row in rows:
        table.add_row(*_cells(row, standing))
    return table


def _cells(row: Row, standing: Standing) -> tuple[str, ...]:
    figure = row.figure
    whose = "organisation" if figure.subject == ORGANIZATION_SUBJECT else figure.subject.replace("/", " ", 1)
    what = f"{row.label} ({row.rate})" if row.rate else row.label
    limit, remaining = (amount(figure.kind, value) for value in (figure.limit, figure.remaining))
    if row.source == "none":
        limit, remaining = "none", "-"
    elif row.is_exhausted:
        remaining = f"[red]{remaining}[/]"
    source = {"policy": "policy", "set": "[yellow]budget set[/]", "none": "-"}[row.source]
    return escape(plain(whose)), what, limit, amount(figure.kind, row.used), remaining, _resets(row, standing), source


def _resets(row: Row, standing: Standing) -> str:
    figure = row.figure
    if figure.kind is LimitKind.PARALLEL or not figure.reset_ms:
        return "-"
    # Up to the second above, as a refusal says it: a client that waits so long succeeds.
    at_s = -(-(standing.at_ms + figure.reset_ms) // 1000)
    return f"in {duration(figure.reset_ms)} ({iso(at_s)})"
