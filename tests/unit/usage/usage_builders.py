"""Requests that have ended, as Envoy tells of them and as the ledger knows them; each states only what matters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from prometheus_client import CollectorRegistry

from gateway import names
from gateway.audit import AuditAction, AuditEvent
from limits.figures import written
from limits.model import Figure, LimitKind, Settlement
from policies import price
from policies.model import OrganizationId, Price
from usage.access_log import _FLAGS, Running, message
from usage.finished import FailedAttempt, Finished, TokenUsage, Value
from usage.metrics import LedgerMetrics
from usage.spool import Entry, Spool

REQUEST_ID = "123e4567-e89b-12d3-a456-426614174000"
START_S = 1_800_000_000
PRICE = Price(input_micro_usd_per_1k=5000, output_micro_usd_per_1k=15_000, cached_input_micro_usd_per_1k=2500)
PRICES = price.written({"a": PRICE})
CHARGE_TO = "org:DAILY org:MONTHLY"
FLAG_FIELDS = {short: name for name, short in _FLAGS.items()}
"""Names of response flags in the stream by their short forms, in Envoy's order."""
_Message: Any = message("envoy.service.accesslog.v3.StreamAccessLogsMessage")

Namespace = Mapping[str, Value | None]
SAID: Namespace = {
    names.METADATA_ORGANIZATION: "acme",
    names.METADATA_KEY: "k-1",
    names.METADATA_MODEL: "gpt-4o",
    names.METADATA_ENDPOINT: "chat",
    names.METADATA_PRICES: PRICES,
    names.METADATA_CHARGE_TO: CHARGE_TO,
    names.METADATA_POLICY: "0a1b",
}
LIMITS: Namespace = {names.METADATA_TOKENS_INPUT: "10", names.METADATA_TOKENS_OUTPUT: "1000"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What Envoy has to tell of one request: an entry of the stream and a line of the journal are made of it."""

    request_id: str = REQUEST_ID
    path: str = "/v1/chat/completions"
    status: int = 200
    flags: tuple[str, ...] = ()
    attempts: int = 1
    started_ns: int = START_S * 1_000_000_000
    duration_ms: int = 12
    body_bytes: int = 400
    backend: str = "a"
    decision: str = "PRIMARY"
    cluster: str = "be_a"
    said: Namespace = field(default_factory=lambda: SAID)
    limits: Namespace = field(default_factory=lambda: LIMITS)
    usage: Namespace = field(default_factory=dict)
    counted: Namespace = field(default_factory=dict)
    periodic: bool = False
    listener: str = names.LISTENER_PUBLIC

    @property
    def namespaces(self) -> dict[str, Namespace]:
        """Dynamic metadata; a namespace that nobody wrote is not there."""
        by_name = {
            names.METADATA_NAMESPACE: self.said,
            names.LIMITS_NAMESPACE: self.limits,
            names.USAGE_NAMESPACE: self.usage,
            names.COUNTED_NAMESPACE: self.counted,
        }
        return {name: fields for name, fields in by_name.items() if fields}


def message_of(*told: Told) -> bytes:
    """A message of the access log stream."""
    document = {
        "identifier": {"logName": told[0].listener if told else names.LISTENER_PUBLIC},
        "httpLogs": {"logEntry": [_entry(each) for each in told]},
    }
    return bytes(json_format.ParseDict(document, _Message()).SerializeToString())


def _entry(told: Told) -> dict[str, Any]:
    headers = {names.HEADER_ROUTING_BACKEND: told.backend, names.HEADER_ROUTING_DECISION: told.decision}
    return {
        "commonProperties": {
            "startTime": _timestamp(told.started_ns),
            "duration": f"{told.duration_ms / 1000:.3f}s",
            "upstreamCluster": told.cluster,
            "upstreamRequestAttemptCount": told.attempts,
            "responseFlags": {
                FLAG_FIELDS[flag]: {} if flag == "UAEX" else True for flag in told.flags if flag in FLAG_FIELDS
            },
            "metadata": {"filterMetadata": {name: dict(fields) for name, fields in told.namespaces.items()}},
            "accessLogType": "DownstreamPeriodic" if told.periodic else "DownstreamEnd",
        },
        "request": {"requestId": told.request_id, "path": "/rewritten", "originalPath": told.path},
        "response": {
            "responseCode": told.status,
            "responseBodyBytes": told.body_bytes,
            "responseHeaders": {name: value for name, value in headers.items() if value},
        },
    }


def _timestamp(ns: int) -> str:
    from google.protobuf.timestamp_pb2 import Timestamp

    return str(Timestamp(seconds=ns // 1_000_000_000, nanos=ns % 1_000_000_000).ToJsonString())


def line_of(told: Told) -> bytes:
    """A line of the journal as Envoy writes it: sorted, compact, without what is empty."""
    fields = {
        "listener": told.listener,
        "request_id": told.request_id,
        "started": f"{told.started_ns // 1_000_000_000}.{told.started_ns % 1_000_000_000:09d}",
        "duration_ms": told.duration_ms,
        "path": told.path,
        "status": told.status,
        "flags": ",".join(told.flags) or "-",
        "attempts": told.attempts,
        "body_bytes": told.body_bytes,
        "cluster": told.cluster,
        "backend": told.backend,
        "decision": told.decision,
        **told.namespaces,
    }
    present = {name: value for name, value in fields.items() if value not in ("", None)}
    return json.dumps(present, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def a_usage(tokens_input: int = 0, tokens_output: int = 0, *, cached: int = 0, reasoning: int = 0) -> TokenUsage:
    """Tokens as somebody has counted them."""
    return TokenUsage(
        tokens_input=tokens_input,
        tokens_output=tokens_output,
        tokens_input_cached=cached,
        tokens_output_reasoning=reasoning,
    )


def a_finished(**changes: Any) -> Finished:
    """A request that backend ``a`` has answered, without usage."""
    fields: dict[str, Any] = {
        "request_id": REQUEST_ID,
        "organization_id": "acme",
        "key_id": "k-1",
        "model": "gpt-4o",
        "endpoint": "chat",
        "path": "/v1/chat/completions",
        "stream": False,
        "backend": "a",
        "last_backend": "a",
        "decision": "PRIMARY",
        "status": 200,
        "flags": (),
        "reason": "",
        "attempts": 1,
        "started_us": START_S * 1_000_000,
        "admitted_ms": 0,
        "duration_ms": 12,
        "body_bytes": 400,
        "admitted": True,
        "reported": None,
        "counted": None,
        "events": 0,
        "tokens_input": 10,
        "tokens_output": 1000,
        "prices": PRICES,
        "charge_to": CHARGE_TO,
        "policy": "0a1b",
        "figures": "",
        "trace": "",
        "client_request_id": "",
        "labels": "",
    }
    return Finished(**(fields | changes))


def an_attempt(**changes: Any) -> FailedAttempt:
    """An attempt at backend ``a`` that failed with 500."""
    fields: dict[str, Any] = {
        "request_id": REQUEST_ID,
        "backend": "a",
        "status": 500,
        "flags": (),
        "started_us": START_S * 1_000_000,
        "duration_ms": 3,
    }
    return FailedAttempt(**(fields | changes))


def a_running(request_id: str = REQUEST_ID, organization_id: str = "acme") -> Running:
    """A sign of life."""
    return Running(request_id=request_id, organization_id=OrganizationId(organization_id))


def a_settlement(request_id: str = REQUEST_ID, **changes: Any) -> Settlement:
    """What closes a request of ten tokens at ten micro-dollars each."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "organization_id": "acme",
        "tokens": 10,
        "micro_usd": 100,
        "admitted_s": START_S,
        "charge_to": CHARGE_TO,
    }
    return Settlement(**(fields | changes))


