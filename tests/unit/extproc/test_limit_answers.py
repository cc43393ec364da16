"""What a decision of the limit store means to a client."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.limit_answers import admitted_or_refused, context_of, duration, rate_headers, refused_by
from gateway.errors import Reason, Refused
from limits.model import Admitted, Claimed, Denied, Figure, LimitKind, StoredAnswer

AT_MS = 1_795_600_000_000  # 2026-11-25T09:46:40Z
_UNITS_MS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


def a_figure(
    kind: LimitKind, *, subject: str = "org", limit: int = 10, remaining: int = 4, reset_ms: int = 0
) -> Figure:
    return Figure(kind, subject, limit, remaining, reset_ms)


def denied(figure: Figure, wait_ms: int | None = None) -> Refused:
    return refused_by(Denied(at_ms=AT_MS, wait_ms=wait_ms, denier=figure, figures=(figure,)))


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0ms"),
        (250, "250ms"),
        (1000, "1s"),
        (1001, "2s"),
        (30_000, "30s"),
        (150_000, "2m30s"),
        (3_605_000, "1h0m5s"),
    ],
)
def test_duration_reads_like_the_contracts(ms: int, text: str) -> None:
    assert duration(ms) == text


@given(st.integers(0, 10**9))
def test_duration_is_never_too_short_nor_a_second_too_long(ms: int) -> None:
    parts = re.findall(r"(\d+)(ms|h|m|s)", duration(ms))
    told = sum(int(number) * _UNITS_MS[unit] for number, unit in parts)
    assert ms <= told < ms + 1000


def test_headers_are_of_the_bucket_that_has_the_least_left() -> None:
    figures = (
        a_figure(LimitKind.DAILY_TOKENS, remaining=0),
        a_figure(LimitKind.REQUESTS, limit=100, remaining=50, reset_ms=500),
        a_figure(LimitKind.TOKENS, limit=1000, remaining=7, reset_ms=60_000),
        a_figure(LimitKind.REQUESTS, subject="key/k", limit=20, remaining=3, reset_ms=1700),
        a_figure(LimitKind.TOKENS, subject="key/k", limit=500, remaining=8, reset_ms=1),
    )
    assert dict(rate_headers(figures)) == {
        "x-ratelimit-limit-requests": "20",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "2s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "7",
        "x-ratelimit-reset-tokens": "1m0s",
    }


def test_no_header_without_a_limit() -> None:
    assert rate_headers((a_figure(LimitKind.PARALLEL), a_figure(LimitKind.MONTHLY_MICRO_USD))) == ()


def test_money_is_told_in_dollars_and_its_period() -> None:
    figure = a_figure(LimitKind.MONTHLY_MICRO_USD, limit=5_000_000, remaining=1_250_000, reset_ms=60_000)
    context = context_of(figure, at_ms=AT_MS).as_json()
    assert context == {
        "subject": "organization",
        "unit": "usd",
        "limit": 5.0,
        "current_usage": 3.75,
        "remaining": 1.25,
        "period": "MONTHLY",
        "reset_at": "2026-11-25T09:47:40Z",
    }


@pytest.mark.parametrize(
    ("limit", "remaining", "text"),
    [(500_000_000, 1_250_000, "$500, of which $1.25 remain"), (123, -7, "$0.000123, of which $0 remain")],
)
def test_budget_is_told_to_the_micro_dollar_and_never_as_less_than_nothing(
    limit: int, remaining: int, text: str
) -> None:
    assert text in denied(a_figure(LimitKind.DAILY_MICRO_USD, limit=limit, remaining=remaining)).text


def test_rate_is_told_by_its_window_and_whose_it_is() -> None:
    context = context_of(a_figure(LimitKind.TOKENS, subject="key/k"), at_ms=AT_MS)
    assert (context.subject, context.unit, context.window, context.period) == ("api_key", "tokens", "1m", None)


@pytest.mark.parametrize(
    ("kind", "reason", "wait_ms"),
    [
        (LimitKind.REQUESTS, Reason.REQUEST_RATE, 20),
        (LimitKind.TOKENS, Reason.TOKEN_RATE, 20),
        (LimitKind.PARALLEL, Reason.PARALLEL_REQUESTS, 1000),
        (LimitKind.DAILY_MICRO_USD, Reason.BUDGET_SPENT, None),
        (LimitKind.MONTHLY_MICRO_USD, Reason.BUDGET_SPENT, None),
        (LimitKind.DAILY_TOKENS, Reason.QUOTA_SPENT, None),
        (LimitKind.MONTHLY_TOKENS, Reason.QUOTA_SPENT, None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_kind_of_limit_has_its_refusal(kind: LimitKind, reason: Reason, wait_ms: int | None) -> None:
    refused = denied(a_figure(kind), wait_ms)
    assert (refused.reason, refused.retry_after_ms) == (reason, wait_ms)
    assert refused.limit == context_of(a_figure(kind), at_ms=AT_MS)
    assert refused.text.isascii()


def test_every_kind_is_one_of_them() -> None:
    assert {denied(a_figure(kind), 1).refusal.status for kind in LimitKind} == {402, 429}


@pytest.mark.parametrize(
    ("state", "reason", "wait_ms"),
    [
        ("running", Reason.IN_PROGRESS, 500),
        ("mismatch", Reason.IDEMPOTENCY_MISMATCH, None),
        ("too_large", Reason.ANSWER_NOT_KEPT, None),
    ],
)
def test_taken_idempotency_key_is_refused(state: str, reason: Reason, wait_ms: int | None) -> None:
    claimed = Claimed(state=state)  # type: ignore[arg-type]
    with pytest.raises(Refused) as refused:
        admitted_or_refused(claimed)
    assert (refused.value.reason, refused.value.retry_after_ms) == (reason, wait_ms)


def test_admission_and_kept_answer_come_through() -> None:
    admitted = Admitted(at_ms=AT_MS, tokens_output=1, micro_usd=1, figures=())
    answer = StoredAnswer(status=200, headers=(), body=b"x")
    assert admitted_or_refused(admitted) is admitted
    assert admitted_or_refused(Claimed(state="done", answer=answer)) is answer
