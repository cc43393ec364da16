"""The command that admits, as bytes, and its reply as values. What is the same for many requests is packed once."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from limits.model import Admission, Admitted, Claimed, Demand, Denied, Figure, LimitKind, StoredAnswer
from limits.msgpack import INTEGER, encode
from limits.resp import packed
from limits.scripts import ADMIT, prefix
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget, KeyId, OrganizationId

_PERIODS: Final[tuple[Literal["DAILY", "MONTHLY"], ...]] = ("DAILY", "MONTHLY")
AMOUNT_MAX: Final = 10**12
"""Tokens or micro-dollars of one request, whatever it asks for: sums stay whole numbers in the scripts."""
_NO_CLAIM: Final = packed(b"", b"")
_HEAD: Final = b"*13\r\n"  # EVALSHA, the script, one key, and nine arguments of it
_numbers: Final = struct.Struct(">" + 7 * "Bq").pack


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerPart:
    """What is the same under the same limits: the last argument, and what the figures are of by their codes."""

    limits: CallerLimits
    argument: bytes
    figures: dict[int, tuple[LimitKind, str]]


def caller_part(limits: CallerLimits) -> CallerPart:
    """Work it out."""
    # Those at the end that have no limit are looked at only where budgets have been set.
    limited = max((n for n, subject in enumerate(limits.subjects, 1) if not subject.is_empty or n == 1), default=0)
    values: list[str | int | bool | None] = [limits.clamp_output, limited, len(limits.subjects)]
    figures: dict[int, tuple[LimitKind, str]] = {}
    for number, subject in enumerate(limits.subjects, 1):
        values += _values_of(subject)
        figures |= {8 * number + kind: (kind, subject.subject) for kind in LimitKind}
    return CallerPart(limits=limits, argument=packed(encode(*values)), figures=figures)


def _values_of(subject: SubjectLimits) -> list[str | int | None]:
    by_period = {budget.period: budget for budget in subject.budgets}
    values: list[str | int | None] = [
        subject.subject,
        subject.requests_per_second,
        subject.burst,
        subject.tokens_per_minute,
        subject.max_parallel,
    ]
    for period in _PERIODS:
        budget = by_period.get(period) or Budget(period=period)
        values += [budget.limit_micro_usd, budget.limit_tokens]
    return values


def organization_part(organization_id: OrganizationId, *, mode: Literal[b"admit", b"look"]) -> bytes:
    """What is the same for every request of an organisation."""
    start = prefix(organization_id)
    return _HEAD + packed(b"EVALSHA", ADMIT.sha, b"1", start + b"open", start, mode)


def admit_command(organization: bytes, demand: Demand, caller: CallerPart, *, overdue_ms: int) -> bytes:
    """EVALSHA of admit.lua; ``organization`` is :func:`organization_part`."""
    request_id, key_id, about = demand.request_id.encode(), demand.key_id.encode(), demand.about.encode()
    claim, integer = demand.claim, INTEGER
    numbers = _numbers(
        *(integer, overdue_ms),
        *(integer, min(demand.tokens_input, AMOUNT_MAX)),
        *(integer, min(demand.tokens_output, AMOUNT_MAX)),
        *(integer, demand.choices),
        *(integer, demand.input_cost),
        *(integer, demand.output_price),
        *(integer, min(demand.micro_usd, AMOUNT_MAX)),
    )
    return b"%b$%d\r\n%b\r\n$63\r\n%b\r\n%b$%d\r\n%b\r\n$%d\r\n%b\r\n%b" % (
        organization,
        len(request_id),
        request_id,
        numbers,
        _NO_CLAIM if claim is None else packed(claim.key.encode(), claim.fingerprint.encode()),
        len(key_id),
        key_id,
        len(about),
        about,
        caller.argument,
    )


def nobody(organization_id: OrganizationId) -> Demand:
    """Who only looks."""
    return Demand(
        request_id="", organization_id=organization_id, key_id=KeyId(""), tokens_input=0, tokens_output=0, micro_usd=0
    )


def read_admission(reply: Sequence[Any], caller: CallerPart) -> Admission | None:
    """What admit.lua answered; None when the entry was closed before it could be opened."""
    match reply[0]:
        case b"OK":
            return Admitted(at_ms=reply[1], tokens_output=reply[2], micro_usd=reply[3], figures=_figures(reply, caller))
        case b"DENIED":
            figures, wait_ms = _figures(reply, caller), reply[2]
            denier = next(f for f in figures if (f.kind, f.subject) == caller.figures[reply[3]])
            return Denied(at_ms=reply[1], wait_ms=None if wait_ms < 0 else wait_ms, denier=denier, figures=figures)
        case b"REPLAY":
            headers = tuple((name, value) for name, value in json.loads(reply[2]))
            return Claimed(state="done", answer=StoredAnswer(status=int(reply[1]), headers=headers, body=reply[3]))
        case b"RUNNING":
            return Claimed(state="running")
        case b"MISMATCH":
            return Claimed(state="mismatch")
        case b"TOO_LARGE":
            return Claimed(state="too_large")
        case b"CLOSED":
            return None
        case other:
            raise AssertionError(other)


def _figures(reply: Sequence[Any], caller: CallerPart) -> tuple[Figure, ...]:
    of = caller.figures
    rows = zip(reply[4::4], reply[5::4], reply[6::4], reply[7::4], strict=True)
    return tuple([Figure(*of[code], limit, remaining, reset_ms) for code, limit, remaining, reset_ms in rows])