def an_entry(request_id: str = REQUEST_ID, **changes: Any) -> Entry:
    """A forwarded request that is to be settled."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "revision": 1,
        "client_request_id": "",
        "organization_id": "acme",
        "kind": "forwarded",
        "started_us": START_S * 1_000_000,
        "record": json.dumps({"record_id": f"record of {request_id}", "revision": 1, "api_key_id": "k-1"}),
        "told": "{}",
        "settlement": a_settlement(request_id),
    }
    return Entry(**(fields | changes))


def an_event(event_id: str = "e-1", **changes: Any) -> AuditEvent:
    """A key that was created."""
    fields: dict[str, Any] = {
        "event_id": event_id,
        "request_id": "",
        "organization_id": "acme",
        "actor": "k-1",
        "action": AuditAction.KEY_CREATED,
        "metadata": {"x": 1},
        "created_at": float(START_S),
    }
    return AuditEvent(**(fields | changes))


def figures_of(*figures: tuple[LimitKind, str, int]) -> str:
    """Figures as they are told: kind, subject and what is left of a million."""
    return written(Figure(kind, subject, 1_000_000, remaining, 1000) for kind, subject, remaining in figures)


def a_spool(directory: Path) -> Spool:
    """A spool in a directory."""
    return Spool(directory / "usage.db")


def metrics() -> LedgerMetrics:
    """Metrics of one test."""
    return LedgerMetrics(CollectorRegistry())


def value(metric: Any, *labels: str) -> float:
    """What a counter or a gauge stands at."""
    child = metric.labels(*labels) if labels else metric
    return float(child._value.get())


async def until(condition: Callable[[], object], *, within_s: float = 10) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - whatever it is, nobody tells of it
            await asyncio.sleep(0.001)
