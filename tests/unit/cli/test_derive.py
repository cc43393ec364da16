"""A receipt worked out again: whole ones agree, and each figure that was changed is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.derive import checks
from policies import price
from policies.load import Bundle, load
from policies.model import Policy, Price
from tests.unit.usage.usage_builders import REQUEST_ID, a_finished, a_spool, a_usage, an_attempt
from usage.archive import Archive
from usage.entries import entry_of
from usage.receipt import Kept, receipt_of
from usage.spool import Changes

TEXT = """
backends:
  - {id: a, uri: http://a, price: {input_usd_per_1k: 0.005, output_usd_per_1k: 0.015, cached_input_usd_per_1k: 0.001}}
  - {id: b, uri: http://b, price: {input_usd_per_1k: 0.001, output_usd_per_1k: 0.002, reasoning_usd_per_1k: 0.1}}
  - {id: c, uri: http://c}
models:
  - {model: gpt-4o, backends: [{backend_id: a, weight: 70}, {backend_id: b, weight: 30}]}
  - {model: spared, backends: [{backend_id: a, weight: 1}, {backend_id: c, weight: 1}], degraded_backends: [c]}
"""
POLICY: Policy = load(Bundle.of("p", [("router.yaml", TEXT)])).policy
PRICES = {backend.id: backend.price or price.FREE for backend in POLICY.backends}

Receipt = dict[str, Any]


async def a_receipt(directory: Path, *failed: str, model: str = "gpt-4o", **changes: Any) -> Receipt:
    """The receipt of a request that the ledger has written down."""
    among = ("a", "b") if model == "gpt-4o" else ("a", "c")
    finished = a_finished(
        model=model,
        policy=POLICY.digest,
        prices=price.written({backend: PRICES[backend] for backend in among}),
        **(
            {
                "attempts": len(failed) + 1,
                "reported": a_usage(100, 20, cached=30, reasoning=5),
                "decision": "PRIMARY",
            }
            | changes
        ),
    )
    entry = entry_of(finished)
    assert entry is not None
    spool, archive = a_spool(directory), Archive(directory / "usage.db")
    try:
        gone = {"status": 503, "flags": ("UH",)} if "" in failed else {}
        attempts = [an_attempt(backend=backend, started_us=at, **gone) for at, backend in enumerate(failed)]
        spool.write(Changes(entries=[entry], attempts=attempts))
        request = await archive.request(REQUEST_ID)
        assert request is not None
        found = await archive.attempts(REQUEST_ID)
    finally:
        archive.close()
        spool.close()
    return receipt_of(Kept(request=request, attempts=found, events=(), policy=POLICY, delivered_to=0))


def verdicts(receipt: Receipt, policy: Policy | None = POLICY) -> dict[str, str]:
    return {check.figure: check.verdict for check in checks(receipt, policy, why_not="it was not kept")}


def differing(receipt: Receipt, policy: Policy | None = POLICY) -> set[str]:
    return {figure for figure, verdict in verdicts(receipt, policy).items() if verdict == "differs"}


WHOLE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "answered": ((), {}),
    "failed over": (("a",), {"backend": "b", "last_backend": "b", "decision": "FAILOVER"}),
    "degraded avoided": ((), {"model": "spared", "decision": "OVERRIDE"}),
    "failed": ((), {"status": 502, "reported": None}),
    "left before an answer": ((), {"status": 0, "flags": ("DC",), "backend": "", "reported": None, "decision": ""}),
    "stream cut": ((), {"stream": True, "events": 7, "flags": ("DC",), "reported": None}),
    "no endpoint left": (
        ("", "a", "", "b"),
        {"status": 503, "flags": ("URX",), "backend": "b", "decision": "FAILOVER", "reported": None, "attempts": 2},
    ),
    "denied": (
        (),
        {"status": 429, "reason": "RATE_LIMIT_EXCEEDED", "admitted": False, "backend": "", "reported": None},
    ),
}


@pytest.mark.parametrize(("failed", "changes"), WHOLE.values(), ids=WHOLE)
async def test_what_the_ledger_wrote_agrees(tmp_path: Path, failed: tuple[str, ...], changes: dict[str, Any]) -> None:
    found = verdicts(await a_receipt(tmp_path, *failed, **changes))
    assert set(found.values()) == {"agrees"}
    assert found.keys() >= {"policy", "candidates", "cost in micro-dollars", "price of 1,000 tokens"}


def _set(*path: str | int, to: Any) -> Callable[[Receipt], None]:
    def change(receipt: Receipt) -> None:
        at: Any = receipt
        for step in path[:-1]:
            at = at[step]
        assert at[path[-1]] != to
        at[path[-1]] = to

    return change


CHANGES: dict[str, tuple[Callable[[Receipt], None], str]] = {
    "record id": (_set("delivery", "record_id", to=REQUEST_ID), "record id"),
    "policy": (_set("policy_version", to="0" * 64), "policy"),
    "a candidate's weight": (_set("candidates", 0, "weight", to=71), "candidates"),
    "a candidate's standing": (_set("candidates", 0, "standing", to="degraded"), "candidates"),
    "a candidate less": (lambda receipt: receipt["candidates"].pop(), "candidates"),
    "a backend that was none": (_set("attempts", 0, "backend_id", to="c"), "backends tried"),
    "backend charged": (_set("price", "backend_id", to="b"), "backend charged"),
    "decision": (_set("decision", "what", to="FAILOVER"), "decision"),
    "an operator's hand": (_set("decision", "what", to="OVERRIDE"), "decision"),
    "price version": (_set("price", "price_version", to="0" * 12), "price version"),
    "price of output": (_set("price", "output_micro_usd_per_1k", to=1), "price of 1,000 tokens"),
    "price of cached input": (_set("price", "cached_input_micro_usd_per_1k", to=None), "price of 1,000 tokens"),
    "input": (_set("usage", "tokens_input", to=101), "cost in micro-dollars"),
    "cached input": (_set("usage", "tokens_input_cached", to=0), "cost in micro-dollars"),
    "cost": (_set("cost_micro_usd", to=1), "cost in micro-dollars"),
    "cost in dollars": (_set("cost_usd", to=1.0), "cost in dollars"),
    "money settled": (_set("settlement", "micro_usd", to=1), "micro-dollars settled"),
    "tokens settled": (_set("settlement", "tokens", to=1), "tokens settled"),
}


@pytest.mark.parametrize(("change", "figure"), CHANGES.values(), ids=CHANGES)
async def test_figure_that_was_changed_is_seen(tmp_path: Path, change: Callable[[Receipt], None], figure: str) -> None:
    receipt = copy.deepcopy(await a_receipt(tmp_path))
    change(receipt)
    assert figure in differing(receipt)


async def test_policy_that_was_changed_is_seen(tmp_path: Path) -> None:
    receipt = await a_receipt(tmp_path)
    dearer = Price(input_micro_usd_per_1k=6000, output_micro_usd_per_1k=15_000)
    backends = tuple(replace(b, price=dearer) if b.id == "a" else b for b in POLICY.backends)
    assert differing(receipt, replace(POLICY, backends=backends)) >= {
        "price version",
        "price of 1,000 tokens",
        "cost in micro-dollars",
    }


async def test_without_the_policy_the_price_is_worked_out_all_the_same(tmp_path: Path) -> None:
    receipt = await a_receipt(tmp_path)
    found = verdicts(receipt, None)
    assert {figure for figure, verdict in found.items() if verdict == "unknown"} == {
        *("policy", "candidates", "backends tried", "decision", "price version", "price of 1,000 tokens")
    }
    assert found["cost in micro-dollars"] == "agrees"
    _set("cost_micro_usd", to=1)(receipt)
    assert "cost in micro-dollars" in differing(receipt, None)


async def test_money_is_told_in_dollars_without_an_exponent(tmp_path: Path) -> None:
    receipt = await a_receipt(tmp_path, reported=a_usage(10, 2))
    told = {check.figure: check.told for check in checks(receipt, POLICY, why_not="")}
    assert told["cost in dollars"] == "$0.00008"
    assert told["price of 1,000 tokens"] == "input $0.005, output $0.015, cached $0.001"


@given(
    tokens=st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9)),
    prices=st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.none() | st.integers(0, 10**9)),
    off=st.integers(-3, 3),
)
def test_only_the_exact_cost_agrees(
    tokens: tuple[int, int, int], prices: tuple[int, int, int | None], off: int
) -> None:
    fresh, cached, out = tokens
    input_price, output_price, cached_price = prices
    special = input_price if cached_price is None else cached_price
    exact = -(-(fresh * input_price + cached * special + out * output_price) // 1000)
    receipt = {
        "delivery": {"record_id": None},
        "settlement": {"state": "NONE"},
        "price": {
            "price_version": "0" * 12,
            "backend_id": None,
            "input_micro_usd_per_1k": input_price,
            "output_micro_usd_per_1k": output_price,
            "cached_input_micro_usd_per_1k": cached_price,
            "reasoning_micro_usd_per_1k": None,
        },
        "usage": {
            "tokens_input": fresh + cached,
            "tokens_output": out,
            "tokens_input_cached": cached,
            "tokens_output_reasoning": 0,
        },
        "cost_micro_usd": exact + off,
        "cost_usd": (exact + off) / 1_000_000,
    }
    assert ("cost in micro-dollars" in differing(receipt, None)) == (off != 0)
