"""Figures of limits in the words of the contract: for refusals, receipts and commands. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, Literal

from gateway.errors import LimitContext
from limits.model import BUDGET_PERIODS, MONEY_KINDS, Figure, LimitKind
from policies.limits import ORGANIZATION_SUBJECT

_MICRO_PER_USD: Final = 1_000_000
_UNITS: Final[dict[LimitKind, Literal["requests", "tokens", "usd"]]] = {
    LimitKind.REQUESTS: "requests",
    LimitKind.TOKENS: "tokens",
    LimitKind.PARALLEL: "requests",
    LimitKind.DAILY_MICRO_USD: "usd",
    LimitKind.DAILY_TOKENS: "tokens",
    LimitKind.MONTHLY_MICRO_USD: "usd",
    LimitKind.MONTHLY_TOKENS: "tokens",
}
_WINDOWS: Final = {LimitKind.REQUESTS: "burst", LimitKind.TOKENS: "1m", LimitKind.PARALLEL: "parallel"}


def context_of(figure: Figure, *, at_ms: int) -> LimitContext:
    """The figure of a limit as clients and auditors read it."""
    limit, remaining = figure.limit, figure.remaining
    money = figure.kind in MONEY_KINDS
    return LimitContext(
        subject="organization" if figure.subject == ORGANIZATION_SUBJECT else "api_key",
        unit=_UNITS[figure.kind],
        limit=limit / _MICRO_PER_USD if money else limit,
        current_usage=(limit - remaining) / _MICRO_PER_USD if money else limit - remaining,
        remaining=remaining / _MICRO_PER_USD if money else remaining,
        period=BUDGET_PERIODS.get(figure.kind),
        window=_WINDOWS.get(figure.kind),
        reset_at=_moment(at_ms + figure.reset_ms),
    )


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(-(-ms // 1000), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
