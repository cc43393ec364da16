"""Codec of Envoy's access log stream: what is told of each request that has ended.

The messages are upb classes made from a descriptor set in a pool of their own, as extproc's are (design, "Two codecs");
``make protos`` writes it. Envoy API: als.proto, accesslog.proto. What the metadata means is in ``gateway/names.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from google.protobuf.message import DecodeError

from gateway import names
from gateway.protobuf import message_classes
from policies import price
from policies.model import BackendId, KeyId, ModelName, OrganizationId, Price

TOKENS_MAX: Final = 10**9
"""What a backend counts beyond it is no count of tokens, and sums of it would not stay exact in the store."""


message: Final = message_classes("usage", "access_log.binpb")
_Message: Final = message("envoy.service.accesslog.v3.StreamAccessLogsMessage")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """Tokens as the backend has counted them; a count that it left out is 0. The cached ones are part of the input."""

    tokens_input: int
    tokens_output: int
    tokens_input_cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One request that has ended.

    ``backend`` is '' where none answered, ``status`` 0 where the client had left before there was one, ``usage`` None
    where the backend said nothing. ``started_s`` is unix seconds. ``tokens_input`` is the estimate and
    ``tokens_output`` the grant of its admission; ``prices`` are those of its candidates then. ``closed``: it left no
    ledger entry open. ``flags`` are the names of Envoy's response flags.
    """

    request_id: str
    organization_id: OrganizationId
    key_id: KeyId
    model: ModelName
    backend: BackendId
    status: int
    flags: tuple[str, ...]
    attempts: int
    started_s: int
    body_bytes: int
    stream: bool
    closed: bool
    usage: TokenUsage | None
    tokens_input: int
    tokens_output: int
    prices: Mapping[str, Price]
    charge_to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one message of the stream told; ``malformed`` says of each entry that cannot be used why."""

    finished: tuple[Finished, ...]
    malformed: tuple[str, ...]


class Malformed(ValueError):
    """An entry that cannot be used."""


def decode(data: bytes) -> Batch:
    """What a serialised StreamAccessLogsMessage tells."""
    try:
        told = _Message.FromString(data)
    except DecodeError as error:
        return Batch(finished=(), malformed=(f"not a message: {error}",))
    malformed = [f"a {entry.DESCRIPTOR.name}" for entry in told.tcp_logs.log_entry]
    finished = []
    for entry in told.http_logs.log_entry:
        try:
            finished.append(_finished(entry))
        except ValueError as error:
            malformed.append(f"{entry.request.request_id or 'no request id'}: {error}")
    return Batch(finished=tuple(finished), malformed=tuple(malformed))


def _finished(entry: Any) -> Finished:
    common, response = entry.common_properties, entry.response
    said = _fields(common.metadata, names.METADATA_NAMESPACE)
    limits = _fields(common.metadata, names.LIMITS_NAMESPACE)
    organization, request_id = _text(said, names.METADATA_ORGANIZATION), entry.request.request_id
    if not (request_id and organization):
        raise Malformed("it names no request and organisation")
    return Finished(
        request_id=request_id,
        organization_id=OrganizationId(organization),
        key_id=KeyId(_text(said, names.METADATA_KEY)),
        model=ModelName(_text(said, names.METADATA_MODEL)),
        backend=BackendId(response.response_headers.get(names.HEADER_ROUTING_BACKEND, "")),
        status=response.response_code.value,
        flags=tuple([field.name for field, _ in common.response_flags.ListFields()]),
        attempts=common.upstream_request_attempt_count,
        started_s=common.start_time.seconds,
        body_bytes=response.response_body_bytes,
        stream=_flag(said, names.METADATA_STREAM),
        closed=_flag(said, names.METADATA_CLOSED),
        usage=_usage(_fields(common.metadata, names.USAGE_NAMESPACE)),
        tokens_input=_decimal(limits, names.METADATA_TOKENS_INPUT),
        tokens_output=_decimal(limits, names.METADATA_TOKENS_OUTPUT),
        prices=_prices(_text(said, names.METADATA_PRICES)),
        charge_to=_text(said, names.METADATA_CHARGE_TO),
    )


def _fields(metadata: Any, namespace: str) -> Any:
    found = metadata.filter_metadata
    return found[namespace].fields if namespace in found else {}


def _text(fields: Any, key: str) -> str:
    return fields[key].string_value if key in fields else ""


def _flag(fields: Any, key: str) -> bool:
    return fields[key].bool_value if key in fields else False


def _decimal(fields: Any, key: str) -> int:
    text = _text(fields, key)
    if text and not (text.isascii() and text.isdecimal()):
        raise Malformed(f"{key} is not a number: {text!r}")
    return int(text or 0)


@lru_cache(maxsize=1024)
def _prices(line: str) -> Mapping[str, Price]:
    """The same object for the same line: requests of one model have the same."""
    try:
        return price.read(line)
    except ValueError as error:
        raise Malformed(f"{names.METADATA_PRICES} cannot be read: {error}") from None


def _count(fields: Any, key: str) -> int | None:
    """A backend's own number; None where it is none."""
    if key not in fields or fields[key].WhichOneof("kind") != "number_value":
        return None
    number = fields[key].number_value
    return int(number) if math.isfinite(number) and 0 <= number <= TOKENS_MAX else None


def _usage(fields: Any) -> TokenUsage | None:
    tokens_input = _count(fields, names.METADATA_TOKENS_INPUT)
    tokens_output = _count(fields, names.METADATA_TOKENS_OUTPUT)
    if tokens_input is None and tokens_output is None:
        return None
    return TokenUsage(
        tokens_input=tokens_input or 0,
        tokens_output=tokens_output or 0,
        tokens_input_cached=_count(fields, names.METADATA_TOKENS_INPUT_CACHED) or 0,
    )
