"""What tokens cost, in integer micro-dollars. Pure; admission, settlement and /v1/inference use the same function.

Prices are micro-dollars per 1,000 tokens, so tokens times price is thousandths of a micro-dollar. They are added up
exactly and rounded up once, over the whole request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from policies.model import Price

FREE = Price(input_micro_usd_per_1k=0, output_micro_usd_per_1k=0)


def micro_usd_of(thousandths: int) -> int:
    """Micro-dollars for thousandths of them, rounded up."""
    return -(-thousandths // 1000)


def cost_micro_usd(
    price: Price | None,
    *,
    tokens_input: int,
    tokens_output: int,
    tokens_input_cached: int = 0,
    tokens_output_reasoning: int = 0,
) -> int:
    """Micro-dollars of a request; 0 where the backend has no price.

    ``tokens_input_cached`` is part of ``tokens_input`` and ``tokens_output_reasoning`` of ``tokens_output``: each costs
    its own price where there is one, and what goes beyond its total does not count.
    """
    if price is None:
        return 0
    return micro_usd_of(
        _thousandths(
            tokens_input, price.input_micro_usd_per_1k, tokens_input_cached, price.cached_input_micro_usd_per_1k
        )
        + _thousandths(
            tokens_output, price.output_micro_usd_per_1k, tokens_output_reasoning, price.reasoning_micro_usd_per_1k
        )
    )


def _thousandths(tokens: int, price: int, special: int, special_price: int | None) -> int:
    """Thousandths of micro-dollars of tokens of which some have a price of their own."""
    if special_price is None:
        return tokens * price
    special = min(special, tokens)
    return (tokens - special) * price + special * special_price


def dearest(prices: Iterable[Price | None]) -> Price:
    """The highest of each price: no backend costs more, whichever answers."""
    known = [price or FREE for price in prices] or [FREE]
    return Price(
        input_micro_usd_per_1k=max(max(p.input_micro_usd_per_1k, p.cached_input_micro_usd_per_1k or 0) for p in known),
        output_micro_usd_per_1k=max(max(p.output_micro_usd_per_1k, p.reasoning_micro_usd_per_1k or 0) for p in known),
    )


def written(prices: Mapping[str, Price]) -> str:
    """Prices by backend id as one line: ``a=5000,15000,2500,20000;b=5000,15000,,``, sorted.

    Of one: input, output, cached input, reasoning; the last two may be empty.
    """
    return ";".join(
        f"{backend}={p.input_micro_usd_per_1k},{p.output_micro_usd_per_1k},"
        f"{_optional(p.cached_input_micro_usd_per_1k)},{_optional(p.reasoning_micro_usd_per_1k)}"
        for backend, p in sorted(prices.items())
    )


def _optional(price: int | None) -> str:
    return "" if price is None else str(price)


def read(line: str) -> dict[str, Price]:
    """Prices that :func:`written` has put down; the fourth may be missing, as it once was.

    Raises:
        ValueError: the line has another form.
    """
    prices: dict[str, Price] = {}
    for part in line.split(";") if line else ():
        backend, _, numbers = part.rpartition("=")
        tokens_input, tokens_output, cached, *more = numbers.split(",")
        [reasoning] = more or [""]
        prices[backend] = Price(
            input_micro_usd_per_1k=int(tokens_input),
            output_micro_usd_per_1k=int(tokens_output),
            cached_input_micro_usd_per_1k=int(cached) if cached else None,
            reasoning_micro_usd_per_1k=int(reasoning) if reasoning else None,
        )
    return prices
