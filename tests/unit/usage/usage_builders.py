"""Requests that have ended, and the messages by which Envoy tells of them; each states only what matters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from envoy_data_plane.envoy.config.core.v3 import Metadata
from envoy_data_plane.envoy.data.accesslog.v3 import (
    AccessLogCommon,
    HttpAccessLogEntry,
    HttpRequestProperties,
    HttpResponseProperties,
    ResponseFlags,
)
from envoy_data_plane.envoy.service.accesslog.v3 import (
    StreamAccessLogsMessage,
    StreamAccessLogsMessageHttpAccessLogEntries,
    StreamAccessLogsMessageIdentifier,
)

from gateway import names
from policies import price
from policies.model import Price
from usage.access_log import Finished, TokenUsage
from xds.resources.encode import Json, struct

REQUEST_ID = "123e4567-e89b-12d3-a456-426614174000"
PRICE = Price(input_micro_usd_per_1k=5000, output_micro_usd_per_1k=15_000, cached_input_micro_usd_per_1k=2500)

Namespaces = Mapping[str, Mapping[str, Json]]


async def until(condition: Callable[[], object], *, within_s: float = 10) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - whatever it is, nobody tells of it
            await asyncio.sleep(0.001)


def a_usage(tokens_input: int = 0, tokens_output: int = 0, *, cached: int = 0) -> TokenUsage:
    """Tokens as a backend has counted them."""
    return TokenUsage(tokens_input=tokens_input, tokens_output=tokens_output, tokens_input_cached=cached)


def a_finished(**changes: Any) -> Finished:
    """A request that backend ``a`` has answered, without usage."""
    fields: dict[str, Any] = {
        "request_id": REQUEST_ID,
        "organization_id": "acme",
        "key_id": "k-1",
        "model": "gpt-4o",
        "backend": "a",
        "status": 200,
        "flags": (),
        "attempts": 1,
        "started_s": 1_800_000_000,
        "body_bytes": 400,
        "stream": False,
        "closed": False,
        "usage": None,
        "tokens_input": 10,
        "tokens_output": 1000,
        "prices": {"a": PRICE},
        "charge_to": "org:DAILY org:MONTHLY",
    }
    return Finished(**(fields | changes))


def metadata_of(finished: Finished) -> Namespaces:
    """Dynamic metadata of a request as ext_proc and the filters write it: what is not so is left out."""
    said: dict[str, Json] = {
        names.METADATA_ORGANIZATION: finished.organization_id,
        names.METADATA_KEY: finished.key_id,
        names.METADATA_MODEL: finished.model,
        names.METADATA_PRICES: price.written(finished.prices),
        names.METADATA_CHARGE_TO: finished.charge_to,
    }
    said |= {names.METADATA_STREAM: True} if finished.stream else {}
    said |= {names.METADATA_CLOSED: True} if finished.closed else {}
    limits: dict[str, Json] = {
        names.METADATA_TOKENS_INPUT: str(finished.tokens_input),
        names.METADATA_TOKENS_OUTPUT: str(finished.tokens_output),
        "x-ratelimit-limit-requests": "20",
    }
    found: dict[str, Mapping[str, Json]] = {names.METADATA_NAMESPACE: said, names.LIMITS_NAMESPACE: limits}
    if finished.usage is not None:
        found[names.USAGE_NAMESPACE] = {
            names.METADATA_TOKENS_INPUT: finished.usage.tokens_input,
            names.METADATA_TOKENS_OUTPUT: finished.usage.tokens_output,
            names.METADATA_TOKENS_INPUT_CACHED: finished.usage.tokens_input_cached,
            "tokens_output_reasoning": 0,
        }
    return found


def an_entry(finished: Finished | None = None, *, metadata: Namespaces | None = None) -> HttpAccessLogEntry:
    """Envoy's entry of a request; ``metadata`` takes the place of its own."""
    of = finished or a_finished()
    flags: dict[str, Any] = dict.fromkeys(of.flags, True)
    said = metadata_of(of) if metadata is None else metadata
    return HttpAccessLogEntry(
        common_properties=AccessLogCommon(
            start_time=datetime.fromtimestamp(of.started_s, UTC),
            upstream_cluster=names.entry_cluster(of.backend),
            upstream_request_attempt_count=of.attempts,
            response_flags=ResponseFlags(**flags),
            metadata=Metadata(filter_metadata={namespace: struct(fields) for namespace, fields in said.items()}),
        ),
        request=HttpRequestProperties(request_id=of.request_id, path="/v1/chat/completions"),
        response=HttpResponseProperties(
            response_code=of.status,
            response_body_bytes=of.body_bytes,
            response_headers={names.HEADER_ROUTING_BACKEND: of.backend} if of.backend else {},
            response_code_details="via_upstream",
        ),
    )


def a_message(*entries: HttpAccessLogEntry) -> StreamAccessLogsMessage:
    """A message of the access log stream."""
    return StreamAccessLogsMessage(
        identifier=StreamAccessLogsMessageIdentifier(log_name=names.LISTENER_PUBLIC),
        http_logs=StreamAccessLogsMessageHttpAccessLogEntries(log_entry=list(entries)),
    )
