"""What is asked of the limit store and what it answers, as values. Pure.

Money is integer micro-dollars, times are milliseconds where a name ends in ``_ms`` and seconds where it ends in ``_s``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple
from urllib.parse import quote

from policies.limits import CallerLimits
from policies.model import KeyId, OrganizationId


class LimitKind(IntEnum):
    """What a figure is about; the scripts know the numbers."""

    REQUESTS = 1
    TOKENS = 2
    PARALLEL = 3
    DAILY_MICRO_USD = 4
    DAILY_TOKENS = 5
    MONTHLY_MICRO_USD = 6
    MONTHLY_TOKENS = 7


BUDGET_PERIODS: dict[LimitKind, Literal["DAILY", "MONTHLY"]] = {
    LimitKind.DAILY_MICRO_USD: "DAILY",
    LimitKind.DAILY_TOKENS: "DAILY",
    LimitKind.MONTHLY_MICRO_USD: "MONTHLY",
    LimitKind.MONTHLY_TOKENS: "MONTHLY",
}
MONEY_KINDS = frozenset({LimitKind.DAILY_MICRO_USD, LimitKind.MONTHLY_MICRO_USD})


class Figure(NamedTuple):
    """One limit after a decision. ``reset_ms``: until it is whole again (bucket full, period over; 0 for parallel)."""

    kind: LimitKind
    subject: str
    limit: int
    remaining: int
    reset_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A client's idempotency key, and the fingerprint of what it was sent with. Both are hex digests."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one request may use at most.

    ``input_cost`` is in thousandths of a micro-dollar, ``output_price`` in micro-dollars per 1,000 tokens, both at the
    dearest backend; ``micro_usd`` is what ``tokens_input`` and ``tokens_output`` cost there, rounded up. ``choices`` is
    how many answers share the output. ``about`` is kept on the ledger entry as it is.
    """

    request_id: str
    organization_id: OrganizationId
    key_id: KeyId
    tokens_input: int
    tokens_output: int
    micro_usd: int
    input_cost: int = 0
    output_price: int = 0
    choices: int = 1
    claim: Claim | None = None
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    """An answer kept for repetition: headers by lower-case name."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The request may go: ``tokens_output`` is granted, ``micro_usd`` reserved.

    ``at_ms`` is unix time of the store when it was first admitted, if it was admitted before.
    """

    at_ms: int
    tokens_output: int
    micro_usd: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """A limit is in the way: ``denier`` is one of ``figures``. ``wait_ms`` None: waiting does not help."""

    at_ms: int
    wait_ms: int | None
    denier: Figure
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """The idempotency key has been used: ``answer`` is set where the state is ``done``."""

    state: Literal["running", "mismatch", "too_large", "done"]
    answer: StoredAnswer | None = None


Admission = Admitted | Denied | Claimed


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What a request used in the end.

    The last two are for a request that has no entry, because it was let through without the store, or the store lost
    it: unix seconds of its admission, and what it is to be charged to, see :func:`charge_to`.
    """

    request_id: str
    organization_id: OrganizationId
    tokens: int
    micro_usd: int
    admitted_s: int = 0
    charge_to: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """What became of an entry, and what was charged now: a difference, where it had been closed by estimate before.

    ``charged``: there was no entry. ``repeated``: it was closed already. ``none``: there is nothing overdue.
    """

    outcome: Literal["settled", "expired", "charged", "repeated", "none"]
    tokens: int
    micro_usd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A request that was admitted and has not been settled: what was reserved for it, and what its demand said."""

    request_id: str
    organization_id: OrganizationId
    key_id: KeyId
    admitted_ms: int
    tokens_input: int
    tokens_output: int
    micro_usd: int
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What a reset forgave of one period, such as ``org:DAILY:2026-11-25``."""

    period: str
    tokens: int
    micro_usd: int


def charge_to(limits: CallerLimits) -> str:
    """What a caller's use is charged to, whatever the day: ``org:DAILY org:MONTHLY …``, subjects percent-encoded."""
    periods = {"org:DAILY": None, "org:MONTHLY": None}
    for subject in limits.subjects:
        name = quote(subject.subject, safe="/")
        periods |= {f"{name}:{budget.period}": None for budget in subject.budgets}
    return " ".join(periods)
