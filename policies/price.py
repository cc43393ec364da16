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


def cost_micro_usd(price: Price | None, *, tokens_input: int, tokens_output: int, tokens_input_cached: int = 0) -> int:
    """Micro-dollars of a request; 0 where the backend has no price.

    ``tokens_input_cached`` is part of ``tokens_input`` and costs its own price where there is one.
    """
    if price is None:
        return 0
    cached_price = price.cached_input_micro_usd_per_1k
    if cached_price is None:
        cached_price = price.input_micro_usd_per_1k
    cached = min(tokens_input_cached, tokens_input)
    return micro_usd_of(
        (tokens_input - cached) * price.input_micro_usd_per_1k
        + cached * cached_price
        + tokens_output * price.output_micro_usd_per_1k
    )


def dearest(prices: Iterable[Price | None]) -> Price:
    """The highest of each price: no backend costs more, whichever answers."""
    known = [price or FREE for price in prices] or [FREE]
    return Price(
        input_micro_usd_per_1k=max(max(p.input_micro_usd_per_1k, p.cached_input_micro_usd_per_1k or 0) for p in known),
        output_micro_usd_per_1k=max(p.output_micro_usd_per_1k for p in known),
    )


def written(prices: Mapping[str, Price]) -> str:
    """Prices by backend id as one line: ``a=5000,15000,2500;b=5000,15000,``, sorted."""
    return ";".join(
        f"{backend}={p.input_micro_usd_per_1k},{p.output_micro_usd_per_1k},"
        f"{'' if p.cached_input_micro_usd_per_1k is None else p.cached_input_micro_usd_per_1k}"
        for backend, p in sorted(prices.items())
    )


def read(line: str) -> dict[str, Price]:
    """Prices that :func:`written` has put down.

    Raises:
        ValueError: the line has another form.
    """
    prices: dict[str, Price] = {}
    for part in line.split(";") if line else ():
        backend, _, numbers = part.rpartition("=")
        tokens_input, tokens_output, cached = numbers.split(",")
        prices[backend] = Price(
            input_micro_usd_per_1k=int(tokens_input),
            output_micro_usd_per_1k=int(tokens_output),
            cached_input_micro_usd_per_1k=int(cached) if cached else None,
        )
    return prices
