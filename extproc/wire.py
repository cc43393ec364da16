"""Codec between ext_proc's protobuf messages and the exchange's events and commands.

The hot path cannot afford betterproto2 (design, "Two codecs"), so the messages are upb classes made from
a descriptor set in a pool of their own; ``make protos`` writes it. Envoy API: external_processor.proto.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from extproc.exchange import (
    Command,
    Continue,
    Event,
    Forward,
    Metadata,
    Pass,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Rewrite,
)
from gateway import names
from gateway.protobuf import message_classes

message: Final = message_classes("extproc", "ext_proc.binpb")
_Request: Final = message("envoy.service.ext_proc.v3.ProcessingRequest")
_Response: Final = message("envoy.service.ext_proc.v3.ProcessingResponse")
_OVERWRITE: Final = 2  # HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD

_CONTINUE: Final[dict[type[object], bytes]] = {
    RequestHeaders: _Response(request_headers={}).SerializeToString(),
    RequestBody: _Response(request_body={}).SerializeToString(),
    ResponseHeaders: _Response(response_headers={}).SerializeToString(),
    ResponseBody: _Response(response_body={}).SerializeToString(),
}


_STREAMED: Final = _Response(
    mode_override={
        "request_header_mode": "SEND",
        "request_body_mode": "BUFFERED",
        "response_header_mode": "SEND",
        "response_body_mode": "STREAMED",
        "request_trailer_mode": "SKIP",
        "response_trailer_mode": "SKIP",
    }
).SerializeToString()
"""Envoy honours it in answer to headers alone, and takes it for all that is to come of the exchange."""


class WireError(Exception):
    """A message that is not a ProcessingRequest this server can be sent."""


def _headers(http_headers: Any) -> dict[str, str]:
    """Headers by name; a repeated one is joined by a comma (RFC 9110, 5.3)."""
    found: dict[str, str] = {}
    for field in http_headers.headers.headers:
        value = field.raw_value.decode("latin-1") if field.raw_value else field.value
        found[field.key] = f"{found[field.key]},{value}" if field.key in found else value
    return found


def decode(data: bytes) -> Event:
    """The event that a serialised ProcessingRequest tells of.

    Raises:
        WireError: not a message that the configured processing mode leads to.
    """
    request = _Request.FromString(data)
    match request.WhichOneof("request"):
        case "request_headers":
            said = request.request_headers
            return RequestHeaders(headers=_headers(said), ends=said.end_of_stream)
        case "request_body":
            return RequestBody(body=request.request_body.body)
        case "response_headers":
            said = request.response_headers
            return ResponseHeaders(headers=_headers(said), ends=said.end_of_stream)
        case "response_body":
            return ResponseBody(body=request.response_body.body, ends=request.response_body.end_of_stream)
        case other:
            raise WireError(f"unexpected message: {other}")


def _set(headers: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    return [
        {"header": {"key": key, "raw_value": value.encode()}, "append_action": _OVERWRITE} for key, value in headers
    ]


def _metadata(namespace: str, values: Metadata) -> bytes:
    """A ProcessingResponse of nothing but metadata: protobuf messages are merged by putting their bytes together."""
    if not values:
        return b""
    response = _Response()
    fields = response.dynamic_metadata.fields[namespace].struct_value.fields
    for key, value in values:
        if isinstance(value, bool):
            fields[key].bool_value = value
        else:
            fields[key].string_value = value
    return bytes(response.SerializeToString())


@lru_cache(maxsize=4096)
def _caller_metadata(metadata: Metadata) -> bytes:
    """The same for every request of a caller."""
    return _metadata(names.METADATA_NAMESPACE, metadata)


@lru_cache(maxsize=4096)
def _encode_unchanged(headers: tuple[tuple[str, str], ...], metadata: Metadata) -> bytes:
    """Forward without a body of its own: the same caller asking for the same model is answered the same bytes."""
    return _encode_forward(headers, metadata, None)


def _encode_forward(headers: tuple[tuple[str, str], ...], metadata: Metadata, body: bytes | None) -> bytes:
    common: dict[str, Any] = {"clear_route_cache": True}
    if body is not None:
        headers = (*headers, ("content-length", str(len(body))))
        common["body_mutation"] = {"body": body}
    common["header_mutation"] = {"set_headers": _set(headers)}
    response = bytes(_Response(request_body={"response": common}).SerializeToString())
    return response + _metadata(names.METADATA_NAMESPACE, metadata)


@lru_cache(maxsize=4096)
def _encode_pass(command: Pass) -> bytes:
    common = {"header_mutation": {"set_headers": _set(command.headers)}}
    response = bytes(_Response(request_headers={"response": common}).SerializeToString())
    return response + _metadata(names.METADATA_NAMESPACE, command.metadata)


def _encode_rewrite(command: Rewrite) -> bytes:
    headers = [("content-type", "application/json"), ("content-length", str(len(command.body)))]
    if command.status is not None:
        headers.append((":status", str(command.status)))
    common = {"body_mutation": {"body": command.body}, "header_mutation": {"set_headers": _set(tuple(headers))}}
    response = bytes(_Response(response_body={"response": common}).SerializeToString())
    return response + _metadata(names.COUNTED_NAMESPACE, command.counted)


def _encode_reply(command: Reply) -> bytes:
    headers = command.headers
    if all(name != "content-type" for name, _ in headers):
        headers = (("content-type", "application/json"), *headers)
    reply = {
        "status": {"code": command.status},
        "headers": {"set_headers": _set(headers)},
        "body": command.body,
        "details": command.details or names.DECIDED_DETAILS,
    }
    response = bytes(_Response(immediate_response=reply).SerializeToString())
    said = _metadata(names.METADATA_NAMESPACE, command.metadata)
    return response + said + _metadata(names.LIMITS_NAMESPACE, command.limits)


def encode(command: Command, event: Event) -> bytes:
    """The serialised ProcessingResponse that answers ``event`` with ``command``."""
    match command:
        case Continue():
            said = _CONTINUE[type(event)]
            if command.metadata:
                said += _caller_metadata(command.metadata)
            if command.counted:
                said += _metadata(names.COUNTED_NAMESPACE, command.counted)
            return said + _STREAMED if command.body_wanted else said
        case Forward():
            if command.body is None:
                response = _encode_unchanged(command.headers, command.metadata)
            else:
                response = _encode_forward(command.headers, command.metadata, command.body)
            return response + _metadata(names.LIMITS_NAMESPACE, command.limits)
        case Rewrite():
            return _encode_rewrite(command)
        case Reply():
            return _encode_reply(command)
        case Pass():
            return _encode_pass(command)
