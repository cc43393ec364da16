"""Usage records: what finance bills from. Pure. Source: contract, "Usage record"; docs/usage-record.schema.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal
from uuid import UUID

from gateway import names
from gateway.errors import REFUSALS, Reason
from limits.figures import read as read_figures
from limits.model import BUDGET_PERIODS, MONEY_KINDS, Figure
from usage.finished import Finished
from usage.settle import Used

RECORDS: Final = UUID("6f0c3f0e-8a0d-5a46-9d5b-3c1f6f6f7a51")
"""Namespace of record ids: the same request has the same id however often it is told of."""
MICRO: Final = 1_000_000
_LIMIT_STATES: Final = {
    REFUSALS[Reason.REQUEST_RATE].code: "RATE_LIMITED",
    REFUSALS[Reason.BUDGET_SPENT].code: "BUDGET_EXCEEDED",
    REFUSALS[Reason.QUOTA_SPENT].code: "BUDGET_EXCEEDED",
}
_BY_REASON: Final[dict[str, Literal["repeated", "listed"]]] = {
    names.REASON_REPEATED: "repeated",
    names.REASON_LISTED: "listed",
}

Kind = Literal["forwarded", "limited", "refused", "repeated", "listed", "anonymous"]
"""What became of a request. ``forwarded`` and ``limited`` ones have a usage record; ``anonymous``: nobody was known."""
BILLED: Final[frozenset[Kind]] = frozenset({"forwarded", "limited"})


def kind_of(finished: Finished) -> Kind:
    """What became of a request."""
    if not finished.organization_id:
        return "anonymous"
    if finished.reason in _LIMIT_STATES:
        return "limited"
    if finished.reason in _BY_REASON:
        return _BY_REASON[finished.reason]
    return "forwarded" if finished.admitted and finished.model else "refused"


def record_id(request_id: str) -> str:
    """The id of a request's record."""
    # What uuid.uuid5 does, in a third of the time.
    digest = hashlib.sha1(RECORDS.bytes + request_id.encode()).digest()  # noqa: S324 - RFC 9562, version 5
    number = int.from_bytes(digest[:16], "big")
    text = f"{number & ~(0xF000_C000 << 48) | 0x5000_8000 << 48:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def price_version(line: str) -> str:
    """Short digest of prices as ``policies.price`` writes them: equal prices, equal version."""
    return _digest(line) if line else ""


@lru_cache(maxsize=1024)
def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:12]


def iso(unix_us: int) -> str:
    """RFC 3339 in UTC, with microseconds."""
    return f"{_second(unix_us // MICRO)}.{unix_us % MICRO:06d}Z"


@lru_cache(maxsize=256)
def _second(unix_s: int) -> str:
    """Of the requests of one second the same."""
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%dT%H:%M:%S}"


def record_of(finished: Finished, use: Used) -> dict[str, Any]:
    """The record of a request that has ended."""
    trace_id, _, span_id = finished.trace.partition("-")
    tried = "FAILOVER" if finished.attempts > 1 else "PRIMARY"
    limit_state = _LIMIT_STATES.get(finished.reason, "WITHIN_LIMIT")
    return _filled(
        {
            "record_id": record_id(finished.request_id),
            "revision": 1,
            "request_id": finished.request_id,
            "client_request_id": finished.client_request_id,
            "organization_id": finished.organization_id,
            "api_key_id": finished.key_id,
            "endpoint": finished.endpoint,
            "stream": finished.stream,
            "model": finished.model,
            "backend_id": finished.last_backend,
            "tokens_input": use.tokens.tokens_input,
            "tokens_output": use.tokens.tokens_output,
            "tokens_input_cached": use.tokens.tokens_input_cached,
            "tokens_output_reasoning": use.tokens.tokens_output_reasoning,
            "usage_source": use.source,
            "cost_micro_usd": use.micro_usd,
            "cost_usd": use.micro_usd / MICRO,
            "price_version": price_version(finished.prices),
            "policy_version": finished.policy,
            "limit_state": limit_state,
            "decision_reason": "RATE_LIMIT" if limit_state != "WITHIN_LIMIT" else finished.decision or tried,
            "budget_snapshot": budget_snapshot(read_figures(finished.figures)),
            "status": finished.status,
            "retry_count": max(0, finished.attempts - 1),
            "latency_ms": finished.duration_ms,
            "timestamp": iso(finished.started_us),
            "admitted_at": iso(finished.admitted_ms * 1000) if finished.admitted_ms else None,
            "trace_id": trace_id or finished.request_id,
            "span_id": span_id or finished.request_id.replace("-", "")[16:],
            "metadata": json.loads(finished.labels) if finished.labels else None,
        }
    )


def _filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not known. The contract's required fields are there in any case."""
    return {name: value for name, value in record.items() if value is not None and (value != "" or name in ALWAYS)}


ALWAYS: Final = frozenset({"api_key_id", "model", "backend_id", "endpoint"})


def budget_snapshot(figures: Iterable[Figure]) -> dict[str, Any] | None:
    """What the budget had left once the request was reserved: the organisation's, and of those the longest."""
    of_budgets = [figure for figure in figures if figure.kind in BUDGET_PERIODS]
    if not of_budgets:
        return None
    subject = "org" if any(figure.subject == "org" for figure in of_budgets) else of_budgets[0].subject
    own = [figure for figure in of_budgets if figure.subject == subject]
    period = max(BUDGET_PERIODS[figure.kind] for figure in own)  # MONTHLY sorts after DAILY
    snapshot: dict[str, Any] = {"period": period}
    for figure in own:
        if BUDGET_PERIODS[figure.kind] != period:
            continue
        if figure.kind in MONEY_KINDS:
            snapshot["currency_remaining"] = max(0, figure.remaining) / MICRO
        else:
            snapshot["tokens_remaining"] = max(0, figure.remaining)
    return snapshot
