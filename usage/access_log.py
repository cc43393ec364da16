"""Codec of Envoy's access log stream: what is told of each request when it ends, and while it runs.

The messages are upb classes made from a descriptor set in a pool of their own, as extproc's are (design, "Two codecs");
``make protos`` writes it. Envoy API: als.proto, accesslog.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from gateway import names
from gateway.protobuf import message_classes
from policies.model import BackendId, OrganizationId
from usage.finished import LIMITS_USED, NONE, FailedAttempt, Fields, Finished, Value, check_storable, finished

message: Final = message_classes("usage", "access_log.binpb")
_Message: Final = message("envoy.service.accesslog.v3.StreamAccessLogsMessage")
_PERIODIC: Final = 5  # AccessLogType.DownstreamPeriodic
_FLAGS: Final = {
    field.name: short
    for field, short in zip(
        message("envoy.data.accesslog.v3.ResponseFlags").DESCRIPTOR.fields,
        (
            *("LH", "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "UAEX", "RLSE", "DC", "URX"),
            *("SI", "IH", "DPE", "UMSDR", "RFCF", "NFCF", "DT", "UPE", "NC", "OM", "DF", "DR"),
        ),
        strict=True,
    )
}
"""Short forms of response flags, as the journal has them. Envoy docs: "Access log format", RESPONSE_FLAGS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A sign of life of a request that has not ended."""

    request_id: str
    organization_id: OrganizationId


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one message of the stream told; ``malformed`` says of each entry that cannot be used why."""

    finished: tuple[Finished, ...] = ()
    attempts: tuple[FailedAttempt, ...] = ()
    running: tuple[Running, ...] = ()
    malformed: tuple[str, ...] = ()


def log_name(data: bytes) -> str:
    """Name of the log that the first message of a stream says it is; '' where it says nothing."""
    try:
        return str(_Message.FromString(data).identifier.log_name)
    except DecodeError:
        return ""


def decode(data: bytes, listener: str = names.LISTENER_PUBLIC) -> Batch:
    """What a serialised StreamAccessLogsMessage tells of the requests of a listener."""
    try:
        told = _Message.FromString(data)
    except DecodeError as error:
        return Batch(malformed=(f"not a message: {error}",))
    malformed = [f"a {entry.DESCRIPTOR.name}" for entry in told.tcp_logs.log_entry]
    ended: list[Finished] = []
    attempts: list[FailedAttempt] = []
    running: list[Running] = []
    for entry in told.http_logs.log_entry:
        try:
            if listener == names.LISTENER_BACKENDS:
                attempts.append(_attempt(entry))
            elif entry.common_properties.access_log_type == _PERIODIC:
                running += _running(entry)
            else:
                ended.append(_finished(entry))
        except ValueError as error:
            malformed.append(f"{entry.request.request_id or 'no request id'}: {error}")
    return Batch(finished=tuple(ended), attempts=tuple(attempts), running=tuple(running), malformed=tuple(malformed))


def _finished(entry: Any) -> Finished:
    common, response, request = entry.common_properties, entry.response, entry.request
    metadata = common.metadata.filter_metadata
    headers = response.response_headers
    return finished(
        request_id=request.request_id,
        path=request.original_path or request.path,
        status=response.response_code.value,
        flags=_flags(common),
        attempts=common.upstream_request_attempt_count,
        started_us=_started_us(common),
        duration_ms=_duration_ms(common),
        body_bytes=response.response_body_bytes,
        backend=headers.get(names.HEADER_ROUTING_BACKEND, ""),
        decision=headers.get(names.HEADER_ROUTING_DECISION, ""),
        cluster=common.upstream_cluster,
        said=_fields(metadata, names.METADATA_NAMESPACE),
        limits=_fields(metadata, names.LIMITS_NAMESPACE, LIMITS_USED),
        usage=_fields(metadata, names.USAGE_NAMESPACE),
        counted=_fields(metadata, names.COUNTED_NAMESPACE),
    )


def _attempt(entry: Any) -> FailedAttempt:
    common = entry.common_properties
    check_storable(_started_us(common))
    return FailedAttempt(
        request_id=entry.request.request_id,
        backend=BackendId(common.upstream_cluster.removeprefix(names.backend_cluster(""))),
        status=entry.response.response_code.value,
        flags=_flags(common),
        started_us=_started_us(common),
        duration_ms=_duration_ms(common),
    )


def _running(entry: Any) -> list[Running]:
    said = _fields(entry.common_properties.metadata.filter_metadata, names.METADATA_NAMESPACE)
    organization, request_id = said.get(names.METADATA_ORGANIZATION), entry.request.request_id
    if not (isinstance(organization, str) and organization and request_id):
        return []
    return [Running(request_id=request_id, organization_id=OrganizationId(organization))]


def _flags(common: Any) -> tuple[str, ...]:
    return tuple([_FLAGS[field.name] for field, _ in common.response_flags.ListFields()])


def _started_us(common: Any) -> int:
    start = common.start_time
    return int(start.seconds) * 1_000_000 + int(start.nanos) // 1000


def _duration_ms(common: Any) -> int:
    duration = common.duration
    return int(duration.seconds) * 1000 + int(duration.nanos) // 1_000_000


def _fields(metadata: Any, namespace: str, only: Sequence[str] = ()) -> Fields:
    if namespace not in metadata:
        return NONE
    fields = metadata[namespace].fields
    if only:  # the rest, mostly response headers, costs as much as it does
        return {key: _value(fields[key]) for key in only if key in fields}
    return {key: _value(value) for key, value in fields.items()}


def _value(value: Any) -> Value:
    if text := value.string_value:  # nearly all of them, and looking costs half of asking
        return str(text)
    match value.WhichOneof("kind"):
        case "string_value":
            return str(value.string_value)
        case "number_value":
            return float(value.number_value)
        case "bool_value":
            return bool(value.bool_value)
        case _:
            return ""
