"""/v1/inference on the way back: what it cost, and errors in the router's own format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.answer_usage import Usage
from extproc.translate import Trace, answer, failure, is_answer, parsed
from gateway.errors import REFUSALS, Reason
from policies.model import Price
from tests.unit.extproc.json_texts import OBJECTS

USED = Usage(tokens_input=5, tokens_output=7, tokens_input_cached=2, tokens_output_reasoning=5)
TRACE = Trace(trace_id="t" * 32, span_id="s" * 16)


def answered(body: Any, *, status: int = 200, price: Price | None = None) -> tuple[int | None, dict[str, Any]]:
    """Status that is set, and the client's body."""
    output = parsed(body if isinstance(body, bytes) else json.dumps(body).encode())
    if is_answer(status, output):
        command = answer(output, used=USED, request_id="r", latency_ms=7, price=price, trace=TRACE)
    else:
        command = failure(status, output, TRACE)
    return command.status, json.loads(command.body.decode())


# --- Answers.

PRICE = Price(
    input_micro_usd_per_1k=5_000,
    output_micro_usd_per_1k=15_000,
    cached_input_micro_usd_per_1k=2_000,
    reasoning_micro_usd_per_1k=60_000,
)


@pytest.mark.parametrize(("price", "micro_usd"), [(PRICE, 3 * 5 + 2 * 2 + 2 * 15 + 5 * 60), (None, 0)])
def test_answer_says_what_was_used_and_what_it_costs(price: Price | None, micro_usd: int) -> None:
    status, found = answered({"a": 1}, price=price)
    assert status is None
    assert found == {
        "request_id": "r",
        "output": {"a": 1},
        "usage": {
            "tokens_input": 5,
            "tokens_output": 7,
            "latency_ms": 7,
            "cost_usd": micro_usd / 1_000_000,
            "limit_state": "WITHIN_LIMIT",
        },
        "trace_id": TRACE.trace_id,
        "span_id": TRACE.span_id,
    }


@given(OBJECTS)
def test_output_is_the_backends_body(body: dict[str, Any]) -> None:
    assert answered(body)[1]["output"] == body


def test_unpaired_surrogate_is_carried() -> None:
    assert answered(b'{"text": "\\ud800", "tokens_used": 1}')[1]["output"]["text"] == "\ud800"


# --- Errors.

BROKEN = {
    "nothing": b"",
    "half of it": b'{"text": "h',
    "a list": b"[]",
    "text": b"hello",
    "no UTF-8": b'{"text": "\xff"}',
    "NaN": b'{"text": NaN}',
    "nested too deeply": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_answer_that_is_no_json_object_is_a_backend_error(body: bytes) -> None:
    assert answered(body) == (
        502,
        {
            "error": REFUSALS[Reason.BACKEND_ERROR].text,
            "code": "BACKEND_ERROR",
            "trace_id": TRACE.trace_id,
        },
    )


def openai_error(code: Any, message: Any = "in their words") -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


@pytest.mark.parametrize("reason", [reason for reason in Reason if REFUSALS[reason].status > 500])
def test_envoys_own_reply_keeps_its_meaning(reason: Reason) -> None:
    refusal = REFUSALS[reason]
    status, found = answered(openai_error(refusal.openai_code, refusal.text), status=refusal.status)
    assert (status, found["code"]) == (refusal.status, refusal.code)


FAILURES: dict[str, tuple[int, Any, int, str, str]] = {
    "a secret in a 500": (500, openai_error(None, "http://10.1.2.3"), 502, "BACKEND_ERROR", "failed to answer"),
    "a 503 page": (503, b"<html>10.1.2.3</html>", 502, "BACKEND_ERROR", "failed to answer"),
    "our words at another status": (
        500,
        openai_error("no_backend_available", "10.1.2.3"),
        502,
        "BACKEND_ERROR",
        "failed to answer",
    ),
    "their 400": (400, openai_error("context_length_exceeded"), 400, "INVALID_REQUEST", "in their words"),
    "their 400 in our code": (400, openai_error("invalid_request"), 400, "INVALID_REQUEST", "in their words"),
    "their missing field": (400, openai_error("missing_field"), 400, "MISSING_FIELD", "in their words"),
    "their 404": (404, openai_error("model_not_found"), 404, "MODEL_NOT_FOUND", "in their words"),
    "their 422": (422, openai_error(7), 422, "INVALID_REQUEST", "in their words"),
    "no message": (400, openai_error(None, 5), 400, "INVALID_REQUEST", "rejected the request"),
    "an error that is text": (400, {"error": "no"}, 400, "INVALID_REQUEST", "rejected the request"),
    "a 404 page": (404, b"<html>nginx</html>", 404, "INVALID_REQUEST", "rejected the request"),
    "a code that is no text": (400, openai_error({"a": 1}), 400, "INVALID_REQUEST", "in their words"),
}


@pytest.mark.parametrize(("given_status", "body", "status", "code", "text"), FAILURES.values(), ids=FAILURES)
def test_backends_error_is_told_in_the_routers_format(
    *, given_status: int, body: Any, status: int, code: str, text: str
) -> None:
    set_status, found = answered(body, status=given_status)
    assert (set_status, found["code"]) == (status, code)
    assert text in found["error"]
    assert "10.1.2.3" not in str(found)
    assert found["trace_id"] == TRACE.trace_id


@given(st.integers(200, 599), st.binary(max_size=30) | OBJECTS | st.builds(openai_error, st.text(), st.text()))
def test_whatever_a_backend_answers_is_told_as_json(status: int, body: Any) -> None:
    set_status, found = answered(body, status=status)
    assert ("output" in found) == (set_status is None)
    assert set_status is None or 400 <= set_status < 600
