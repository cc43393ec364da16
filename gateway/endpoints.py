"""The endpoints of the public listener: what ext_proc decides on and what Envoy routes.

Source: contract, "Endpoints on the public listener".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Kind(Enum):
    """What a request at an endpoint asks for."""

    INFERENCE = "inference"
    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RESPONSE = "response"
    MODELS = "models"
    AUDIT = "audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One path; ``openai`` says which error format it speaks."""

    kind: Kind
    method: str
    path: str
    openai: bool


INFERENCE_PATH: Final = "/v1/inference"
CHAT_PATH: Final = "/v1/chat/completions"
COMPLETION_PATH: Final = "/v1/completions"
MODELS_PATH: Final = "/v1/models"
STATUS_PREFIX: Final = "/v1/status/"
HEALTHZ_PATH: Final = "/v1/status/healthz"
READYZ_PATH: Final = "/v1/status/readyz"
AUDIT_PATH: Final = "/v1/audit/requests"
"""Audit events; below it the receipts, by request id."""

POST_ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    Endpoint(kind=Kind.INFERENCE, method="POST", path=INFERENCE_PATH, openai=False),
    Endpoint(kind=Kind.CHAT, method="POST", path=CHAT_PATH, openai=True),
    Endpoint(kind=Kind.COMPLETION, method="POST", path=COMPLETION_PATH, openai=True),
    Endpoint(kind=Kind.EMBEDDING, method="POST", path="/v1/embeddings", openai=True),
    Endpoint(kind=Kind.RESPONSE, method="POST", path="/v1/responses", openai=True),
)

OPENAI_PREFIXES: Final[tuple[str, ...]] = (*(e.path for e in POST_ENDPOINTS if e.openai), MODELS_PATH)
