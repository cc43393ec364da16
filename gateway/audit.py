"""Audit events: what was decided or changed, by whom, with which figures. Source: contract, "Usage record"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol


class AuditAction(Enum):
    """What happened."""

    REQUEST_ALLOWED = "REQUEST_ALLOWED"
    REQUEST_DENIED = "REQUEST_DENIED"
    POLICY_UPDATE = "POLICY_UPDATE"
    LIMIT_RESET = "LIMIT_RESET"
    BUDGET_SET = "BUDGET_SET"
    KEY_CREATED = "KEY_CREATED"
    KEY_REVOKED = "KEY_REVOKED"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One event. ``actor`` is an API key id, or who ran the command; '' where nobody is known. ``created_at`` is unix
    seconds. ``metadata`` is JSON: never bodies, never keys."""

    event_id: str
    request_id: str
    organization_id: str
    actor: str
    action: AuditAction
    metadata: Mapping[str, Any]
    created_at: float


class AuditTrail(Protocol):
    """Takes events; never waits, never raises. What it cannot keep it counts."""

    def record(self, event: AuditEvent, /) -> None:
        """Take one event."""
        ...
