"""What a request is charged: a table of how it may have ended, and the laws of the sum."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limits.model import Settlement
from policies.model import Price
from policies.price import FREE
from tests.unit.usage.usage_builders import PRICE, a_finished, a_usage
from usage.settle import settlement_of

CHEAP = Price(input_micro_usd_per_1k=1, output_micro_usd_per_1k=1)
USAGE = a_usage(100, 20)

ENDED: dict[str, tuple[dict[str, Any], int, int]] = {
    "the backend counted": ({"usage": USAGE}, 120, 500 + 300),
    "a part of the input was cached": ({"usage": a_usage(100, 20, cached=40)}, 120, 300 + 100 + 300),
    "a stream told its usage": ({"usage": USAGE, "stream": True}, 120, 800),
    "a fraction of a micro-dollar is a whole one": ({"usage": a_usage(0, 1), "prices": {"a": CHEAP}}, 1, 1),
    "the backend counted nothing": ({"usage": a_usage(0, 0)}, 0, 0),
    "the backend has no price": ({"usage": USAGE, "prices": {"a": FREE}}, 120, 0),
    "another backend answered": ({"usage": USAGE, "backend": "b", "prices": {"a": PRICE, "b": CHEAP}}, 120, 1),
    "a failed answer told its usage": ({"usage": USAGE, "status": 500}, 120, 800),
    "the backend is silent": ({}, 110, 50 + 1500),
    "a silent backend said little": ({"body_bytes": 1}, 11, 50 + 15),
    "a silent backend said more than was granted": ({"tokens_output": 30}, 40, 50 + 450),
    "the client left a stream early": (
        {"stream": True, "flags": ("downstream_connection_termination",), "body_bytes": 2001},
        21,
        50 + 165,
    ),
    "the backend rejected it": ({"status": 400}, 0, 0),
    "every backend failed": ({"status": 503, "backend": ""}, 0, 0),
    "the client left before an answer": ({"status": 0, "backend": "", "body_bytes": 0}, 0, 0),
    "no backend answered": ({"backend": ""}, 0, 0),
    "it ended before its decision": (
        {"status": 0, "backend": "", "tokens_input": 0, "tokens_output": 0, "prices": {}, "charge_to": ""},
        0,
        0,
    ),
}


@pytest.mark.parametrize(("how", "tokens", "micro_usd"), ENDED.values(), ids=ENDED)
def test_request_is_charged_by_how_it_ended(how: dict[str, Any], tokens: int, micro_usd: int) -> None:
    settlement = settlement_of(a_finished(**how))
    assert settlement is not None
    assert (settlement.tokens, settlement.micro_usd) == (tokens, micro_usd)


def test_settlement_names_the_request_and_what_it_counts_towards() -> None:
    ended = a_finished(usage=a_usage(1, 1), prices={}, started_s=7, charge_to="org:DAILY")
    assert settlement_of(ended) == Settlement(
        request_id=ended.request_id,
        organization_id=ended.organization_id,
        tokens=2,
        micro_usd=0,
        admitted_s=7,
        charge_to="org:DAILY",
    )


def test_backend_that_was_no_candidate_costs_what_the_dearest_does() -> None:
    ended, known = (a_finished(backend=backend, usage=a_usage(1000, 1000)) for backend in ("newcomer", "a"))
    assert settlement_of(ended) == settlement_of(known)


@pytest.mark.parametrize("status", [200, 401, 402, 429])
def test_reply_that_left_no_entry_open_is_not_settled(status: int) -> None:
    assert settlement_of(a_finished(closed=True, status=status, backend="", usage=USAGE)) is None


@given(body_bytes=st.integers(0, 10**9), granted=st.integers(0, 10**6), counted=st.integers(0, 10**6))
def test_estimate_never_exceeds_what_was_reserved(body_bytes: int, granted: int, counted: int) -> None:
    ended = a_finished(body_bytes=body_bytes, tokens_input=counted, tokens_output=granted)
    reserved = settlement_of(a_finished(usage=a_usage(counted, granted)))
    estimate = settlement_of(ended)
    assert reserved is not None
    assert estimate is not None
    assert estimate.tokens <= reserved.tokens
    assert 0 <= estimate.micro_usd <= reserved.micro_usd
