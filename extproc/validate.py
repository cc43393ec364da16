"""What a request asks for, once its body is known to be sound.

OpenAI bodies pass through byte for byte: only fields that the router reads, or that no backend could accept, are
checked. /v1/inference is the router's own schema and becomes a completion or chat call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from extproc.json_body import Document, parse, written
from gateway.endpoints import CHAT_PATH, COMPLETION_PATH, Endpoint, Kind
from gateway.errors import Reason, Refused
from policies.model import ModelName

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TYPE_NAMES: Final[Mapping[type, str]] = {str: "a string", dict: "an object", list: "an array", bool: "true or false"}
METADATA_ENTRIES_MAX: Final = 64
METADATA_VALUE_MAX: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What only /v1/inference has. ``metadata`` is kept on the usage record."""

    request_id: str
    payload: str
    signature_hex: str | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A sound request. ``document`` is the body for the backend, a call of ``kind``; ``path``, if set, the new path."""

    kind: Kind
    model: ModelName
    document: Document
    path: str | None = None
    stream: bool = False
    inference: Inference | None = None


def _invalid(param: str, text: str) -> Refused:
    return Refused(Reason.INVALID_FIELD, f"'{param}' {text}.", param=param)


def _missing(param: str) -> Refused:
    return Refused(Reason.MISSING_FIELD, f"The required field '{param}' is missing.", param=param)


def _required(members: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """A member that must be there, have one of the types and not be empty."""
    value = members.get(name)
    if value is None:
        raise _missing(name)
    if not isinstance(value, kinds):
        raise _invalid(name, f"must be {' or '.join(_TYPE_NAMES[kind] for kind in kinds)}")
    if value in ("", []):
        raise _invalid(name, "must not be empty")
    return value


def _optional(members: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = members.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise _invalid(name, f"must be {_TYPE_NAMES[kind]}")
    return value


def _counts(members: Mapping[str, Any]) -> None:
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
        value = members.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise _invalid(name, "must be a whole number of at least 1")
    for name in ("temperature", "top_p"):
        value = members.get(name)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise _invalid(name, "must be a number")


def _messages(members: Mapping[str, Any]) -> None:
    for index, item in enumerate(_required(members, "messages", list)):
        at = f"messages[{index}]"
        if not isinstance(item, dict):
            raise _invalid(at, "must be an object")
        role = item.get("role")
        if role is None:
            raise _missing(f"{at}.role")
        if not isinstance(role, str) or not role:
            raise _invalid(f"{at}.role", "must be a string that is not empty")
        content = item.get("content")
        if content is not None and not isinstance(content, str | list):
            raise _invalid(f"{at}.content", "must be a string or an array")


def _check_call(kind: Kind, members: Mapping[str, Any]) -> None:
    match kind:
        case Kind.CHAT:
            _messages(members)
        case Kind.COMPLETION:
            _required(members, "prompt", str, list)
        case Kind.EMBEDDING:
            _required(members, "input", str, list)
        case Kind.RESPONSE:
            if members.get("input") is not None:
                _required(members, "input", str, list)
            elif members.get("prompt") is None and members.get("previous_response_id") is None:
                raise _missing("input")
        case _:
            raise AssertionError(kind)
    _counts(members)
    options = _optional(members, "stream_options", dict, {})
    _optional_in(options, "stream_options", "include_usage")


def _optional_in(members: Mapping[str, Any], parent: str, name: str) -> None:
    value = members.get(name)
    if value is not None and not isinstance(value, bool):
        raise _invalid(f"{parent}.{name}", f"must be {_TYPE_NAMES[bool]}")


def validate(endpoint: Endpoint, body: bytes, *, body_max_bytes: int, payload_max_bytes: int) -> Ask:
    """What a request body asks for.

    Raises:
        Refused: a 4xx that names the field at fault.
    """
    if len(body) > body_max_bytes:
        raise Refused(Reason.BODY_TOO_LARGE, f"The request body has more than {body_max_bytes} bytes.")
    document = parse(body)
    if endpoint.kind is Kind.INFERENCE:
        return _inference(document.members, payload_max_bytes)
    model = _required(document.members, "model", str)
    stream = _optional(document.members, "stream", bool, False)
    _check_call(endpoint.kind, document.members)
    return Ask(kind=endpoint.kind, model=ModelName(model), document=document, stream=stream)


def _inference(members: Mapping[str, Any], payload_max_bytes: int) -> Ask:
    request_id = _required(members, "request_id", str)
    if not _UUID.fullmatch(request_id):
        raise _invalid("request_id", "must be a UUID such as 123e4567-e89b-12d3-a456-426614174000")
    model = _required(members, "model", str)
    payload = _required(members, "payload", str)
    try:
        size = len(payload.encode())
    except UnicodeEncodeError as error:
        raise _invalid("payload", "has an unpaired surrogate, which is not text") from error
    if size > payload_max_bytes:
        text = f"'payload' has {size} bytes of UTF-8; at most {payload_max_bytes} are allowed."
        raise Refused(Reason.PAYLOAD_TOO_LARGE, text, param="payload")
    signature = _optional(members, "hmac_signature", str, None)
    parameters = _optional(members, "parameters", dict, {})
    for name in ("model", "prompt", "messages"):
        if name in parameters:
            raise _invalid(f"parameters.{name}", f"is not a parameter; it comes from '{_origin(name)}'")
    content_type = _optional(members, "content_type", str, "text/plain")
    kind, path, document = _call(content_type, model, payload, parameters)
    return Ask(
        kind=kind,
        model=ModelName(model),
        document=document,
        path=path,
        inference=Inference(
            request_id=request_id, payload=payload, signature_hex=signature, metadata=_metadata(members)
        ),
    )


def _origin(name: str) -> str:
    return "model" if name == "model" else "payload"


def _metadata(members: Mapping[str, Any]) -> Mapping[str, str]:
    metadata: dict[str, str] = _optional(members, "metadata", dict, {})
    if len(metadata) > METADATA_ENTRIES_MAX:
        raise _invalid("metadata", f"has more than {METADATA_ENTRIES_MAX} entries")
    for name, value in metadata.items():
        at = f"metadata.{name[:64]}"
        if not isinstance(value, str):
            raise _invalid(at, "must be a string")
        if len(name) + len(value) > METADATA_VALUE_MAX:
            raise _invalid(at, f"has more than {METADATA_VALUE_MAX} characters")
    return metadata


def _call(content_type: str, model: str, payload: str, parameters: Mapping[str, Any]) -> tuple[Kind, str, Document]:
    """Kind, path and body of the backend call that an inference becomes."""
    match content_type:
        case "text/plain":
            call = {"model": model, "prompt": payload, **parameters}
        case "application/json":
            call = {**_json_payload(payload), **parameters, "model": model}
        case _:
            raise _invalid("content_type", "must be 'text/plain' or 'application/json'")
    kind, path = (Kind.CHAT, CHAT_PATH) if "messages" in call else (Kind.COMPLETION, COMPLETION_PATH)
    if call.get("stream"):
        at = "parameters.stream" if "stream" in parameters else "payload.stream"
        raise _invalid(at, f"is not available here; stream from {path}")
    try:
        _check_call(kind, call)
    except Refused as refused:
        parent = "parameters" if (refused.param or "").partition(".")[0] in parameters else "payload"
        raise Refused(refused.reason, f"In '{parent}': {refused.text}", param=f"{parent}.{refused.param}") from refused
    return kind, path, Document(text=written(call), members=call)


def _json_payload(payload: str) -> dict[str, Any]:
    try:
        return parse(payload).members
    except Refused as refused:
        raise Refused(refused.reason, f"In 'payload': {refused.text}", param="payload") from refused
