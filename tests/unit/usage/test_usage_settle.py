"""What a request is charged: who counted its tokens, what failures cost, and that cost is exact."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import price
from policies.model import Price
from tests.unit.usage.usage_builders import CHARGE_TO, PRICE, REQUEST_ID, START_S, a_finished, a_usage
from usage.finished import Malformed
from usage.settle import BYTES_PER_TOKEN, STREAM_BYTES_PER_TOKEN, Used, settlement_of, used

DEAR = Price(input_micro_usd_per_1k=9000, output_micro_usd_per_1k=30_000)


def tokens(use: Used) -> tuple[int, int, str | None]:
    """Input, output and who counted them."""
    return use.tokens.tokens_input, use.tokens.tokens_output, use.source


# --- Who counted.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reported": a_usage(7, 5)}, (7, 5, "provider")),
        ({"reported": a_usage(7, 5), "counted": a_usage(3, 3)}, (7, 5, "provider")),
        ({"reported": a_usage(0, 5), "counted": a_usage(3, 9)}, (3, 5, "provider")),
        ({"reported": a_usage(7, 5), "flags": ("DC",)}, (7, 5, "provider")),
        ({"reported": a_usage(7, 5), "events": 2}, (7, 5, "provider")),
        ({"counted": a_usage(3, 9)}, (3, 9, "tokenizer")),
        ({"counted": a_usage(3, 9), "flags": ("UC",)}, (3, 9, "partial")),
        ({"counted": a_usage(3, 9), "stream": True, "events": 12, "flags": ("DC",)}, (3, 12, "partial")),
        ({"counted": a_usage(3, 9), "stream": True, "events": 12}, (3, 9, "tokenizer")),
        ({"counted": a_usage(3, 9), "events": 4, "stream": True}, (3, 9, "tokenizer")),
        ({"stream": True, "events": 4, "flags": ("DC",)}, (10, 4, "partial")),
        ({"stream": True, "events": 4, "flags": ("UR",)}, (10, 4, "partial")),
        ({"stream": True, "events": 4}, (10, 4, "partial")),
        ({"body_bytes": 401}, (10, 101, "estimated")),
        ({"body_bytes": 401, "flags": ("DR",)}, (10, 101, "partial")),
        ({"stream": True, "body_bytes": 401}, (10, 3, "estimated")),
        ({"stream": True, "body_bytes": 401, "flags": ("DC",)}, (10, 3, "partial")),
        ({"body_bytes": 0}, (10, 0, "estimated")),
        ({"endpoint": "embedding", "body_bytes": 4000, "tokens_output": 0}, (10, 0, "estimated")),
        ({"endpoint": "response", "stream": True, "body_bytes": 1400, "flags": ("DC",)}, (10, 0, "partial")),
        ({"endpoint": "response", "stream": True, "body_bytes": 1400}, (10, 7, "estimated")),
    ],
    ids=[
        "the backend",
        "the backend, though the tokenizer looked too",
        "the backend the answer, the tokenizer the question",
        "the backend, before the client left",
        "the backend, of a stream",
        "the tokenizer",
        "the tokenizer, of a part",
        "what was sent, where the tokenizer is behind",
        "the tokenizer, of a whole stream with events",
        "the tokenizer, of a stream",
        "events, until the client left",
        "events, until the backend was cut",
        "events of a stream that said nothing else",
        "size of an answer",
        "size of a part of an answer",
        "size of a stream",
        "size of a part of a stream",
        "an empty answer",
        "embeddings have no output",
        "events without text, until the client left",
        "a whole stream whose texts nobody knows",
    ],
)
def test_best_count_there_is_stands(changes: dict[str, Any], expected: tuple[int, int, str]) -> None:
    assert tokens(used(a_finished(**changes))) == expected


FAILURES: dict[str, dict[str, Any]] = {
    "answered with an error": {"status": 502},
    "refused by the backend": {"status": 400},
    "left before an answer": {"status": 0, "flags": ("DC",)},
    "no backend": {"backend": "", "status": 503},
    "answered by the router itself": {"backend": "", "status": 200},
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_failure_costs_nothing_that_nobody_reported(failure: dict[str, Any]) -> None:
    use = used(a_finished(**failure, counted=a_usage(3, 9), events=3, stream=True))
    assert (tokens(use), use.micro_usd) == ((0, 0, None), 0)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_failure_costs_what_the_backend_reported(failure: dict[str, Any]) -> None:
    use = used(a_finished(**failure, reported=a_usage(100, 10)))
    assert tokens(use) == (100, 10, "provider")
    assert use.micro_usd == 650


# --- Never more than granted, unless counted.


@given(st.integers(0, 10**6), st.integers(0, 10**9), st.integers(0, 10**6), st.booleans())
def test_nobody_pays_for_more_than_was_granted_by_an_estimate(
    granted: int, body_bytes: int, events: int, stream: bool
) -> None:
    use = used(a_finished(tokens_output=granted, body_bytes=body_bytes, events=events, stream=stream))
    estimated = events or -(-body_bytes // (STREAM_BYTES_PER_TOKEN if stream else BYTES_PER_TOKEN))
    assert use.tokens.tokens_output == (min(granted, estimated) if granted else estimated)


def test_what_was_counted_is_paid_though_it_is_more_than_was_granted() -> None:
    assert used(a_finished(tokens_output=5, reported=a_usage(1, 50))).tokens.tokens_output == 50
    assert used(a_finished(tokens_output=5, counted=a_usage(1, 50))).tokens.tokens_output == 50


# --- The price.


def priced(**prices: Price) -> str:
    return price.written(prices)


def test_price_is_that_of_the_backend_that_answered() -> None:
    finished = a_finished(prices=priced(a=PRICE, b=DEAR), reported=a_usage(1000, 1000))
    assert used(finished).micro_usd == 20_000


def test_backend_that_was_no_candidate_costs_no_less_than_any() -> None:
    finished = a_finished(backend="late", prices=priced(a=PRICE, b=DEAR), reported=a_usage(1000, 1000))
    assert used(finished).micro_usd == 39_000


def test_without_prices_nothing_is_charged() -> None:
    assert used(a_finished(prices="", reported=a_usage(1000, 1000))).micro_usd == 0


@pytest.mark.parametrize("line", ["a", "a=1", "a=1,2", "a=x,2,,", "a=1,2,3,4,5"])
def test_prices_in_another_form_are_told(line: str) -> None:
    with pytest.raises(Malformed, match="prices"):
        used(a_finished(prices=line))


PRICES = st.builds(
    Price,
    input_micro_usd_per_1k=st.integers(0, 10**9),
    output_micro_usd_per_1k=st.integers(0, 10**9),
    cached_input_micro_usd_per_1k=st.none() | st.integers(0, 10**9),
    reasoning_micro_usd_per_1k=st.none() | st.integers(0, 10**9),
)
COUNTS = st.integers(0, 10**9)
USAGES = st.builds(a_usage, COUNTS, COUNTS, cached=COUNTS, reasoning=COUNTS)


def exact_micro_usd(of: Price, usage: Any) -> Fraction:
    """What tokens cost, as a fraction."""
    cached = min(usage.tokens_input_cached, usage.tokens_input)
    reasoning = min(usage.tokens_output_reasoning, usage.tokens_output)
    cached_price, reasoning_price = of.cached_input_micro_usd_per_1k, of.reasoning_micro_usd_per_1k
    return (
        Fraction(usage.tokens_input - cached, 1000) * of.input_micro_usd_per_1k
        + Fraction(cached, 1000) * (of.input_micro_usd_per_1k if cached_price is None else cached_price)
        + Fraction(usage.tokens_output - reasoning, 1000) * of.output_micro_usd_per_1k
        + Fraction(reasoning, 1000) * (of.output_micro_usd_per_1k if reasoning_price is None else reasoning_price)
    )


@given(PRICES, USAGES)
def test_cost_is_exact_and_rounded_up_once(of: Price, usage: Any) -> None:
    cost = used(a_finished(prices=priced(a=of), reported=usage)).micro_usd
    assert exact_micro_usd(of, usage) <= cost < exact_micro_usd(of, usage) + 1


@given(PRICES, st.lists(USAGES, max_size=20))
def test_sum_of_costs_is_at_most_a_micro_dollar_a_request_above_what_is_exact(of: Price, usages: list[Any]) -> None:
    total = sum(used(a_finished(prices=priced(a=of), reported=usage)).micro_usd for usage in usages)
    exact = sum((exact_micro_usd(of, usage) for usage in usages), Fraction(0))
    assert exact <= total <= exact + len(usages)


# --- What closes the ledger entry.


COUNTED = st.none() | st.builds(a_usage, COUNTS, COUNTS)


@given(USAGES, COUNTED)
def test_details_are_never_more_than_what_they_are_part_of(reported: Any, counted: Any) -> None:
    """So what finance works out of a record, by the difference, is never less than nothing."""
    tokens = used(a_finished(reported=reported, counted=counted)).tokens
    assert 0 <= tokens.tokens_input_cached <= tokens.tokens_input
    assert 0 <= tokens.tokens_output_reasoning <= tokens.tokens_output


@given(PRICES, USAGES, COUNTED)
def test_cost_follows_from_the_tokens_of_the_record(of: Price, reported: Any, counted: Any) -> None:
    use = used(a_finished(prices=priced(a=of), reported=reported, counted=counted))
    exact = exact_micro_usd(of, use.tokens)
    assert exact <= use.micro_usd < exact + 1


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        (a_usage(3, 5, cached=50), a_usage(3, 5, cached=3)),
        (a_usage(3, 5, reasoning=50), a_usage(3, 5, reasoning=5)),
        (a_usage(0, 5, cached=2, reasoning=4), a_usage(7, 5, cached=2, reasoning=4)),
        (a_usage(0, 5, cached=50), a_usage(7, 5, cached=7)),
    ],
    ids=["more cached than input", "more reasoning than output", "details without input", "more than was counted"],
)
def test_details_of_a_report_are_kept_as_far_as_they_can_be(reported: Any, expected: Any) -> None:
    assert used(a_finished(reported=reported, counted=a_usage(7, 9))).tokens == expected


def test_settlement_is_what_was_used() -> None:
    finished = a_finished(reported=a_usage(10, 5))
    settlement = settlement_of(finished, used(finished))
    assert settlement is not None
    assert (settlement.request_id, settlement.organization_id) == (REQUEST_ID, "acme")
    assert (settlement.tokens, settlement.micro_usd) == (15, 125)
    assert (settlement.admitted_s, settlement.charge_to) == (START_S, CHARGE_TO)


def test_settlement_is_of_the_moment_of_the_admission_where_it_is_known() -> None:
    """An upload that began before midnight was admitted after it."""
    finished = a_finished(admitted_ms=(START_S + 7200) * 1000 + 999)
    settlement = settlement_of(finished, used(finished))
    assert settlement is not None
    assert settlement.admitted_s == START_S + 7200


def test_nothing_is_settled_that_was_never_admitted() -> None:
    finished = a_finished(admitted=False)
    assert settlement_of(finished, used(finished)) is None
