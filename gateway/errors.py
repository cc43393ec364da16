"""The closed list of reasons a request is refused for, and what the client is told.

``REFUSALS`` maps each :class:`Reason` to HTTP status, machine-readable code and public text. Bodies
come in two shapes (contract, "Errors"): ours for /v1/inference, status and audit, and OpenAI's for
the OpenAI endpoints.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Final, Literal


class Reason(Enum):
    """Why a request is refused."""

    MALFORMED_REQUEST = "malformed_request"
    MALFORMED_BODY = "malformed_body"
    MISSING_FIELD = "missing_field"
    INVALID_FIELD = "invalid_field"
    CONFLICTING_KEYS = "conflicting_keys"
    KEY_MISSING = "key_missing"
    KEY_UNKNOWN = "key_unknown"
    KEY_EXPIRED = "key_expired"
    KEY_REVOKED = "key_revoked"
    SIGNATURE_MISSING = "signature_missing"
    SIGNATURE_WRONG = "signature_wrong"
    MODEL_FORBIDDEN = "model_forbidden"
    SCOPE_MISSING = "scope_missing"
    BACKENDS_FORBIDDEN = "backends_forbidden"
    PATH_UNKNOWN = "path_unknown"
    MODEL_UNKNOWN = "model_unknown"
    REQUEST_UNKNOWN = "request_unknown"
    BODY_TOO_LARGE = "body_too_large"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    MEDIA_TYPE = "media_type"
    BACKENDS_KILLED = "backends_killed"
    NO_BACKEND = "no_backend"
    BACKEND_BUSY = "backend_busy"
    BACKEND_ERROR = "backend_error"
    BACKEND_TIMEOUT = "backend_timeout"
    REQUEST_TIMEOUT = "request_timeout"
    KEY_STORE_DOWN = "key_store_down"
    REQUEST_RATE = "request_rate"
    TOKEN_RATE = "token_rate"  # noqa: S105 - tokens of a model
    PARALLEL_REQUESTS = "parallel_requests"
    BUDGET_SPENT = "budget_spent"
    QUOTA_SPENT = "quota_spent"
    IN_PROGRESS = "in_progress"
    ANSWER_NOT_KEPT = "answer_not_kept"
    IDEMPOTENCY_MISMATCH = "idempotency_mismatch"
    LIMIT_STORE_DOWN = "limit_store_down"
    SERVICE_DOWN = "service_down"
    BUG = "bug"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What the client is told: HTTP status, both codes and the default public text."""

    status: int
    code: str
    openai_type: str
    openai_code: str | None
    text: str


def _refusal(status: int, code: str, openai_type: str, openai_code: str | None, text: str) -> Refusal:
    return Refusal(status=status, code=code, openai_type=openai_type, openai_code=openai_code, text=text)


_INVALID: Final = "invalid_request_error"

