"""/v1/inference on the way back: the backend's answer as the router's own response schema.

Source: contract, "POST /v1/inference".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeGuard

from extproc.answer_usage import Usage
from extproc.exchange import Rewrite
from extproc.json_body import written
from gateway.errors import REFUSALS, Reason, router_body
from policies.model import Price
from policies.price import cost_micro_usd

_MILLION: Final = 1_000_000
_OURS_ALONE: Final = frozenset({402, 409, 422, 429})
"""What is said of limits and idempotency keys: a backend that answers so means its own."""
_CODES: Final = {
    refusal.openai_code: refusal
    for refusal in REFUSALS.values()
    if refusal.openai_code and refusal.status not in _OURS_ALONE
}
_REJECTED: Final = "The backend rejected the request."


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Ids by which operators find a request: W3C ids when tracing is on, else made of the request id."""

    trace_id: str
    span_id: str


def _not_json(constant: str) -> NoReturn:
    raise ValueError(constant)


def parsed(body: bytes) -> Any:
    """A backend's body; None where it is no JSON."""
    try:
        return json.loads(body, parse_constant=_not_json) if body else None
    except (ValueError, RecursionError):
        return None


def is_answer(status: int, output: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a backend has answered the request; else it failed, or refused it."""
    return status < 400 and isinstance(output, dict)  # noqa: PLR2004


def failure(status: int, output: Any, trace: Trace) -> Rewrite:
    """The client's response to what is no answer."""
    if status < 400:  # noqa: PLR2004
        return _failure(REFUSALS[Reason.BACKEND_ERROR].status, None, trace)
    return _failure(status, output, trace)


def answer(
    output: Mapping[str, Any], *, used: Usage, request_id: str, latency_ms: int, price: Price | None, trace: Trace
) -> Rewrite:
    """The client's response to a backend's answer, and what it costs."""
    cost = cost_micro_usd(
        price,
        tokens_input=used.tokens_input,
        tokens_output=used.tokens_output,
        tokens_input_cached=used.tokens_input_cached,
        tokens_output_reasoning=used.tokens_output_reasoning,
    )
    response = {
        "request_id": request_id,
        "output": output,
        "usage": {
            "tokens_input": used.tokens_input,
            "tokens_output": used.tokens_output,
            "latency_ms": latency_ms,
            "cost_usd": cost / _MILLION,
            "limit_state": "WITHIN_LIMIT",
        },
        "trace_id": trace.trace_id,
        "span_id": trace.span_id,
    }
    return Rewrite(body=written(response).encode())


def _failure(status: int, output: object, trace: Trace) -> Rewrite:
    """An error in the router's own format, whoever made it."""
    error = output.get("error") if isinstance(output, dict) else None
    said: Mapping[str, Any] = error if isinstance(error, dict) else {}
    known = _CODES.get(str(said.get("code")))
    if known is not None and known.status != status:
        known = None
    if status >= 500:  # noqa: PLR2004
        known = known or REFUSALS[Reason.BACKEND_ERROR]
        code, text, status = known.code, known.text, known.status
    else:
        # The request's own fault, in the backend's words: what a client of the OpenAI endpoints would read too.
        message = said.get("message")
        code = known.code if known else REFUSALS[Reason.MALFORMED_BODY].code
        text = message if isinstance(message, str) else _REJECTED
    return Rewrite(body=router_body(code=code, text=text, trace_id=trace.trace_id), status=status)
