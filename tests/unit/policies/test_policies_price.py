"""What tokens cost: exact, rounded up once, never more than the dearest backend says."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from policies.model import Price
from policies.price import cost_micro_usd, dearest, micro_usd_of, read, written
from policies.scalars import MICRO_PER_USD, PRICE_USD_MAX

TOKENS = st.integers(0, 10**9)
AMOUNTS = st.integers(0, PRICE_USD_MAX * MICRO_PER_USD)
PRICES = st.builds(
    Price,
    input_micro_usd_per_1k=AMOUNTS,
    output_micro_usd_per_1k=AMOUNTS,
    cached_input_micro_usd_per_1k=st.none() | AMOUNTS,
    reasoning_micro_usd_per_1k=st.none() | AMOUNTS,
)
BACKENDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
PRICE = Price(input_micro_usd_per_1k=5_000, output_micro_usd_per_1k=15_000, cached_input_micro_usd_per_1k=2_500)


USES = st.fixed_dictionaries(
    dict.fromkeys(("tokens_input", "tokens_output", "tokens_input_cached", "tokens_output_reasoning"), TOKENS)
)


def exactly(price: Price, use: dict[str, int]) -> Fraction:
    """Micro-dollars without rounding: every token by itself, at its own price."""
    cached_price, reasoning_price = price.cached_input_micro_usd_per_1k, price.reasoning_micro_usd_per_1k
    cached = min(use["tokens_input_cached"], use["tokens_input"])
    reasoning = min(use["tokens_output_reasoning"], use["tokens_output"])
    return sum(
        (
            Fraction(tokens * each, 1000)
            for tokens, each in (
                (use["tokens_input"] - cached, price.input_micro_usd_per_1k),
                (cached, price.input_micro_usd_per_1k if cached_price is None else cached_price),
                (use["tokens_output"] - reasoning, price.output_micro_usd_per_1k),
                (reasoning, price.output_micro_usd_per_1k if reasoning_price is None else reasoning_price),
            )
        ),
        Fraction(0),
    )


@given(PRICES, USES)
def test_cost_is_rounded_up_once_over_the_whole_request(price: Price, use: dict[str, int]) -> None:
    exact = exactly(price, use)
    cost = cost_micro_usd(price, **use)
    assert cost == ceil(exact)
    assert 0 <= cost - exact < 1


@given(PRICES, USES, TOKENS, st.sampled_from(["tokens_input", "tokens_output"]))
def test_more_tokens_never_cost_less(price: Price, use: dict[str, int], more: int, total: str) -> None:
    assert cost_micro_usd(price, **(use | {total: use[total] + more})) >= cost_micro_usd(price, **use)


@given(PRICES, USES, TOKENS)
def test_parts_are_cut_to_their_totals(price: Price, use: dict[str, int], more: int) -> None:
    whole = use | {"tokens_input_cached": use["tokens_input"], "tokens_output_reasoning": use["tokens_output"]}
    beyond = {name: tokens + more if name.count("_") == 2 else tokens for name, tokens in whole.items()}
    assert cost_micro_usd(price, **beyond) == cost_micro_usd(price, **whole)


def test_backend_without_a_price_costs_nothing() -> None:
    assert cost_micro_usd(None, tokens_input=10**6, tokens_output=10**6) == 0


@pytest.mark.parametrize(
    ("price", "cached", "cost"),
    [
        (PRICE, 0, 5_000),
        (PRICE, 400, 3_000 + 1_000),
        (PRICE, 1_000, 2_500),
        (PRICE, 5_000, 2_500),
        (replace(PRICE, cached_input_micro_usd_per_1k=None), 400, 5_000),
        (replace(PRICE, cached_input_micro_usd_per_1k=0), 1_000, 0),
    ],
    ids=["nothing cached", "a part", "everything", "more than there is", "no price of its own", "for nothing"],
)
def test_cached_input_costs_its_own_price(price: Price, cached: int, cost: int) -> None:
    assert cost_micro_usd(price, tokens_input=1_000, tokens_output=0, tokens_input_cached=cached) == cost


@pytest.mark.parametrize(
    ("own", "reasoning", "cost"),
    [(20_000, 400, 9_000 + 8_000), (20_000, 5_000, 20_000), (0, 1_000, 0), (None, 400, 15_000), (20_000, 0, 15_000)],
    ids=["a part", "more than there is", "for nothing", "no price of its own", "none"],
)
def test_reasoning_costs_its_own_price(own: int | None, reasoning: int, cost: int) -> None:
    price = replace(PRICE, reasoning_micro_usd_per_1k=own)
    assert cost_micro_usd(price, tokens_input=0, tokens_output=1_000, tokens_output_reasoning=reasoning) == cost


@pytest.mark.parametrize(("thousandths", "micro_usd"), [(0, 0), (1, 1), (999, 1), (1000, 1), (1001, 2)])
def test_part_of_a_micro_dollar_counts_as_a_whole_one(thousandths: int, micro_usd: int) -> None:
    assert micro_usd_of(thousandths) == micro_usd


ALL_SPECIAL = dict.fromkeys(("tokens_input", "tokens_output", "tokens_input_cached", "tokens_output_reasoning"), 1000)


@given(st.lists(st.none() | PRICES, min_size=1, max_size=4), USES)
@example([Price(input_micro_usd_per_1k=1, output_micro_usd_per_1k=1, cached_input_micro_usd_per_1k=9)], ALL_SPECIAL)
@example([Price(input_micro_usd_per_1k=1, output_micro_usd_per_1k=1, reasoning_micro_usd_per_1k=9)], ALL_SPECIAL)
def test_no_candidate_costs_more_than_the_dearest(prices: list[Price | None], use: dict[str, int]) -> None:
    most = cost_micro_usd(dearest(prices), tokens_input=use["tokens_input"], tokens_output=use["tokens_output"])
    assert all(cost_micro_usd(price, **use) <= most for price in prices)


@given(PRICES)
def test_dearest_of_one_is_its_own_price(price: Price) -> None:
    alone = replace(price, cached_input_micro_usd_per_1k=None, reasoning_micro_usd_per_1k=None)
    assert dearest([alone]) == dearest([alone, None]) == alone


def test_dearest_of_none_is_nothing() -> None:
    assert dearest([]) == dearest([None]) == Price(input_micro_usd_per_1k=0, output_micro_usd_per_1k=0)


@given(st.dictionaries(BACKENDS, PRICES, max_size=4))
def test_prices_that_were_written_are_read(prices: dict[str, Price]) -> None:
    line = written(prices)
    assert read(line) == prices
    assert written(dict(sorted(prices.items(), reverse=True))) == line


def test_prices_are_one_line() -> None:
    second = Price(input_micro_usd_per_1k=1, output_micro_usd_per_1k=2)
    assert written({"b": second, "a": PRICE}) == "a=5000,15000,2500,;b=1,2,,"
    assert written({"a": replace(PRICE, reasoning_micro_usd_per_1k=0)}) == "a=5000,15000,2500,0"
    assert written({}) == ""


def test_line_without_prices_of_reasoning_is_read() -> None:
    second = Price(input_micro_usd_per_1k=1, output_micro_usd_per_1k=2)
    assert read("a=5000,15000,2500;b=1,2,") == {"a": PRICE, "b": second}


@pytest.mark.parametrize(
    "line", ["a", "a=", "a=1", "a=1,2", "a=1,2,3,4,5", "a=x,2,,", "a=1,2,,;", "a=1,2,x", "a=1,2,,x"]
)
def test_line_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whichever of its parts says so
        read(line)
