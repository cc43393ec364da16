"""Refusals as auditors read them: who, what, which limit, which figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from extproc.keys.record import Caller
from gateway.audit import AuditAction, AuditEvent
from gateway.endpoints import Endpoint
from gateway.errors import Refused

AUDITED: Final = frozenset({401, 402, 403, 409, 422, 429})
"""Statuses of refusals that make an audit event."""


def told(refused: Refused, endpoint: Endpoint, *, model: str | None, trace_id: str) -> dict[str, Any]:
    """What log and audit say of a refusal."""
    said: dict[str, Any] = {
        "reason": refused.reason.value,
        "status": refused.refusal.status,
        "param": refused.param,
        "endpoint": endpoint.kind.value,
        "model": model[:256] if model else None,
        "trace_id": trace_id,
    }
    if refused.limit is not None:
        said["limit"] = refused.limit.as_json()
    if refused.retry_after_ms is not None:
        said["retry_after_ms"] = refused.retry_after_ms
    return said


def denial(caller: Caller | None, said: Mapping[str, Any], *, request_id: str, now_s: float) -> AuditEvent:
    """The audit event of a refusal. Its id is the same however often it is told."""
    return AuditEvent(
        event_id=f"{request_id}:denied",
        request_id=request_id,
        organization_id=caller.organization_id if caller else "",
        actor=caller.key_id if caller else "",
        action=AuditAction.REQUEST_DENIED,
        metadata=said,
        created_at=now_s,
    )
