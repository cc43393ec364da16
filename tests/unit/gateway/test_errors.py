"""The table of refusals: complete, consistent, and fit for clients to read."""

from __future__ import annotations

import json
import re

import pytest

from gateway.errors import REFUSALS, LimitContext, Reason, Refused, openai_body, router_body

CONTRACT: dict[int, set[str]] = {
    400: {"INVALID_REQUEST", "MISSING_FIELD", "VALIDATION_ERROR"},
    401: {"AUTH_INVALID"},
    402: {"BUDGET_EXCEEDED", "QUOTA_EXCEEDED"},
    403: {"FORBIDDEN"},
    404: {"NOT_FOUND", "MODEL_NOT_FOUND", "REQUEST_NOT_FOUND"},
    408: {"REQUEST_TIMEOUT"},
    409: {"REQUEST_IN_PROGRESS", "ANSWER_NOT_KEPT"},
    413: {"PAYLOAD_TOO_LARGE"},
    415: {"UNSUPPORTED_MEDIA_TYPE"},
    422: {"IDEMPOTENCY_KEY_REUSED"},
    429: {"RATE_LIMIT_EXCEEDED"},
    500: {"INTERNAL_ERROR"},
    502: {"BACKEND_ERROR"},
    503: {"NO_BACKEND_AVAILABLE", "BACKEND_UNAVAILABLE", "SERVICE_UNAVAILABLE"},
    504: {"BACKEND_TIMEOUT"},
}
TYPES = {403: "permission_error"}


def test_every_reason_has_a_refusal() -> None:
    assert set(REFUSALS) == set(Reason)


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.value)
def test_refusal_keeps_the_contract(reason: Reason) -> None:
    refusal = REFUSALS[reason]
    assert refusal.code in CONTRACT[refusal.status]
    expected = "server_error" if refusal.status >= 500 else TYPES.get(refusal.status, "invalid_request_error")
    if refusal.status not in {402, 409, 429}:
        assert refusal.openai_type == expected
    assert refusal.openai_code
    assert re.fullmatch(r"[a-z_]+", refusal.openai_code)


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.value)
def test_text_is_a_sentence_that_envoy_can_carry(reason: Reason) -> None:
    text = REFUSALS[reason].text
    assert text[0].isupper()
    assert text.endswith((".", "'."))
    assert text.isascii()
    assert "%" not in text  # Envoy would take it for a command operator


def test_openai_code_means_one_code_at_one_status() -> None:
    found: dict[tuple[int, str | None], set[str]] = {}
    for refusal in REFUSALS.values():
        found.setdefault((refusal.status, refusal.openai_code), set()).add(refusal.code)
    # OpenAI has one code for whatever is used up, and the contract takes it over.
    assert found.pop((402, "insufficient_quota")) == {"BUDGET_EXCEEDED", "QUOTA_EXCEEDED"}
    assert [codes for codes in found.values() if len(codes) > 1] == []


def test_refused_takes_its_own_text_and_param() -> None:
    refused = Refused(Reason.MISSING_FIELD, "no", param="a.b")
    assert (refused.text, refused.param, refused.refusal.status) == ("no", "a.b", 400)
    assert Refused(Reason.MISSING_FIELD).text == REFUSALS[Reason.MISSING_FIELD].text


def test_limit_says_what_when_and_how_much() -> None:
    limit = LimitContext(
        subject="organization",
        unit="usd",
        limit=5.0,
        current_usage=4.5,
        remaining=0.5,
        period="DAILY",
        reset_at="2026-11-26T00:00:00Z",
    )
    body = json.loads(router_body(code="C", text="x", trace_id="t", limit=limit, retry_after_s=3))
    assert body["retry_after_seconds"] == 3
    assert body["limit_context"] == {
        "subject": "organization",
        "unit": "usd",
        "limit": 5.0,
        "current_usage": 4.5,
        "remaining": 0.5,
        "period": "DAILY",
        "reset_at": "2026-11-26T00:00:00Z",
    }


def test_bodies_have_the_two_shapes() -> None:
    ours = router_body(code="C", text='"quoted" é', trace_id="t", param="p")
    assert json.loads(ours) == {"error": '"quoted" é', "code": "C", "trace_id": "t", "param": "p"}
    assert "param" not in json.loads(router_body(code="C", text="x", trace_id="t"))
    theirs = openai_body(message="m", kind="k", code="c")
    assert json.loads(theirs) == {"error": {"message": "m", "type": "k", "param": None, "code": "c"}}