REFUSALS: Final[dict[Reason, Refusal]] = {
    Reason.MALFORMED_REQUEST: _refusal(
        400, "INVALID_REQUEST", _INVALID, "invalid_request", "The request is not valid HTTP."
    ),
    Reason.MALFORMED_BODY: _refusal(400, "INVALID_REQUEST", _INVALID, "invalid_request", "The body is not valid JSON."),
    Reason.MISSING_FIELD: _refusal(400, "MISSING_FIELD", _INVALID, "missing_field", "A required field is missing."),
    Reason.INVALID_FIELD: _refusal(
        400, "VALIDATION_ERROR", _INVALID, "validation_error", "A field has the wrong type or value."
    ),
    Reason.CONFLICTING_KEYS: _refusal(
        400,
        "INVALID_REQUEST",
        _INVALID,
        "invalid_request",
        "X-API-Key and Authorization carry different keys; send one of them.",
    ),
    Reason.KEY_MISSING: _refusal(
        401,
        "AUTH_INVALID",
        _INVALID,
        "invalid_api_key",
        "No API key was sent. Use 'Authorization: Bearer <key>' or 'X-API-Key: <key>'.",
    ),
    Reason.KEY_UNKNOWN: _refusal(401, "AUTH_INVALID", _INVALID, "invalid_api_key", "The API key is not valid."),
    Reason.KEY_EXPIRED: _refusal(401, "AUTH_INVALID", _INVALID, "invalid_api_key", "The API key has expired."),
    Reason.KEY_REVOKED: _refusal(401, "AUTH_INVALID", _INVALID, "invalid_api_key", "The API key has been revoked."),
    Reason.SIGNATURE_MISSING: _refusal(
        401,
        "AUTH_INVALID",
        _INVALID,
        "invalid_api_key",
        "This API key requires a signature: 'hmac_signature' in the body or the X-HMAC-Signature header.",
    ),
    Reason.SIGNATURE_WRONG: _refusal(401, "AUTH_INVALID", _INVALID, "invalid_api_key", "The signature does not match."),
    Reason.MODEL_FORBIDDEN: _refusal(
        403, "FORBIDDEN", "permission_error", "forbidden", "This API key may not use this model."
    ),
    Reason.SCOPE_MISSING: _refusal(
        403, "FORBIDDEN", "permission_error", "forbidden", "This API key lacks the scope this endpoint needs."
    ),
    Reason.BACKENDS_FORBIDDEN: _refusal(
        403, "FORBIDDEN", "permission_error", "forbidden", "No backend of this model may be used with this API key."
    ),
    Reason.PATH_UNKNOWN: _refusal(404, "NOT_FOUND", _INVALID, "not_found", "There is nothing at this path."),
    Reason.MODEL_UNKNOWN: _refusal(404, "MODEL_NOT_FOUND", _INVALID, "model_not_found", "The model does not exist."),
    Reason.REQUEST_UNKNOWN: _refusal(
        404, "REQUEST_NOT_FOUND", _INVALID, "request_not_found", "No such request is known."
    ),
    Reason.BODY_TOO_LARGE: _refusal(
        413, "PAYLOAD_TOO_LARGE", _INVALID, "payload_too_large", "The request body is too large."
    ),
    Reason.PAYLOAD_TOO_LARGE: _refusal(
        413, "PAYLOAD_TOO_LARGE", _INVALID, "payload_too_large", "The payload is too large."
    ),
    Reason.MEDIA_TYPE: _refusal(
        415, "UNSUPPORTED_MEDIA_TYPE", _INVALID, "unsupported_media_type", "Send the body as application/json."
    ),
    Reason.BACKENDS_KILLED: _refusal(
        503,
        "NO_BACKEND_AVAILABLE",
        "server_error",
        "no_backend_available",
        "Every backend of this model is switched off.",
    ),
    Reason.NO_BACKEND: _refusal(
        503, "NO_BACKEND_AVAILABLE", "server_error", "no_backend_available", "No backend is available for this model."
    ),
    Reason.BACKEND_BUSY: _refusal(
        503, "BACKEND_UNAVAILABLE", "server_error", "backend_unavailable", "Every backend of this model is overloaded."
    ),
    Reason.BACKEND_ERROR: _refusal(
        502, "BACKEND_ERROR", "server_error", "backend_error", "The backend failed to answer the request."
    ),
    Reason.BACKEND_TIMEOUT: _refusal(
        504, "BACKEND_TIMEOUT", "server_error", "backend_timeout", "The backend did not answer in time."
    ),
    Reason.REQUEST_TIMEOUT: _refusal(
        408, "REQUEST_TIMEOUT", _INVALID, "request_timeout", "The request was not received in time."
    ),
    Reason.KEY_STORE_DOWN: _refusal(
        503,
        "SERVICE_UNAVAILABLE",
        "server_error",
        "service_unavailable",
        "API keys cannot be checked at the moment; try again.",
    ),
    Reason.REQUEST_RATE: _refusal(
        429, "RATE_LIMIT_EXCEEDED", "requests", "rate_limit_exceeded", "Too many requests; wait and try again."
    ),
    Reason.TOKEN_RATE: _refusal(
        429, "RATE_LIMIT_EXCEEDED", "tokens", "rate_limit_exceeded", "Too many tokens a minute; wait and try again."
    ),
    Reason.PARALLEL_REQUESTS: _refusal(
        429,
        "RATE_LIMIT_EXCEEDED",
        "requests",
        "rate_limit_exceeded",
        "Too many requests at once; try again when one ends.",
    ),
    Reason.BUDGET_SPENT: _refusal(
        402, "BUDGET_EXCEEDED", "insufficient_quota", "insufficient_quota", "The budget does not pay for this request."
    ),
    Reason.QUOTA_SPENT: _refusal(
        402,
        "QUOTA_EXCEEDED",
        "insufficient_quota",
        "insufficient_quota",
        "The token quota does not cover this request.",
    ),
    Reason.IN_PROGRESS: _refusal(
        409,
        "REQUEST_IN_PROGRESS",
        _INVALID,
        "request_in_progress",
        "A request with this idempotency key is still running; try again when it has ended.",
    ),
    Reason.ANSWER_NOT_KEPT: _refusal(
        409,
        "ANSWER_NOT_KEPT",
        _INVALID,
        "answer_not_kept",
        "The request with this idempotency key has been answered, and its answer was too large to keep. "
        "Use a new key to have it done again.",
    ),
    Reason.IDEMPOTENCY_MISMATCH: _refusal(
        422,
        "IDEMPOTENCY_KEY_REUSED",
        _INVALID,
        "idempotency_key_reused",
        "This idempotency key was sent with another request before; use a new key.",
    ),
    Reason.LIMIT_STORE_DOWN: _refusal(
        503,
        "SERVICE_UNAVAILABLE",
        "server_error",
        "service_unavailable",
        "Limits cannot be checked at the moment; try again.",
    ),
    Reason.SERVICE_DOWN: _refusal(
        503,
        "SERVICE_UNAVAILABLE",
        "server_error",
        "service_unavailable",
        "The router cannot answer at the moment; try again.",
    ),
    Reason.BUG: _refusal(
        500, "INTERNAL_ERROR", "server_error", "internal_error", "The router failed; the log has this error's id."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitContext:
    """The limit that a request ran into, as the client is told. Amounts are in ``unit``; money is in dollars.

    Exactly one of ``period`` (of a budget) and ``window`` (``burst``, ``1m`` or ``parallel``) is set.
    ``reset_at`` is ISO 8601 in UTC.
    """

    subject: Literal["organization", "api_key"]
    unit: Literal["requests", "tokens", "usd"]
    limit: int | float
    current_usage: int | float
    remaining: int | float
    period: str | None = None
    window: str | None = None
    reset_at: str

    def as_json(self) -> dict[str, object]:
        """For bodies and audit events."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Refused(Exception):
    """The client's fault, raised anywhere below the pipeline and caught once.

    Args:
        reason: why; decides status, code and default text.
        text: replaces the default text; never a key, body or backend address.
        param: path of the field at fault, such as ``messages[0].role``.
        limit: the limit that is in the way.
        retry_after_ms: after so long the same request succeeds, unless somebody else uses what has become free.
        headers: more response headers.
    """

    def __init__(
        self,
        reason: Reason,
        text: str | None = None,
        *,
        param: str | None = None,
        limit: LimitContext | None = None,
        retry_after_ms: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(reason.value, text, param)
        self.reason = reason
        self.text = text or REFUSALS[reason].text
        self.param = param
        self.limit = limit
        self.retry_after_ms = retry_after_ms
        self.headers = headers

    @property
    def refusal(self) -> Refusal:
        """Status and codes of this refusal."""
        return REFUSALS[self.reason]


class StoreUnavailable(Exception):
    """A store or service that a decision needs did not answer in time."""


def router_body(
    *,
    code: str,
    text: str,
    trace_id: str,
    param: str | None = None,
    limit: LimitContext | None = None,
    retry_after_s: int | None = None,
) -> bytes:
    """Error body of /v1/inference, status, audit and admin endpoints, as JSON bytes."""
    body: dict[str, object] = {"error": text, "code": code, "trace_id": trace_id}
    if param is not None:
        body["param"] = param
    if retry_after_s is not None:
        body["retry_after_seconds"] = retry_after_s
    if limit is not None:
        body["limit_context"] = limit.as_json()
    return json.dumps(body).encode()


def openai_body(*, message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """Error body of the OpenAI endpoints, as JSON bytes; ``kind`` is OpenAI's ``type``."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()
