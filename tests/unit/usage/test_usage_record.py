"""Usage records of requests that have ended, field by field."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import names
from gateway.errors import REFUSALS, Reason
from limits.model import LimitKind
from tests.unit.usage.usage_builders import PRICES, REQUEST_ID, a_finished, a_usage, figures_of
from usage.record import BILLED, budget_snapshot, iso, kind_of, price_version, record_id, record_of
from usage.record import read_figures as figures_in
from usage.settle import used


def a_record(**changes: Any) -> dict[str, Any]:
    finished = a_finished(**changes)
    return record_of(finished, used(finished))


def test_record_of_an_answer_has_every_field() -> None:
    record = a_record(
        reported=a_usage(100, 50, cached=40, reasoning=20),
        attempts=3,
        decision="FAILOVER",
        figures=figures_of((LimitKind.MONTHLY_MICRO_USD, "org", 999_930)),
        trace=f"{'ab' * 16}-{'cd' * 8}",
        client_request_id="c-1",
        labels='{"team":"search"}',
        endpoint="inference",
        started_us=1_800_000_000_000_001,
        admitted_ms=1_800_000_060_007,
    )
    assert record == {
        "record_id": record_id(REQUEST_ID),
        "revision": 1,
        "request_id": REQUEST_ID,
        "client_request_id": "c-1",
        "organization_id": "acme",
        "api_key_id": "k-1",
        "endpoint": "inference",
        "stream": False,
        "model": "gpt-4o",
        "backend_id": "a",
        "tokens_input": 100,
        "tokens_output": 50,
        "tokens_input_cached": 40,
        "tokens_output_reasoning": 20,
        "usage_source": "provider",
        "cost_micro_usd": 1150,
        "cost_usd": 0.00115,
        "price_version": price_version(PRICES),
        "policy_version": "0a1b",
        "limit_state": "WITHIN_LIMIT",
        "decision_reason": "FAILOVER",
        "budget_snapshot": {"period": "MONTHLY", "currency_remaining": 0.99993},
        "status": 200,
        "retry_count": 2,
        "latency_ms": 12,
        "timestamp": "2027-01-15T08:00:00.000001Z",
        "admitted_at": "2027-01-15T08:01:00.007000Z",
        "trace_id": "ab" * 16,
        "span_id": "cd" * 8,
        "metadata": {"team": "search"},
    }


def test_what_is_not_known_is_left_out_and_what_the_contract_requires_is_not() -> None:
    record = a_record(key_id="", model="m", backend="", last_backend="", policy="", prices="", status=503)
    assert (record["api_key_id"], record["backend_id"]) == ("", "")
    absent = {"usage_source", "price_version", "policy_version", "budget_snapshot", "metadata", "client_request_id"}
    assert not absent & set(record)


def test_backend_is_the_last_that_was_tried_where_none_answered() -> None:
    assert a_record(backend="", last_backend="b", status=503)["backend_id"] == "b"


def test_without_a_trace_the_request_stands_for_it() -> None:
    record = a_record()
    assert (record["trace_id"], record["span_id"]) == (REQUEST_ID, "a456426614174000")


# --- Its id.


def test_record_id_is_the_same_whenever_a_request_is_told_of() -> None:
    assert record_id(REQUEST_ID) == "a7acabdb-4b94-5a08-88d8-441e061eba58" == a_record(status=502)["record_id"]


@given(st.text(max_size=40), st.text(max_size=40))
def test_record_ids_differ_as_requests_do(one: str, other: str) -> None:
    assert (record_id(one) == record_id(other)) == (one == other)
    assert UUID(record_id(one)).version == 5


# --- Decision and limits.


@pytest.mark.parametrize(
    ("changes", "decision"),
    [
        ({"decision": "PRIMARY"}, "PRIMARY"),
        ({"decision": "OVERRIDE", "attempts": 2}, "OVERRIDE"),
        ({"decision": "", "attempts": 1}, "PRIMARY"),
        ({"decision": "", "attempts": 2}, "FAILOVER"),
        ({"decision": "", "attempts": 0}, "PRIMARY"),
        ({"decision": "", "attempts": 0, "reason": "RATE_LIMIT_EXCEEDED"}, "RATE_LIMIT"),
        ({"decision": "", "attempts": 0, "reason": "BUDGET_EXCEEDED"}, "RATE_LIMIT"),
    ],
)
def test_decision_is_what_the_client_was_told_or_follows_from_the_attempts(
    changes: dict[str, Any], decision: str
) -> None:
    record = a_record(**changes)
    assert record["decision_reason"] == decision
    assert record["retry_count"] == max(0, changes.get("attempts", 1) - 1)


STATES = {
    Reason.REQUEST_RATE: "RATE_LIMITED",
    Reason.TOKEN_RATE: "RATE_LIMITED",
    Reason.PARALLEL_REQUESTS: "RATE_LIMITED",
    Reason.BUDGET_SPENT: "BUDGET_EXCEEDED",
    Reason.QUOTA_SPENT: "BUDGET_EXCEEDED",
}


@pytest.mark.parametrize("reason", Reason)
def test_limit_state_of_every_refusal(reason: Reason) -> None:
    finished = a_finished(reason=REFUSALS[reason].code, admitted=False, backend="", last_backend="")
    state = STATES.get(reason)
    assert kind_of(finished) == ("limited" if state else "refused")
    assert record_of(finished, used(finished))["limit_state"] == state or not state


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "forwarded"),
        ({"status": 503, "reason": "SERVICE_UNAVAILABLE"}, "forwarded"),
        ({"reason": names.REASON_REPEATED, "admitted": False}, "repeated"),
        ({"reason": names.REASON_LISTED, "admitted": False, "model": ""}, "listed"),
        ({"reason": "FORBIDDEN", "admitted": False}, "refused"),
        ({"model": ""}, "refused"),
        ({"organization_id": "", "admitted": False}, "anonymous"),
        ({"organization_id": "", "admitted": False, "reason": "RATE_LIMIT_EXCEEDED"}, "anonymous"),
    ],
)
def test_kind_of_a_request(changes: dict[str, Any], kind: str) -> None:
    assert kind_of(a_finished(**changes)) == kind
    assert (kind in BILLED) == (kind in {"forwarded", "limited"})


# --- What the budget had left.

DAY_USD, DAY_TOKENS = LimitKind.DAILY_MICRO_USD, LimitKind.DAILY_TOKENS
MONTH_USD, MONTH_TOKENS = LimitKind.MONTHLY_MICRO_USD, LimitKind.MONTHLY_TOKENS


@pytest.mark.parametrize(
    ("figures", "snapshot"),
    [
        ([], None),
        ([(LimitKind.REQUESTS, "org", 5), (LimitKind.PARALLEL, "key/a", 5)], None),
        ([(MONTH_USD, "org", 1_500_000)], {"period": "MONTHLY", "currency_remaining": 1.5}),
        (
            [(MONTH_TOKENS, "org", 9), (MONTH_USD, "org", 1)],
            {"period": "MONTHLY", "tokens_remaining": 9, "currency_remaining": 1e-6},
        ),
        ([(DAY_USD, "org", 1), (MONTH_TOKENS, "org", 9)], {"period": "MONTHLY", "tokens_remaining": 9}),
        ([(DAY_TOKENS, "org", 3), (DAY_USD, "key/a", 7)], {"period": "DAILY", "tokens_remaining": 3}),
        ([(MONTH_USD, "key/a", 7), (DAY_USD, "org", 1)], {"period": "DAILY", "currency_remaining": 1e-6}),
        ([(DAY_TOKENS, "key/a", 3)], {"period": "DAILY", "tokens_remaining": 3}),
        ([(MONTH_USD, "org", -5)], {"period": "MONTHLY", "currency_remaining": 0.0}),
        ([(DAY_TOKENS, "org", -5)], {"period": "DAILY", "tokens_remaining": 0}),
    ],
    ids=[
        "none",
        "rates are no budgets",
        "money",
        "money and tokens",
        "the longest",
        "the organisation's before the key's",
        "the organisation's, though the key's is longer",
        "the key's where there is no other",
        "overspent",
        "overspent tokens",
    ],
)
def test_snapshot_is_of_the_organisations_longest_budget(
    figures: list[tuple[LimitKind, str, int]], snapshot: dict[str, Any] | None
) -> None:
    assert budget_snapshot(figures_in(figures_of(*figures))) == snapshot


# --- Times.


@given(st.datetimes(min_value=datetime(1970, 1, 1)))
def test_times_are_in_utc_to_the_microsecond(at: datetime) -> None:
    us = (at.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert datetime.fromisoformat(iso(us)) == at.replace(tzinfo=UTC)
    assert len(iso(us)) == len("2027-01-15T08:00:00.000001Z")


def test_equal_prices_have_an_equal_version() -> None:
    assert price_version(PRICES) == price_version(str(PRICES))
    assert price_version(PRICES) != price_version(PRICES.replace("a=", "b="))
    assert price_version("") == ""
