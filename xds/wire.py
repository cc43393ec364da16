"""The six ADS messages as bytes, by hand: a push joins bytes that are already encoded.

Field numbers are those of envoy/service/discovery/v3/discovery.proto; a test holds every function against
envoy-data-plane. Reading skips what the session does not need: a Node alone lists hundreds of extensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from xds.messages import DeltaRequest, DeltaResponse, SotwRequest, SotwResponse

_BYTES: Final = 2
"""Wire type of strings, bytes and embedded messages."""


class WireError(Exception):
    """Bytes that are not the message they should be."""


def read_delta_request(message: bytes) -> DeltaRequest:
    """Decode a DeltaDiscoveryRequest.

    Raises:
        WireError: not a protobuf message, or not UTF-8 where text is due.
    """
    texts: dict[int, str] = {}
    subscribe: list[str] = []
    unsubscribe: list[str] = []
    versions: dict[str, str] = {}
    for number, value in _fields(message):
        match number:
            case 3:
                subscribe.append(_text(value))
            case 4:
                unsubscribe.append(_text(value))
            case 5:
                versions[_text_field(value, 1)] = _text_field(value, 2)
            case 1:
                texts[number] = _text_field(value, 1)
            case 7:
                texts[number] = _text_field(value, 2)
            case 2 | 6:
                texts[number] = _text(value)
    return DeltaRequest(
        type_url=texts.get(2, ""),
        subscribe=tuple(subscribe),
        unsubscribe=tuple(unsubscribe),
        initial_resource_versions=versions,
        response_nonce=texts.get(6, ""),
        error_detail=texts.get(7),
        node=texts.get(1, ""),
    )


def read_sotw_request(message: bytes) -> SotwRequest:
    """Decode a DiscoveryRequest.

    Raises:
        WireError: not a protobuf message, or not UTF-8 where text is due.
    """
    texts: dict[int, str] = {}
    names: list[str] = []
    for number, value in _fields(message):
        match number:
            case 3:
                names.append(_text(value))
            case 2:
                texts[number] = _text_field(value, 1)
            case 6:
                texts[number] = _text_field(value, 2)
            case 1 | 4 | 5:
                texts[number] = _text(value)
    return SotwRequest(
        type_url=texts.get(4, ""),
        resource_names=tuple(names),
        version_info=texts.get(1, ""),
        response_nonce=texts.get(5, ""),
        error_detail=texts.get(6),
        node=texts.get(2, ""),
    )


def write_delta_response(response: DeltaResponse) -> bytes:
    """Encode a DeltaDiscoveryResponse."""
    type_url = _field(1, response.type_url.encode())
    parts = [_field(1, response.system_version.encode())]
    for resource in response.resources:
        value = type_url + _field(2, resource.body)
        parts.append(
            _element(2, _field(1, resource.version.encode()) + _field(2, value) + _field(3, resource.name.encode()))
        )
    parts.append(_field(4, response.type_url.encode()))
    parts.append(_field(5, response.nonce.encode()))
    parts.extend(_element(6, name.encode()) for name in response.removed)
    return b"".join(parts)


def write_sotw_response(response: SotwResponse) -> bytes:
    """Encode a DiscoveryResponse."""
    type_url = _field(1, response.type_url.encode())
    parts = [_field(1, response.version_info.encode())]
    parts.extend(_element(2, type_url + _field(2, resource.body)) for resource in response.resources)
    parts.append(_field(4, response.type_url.encode()))
    parts.append(_field(5, response.nonce.encode()))
    return b"".join(parts)


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field; an empty one is left out, as proto3 does."""
    return _element(number, value) if value else b""


def _element(number: int, value: bytes) -> bytes:
    """One element of a repeated length-delimited field."""
    return bytes((number << 3 | _BYTES,)) + _varint(len(value)) + value


@lru_cache(maxsize=4096)  # lengths repeat
def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and value of each length-delimited field; fields of other kinds are skipped."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _read_varint(message, at)
        match tag & 7:
            case 0:
                _, at = _read_varint(message, at)
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                size, at = _read_varint(message, at)
                if at + size > end:
                    raise WireError("a field is longer than its message")
                yield tag >> 3, message[at : at + size]
                at += size
            case kind:
                raise WireError(f"unknown wire type {kind}")
    if at > end:
        raise WireError("a field is longer than its message")


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:  # noqa: PLR2004 - a varint holds 64 bits
            raise WireError("a varint does not end")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the continuation bit
            return value, at
        shift += 7


def _text_field(message: bytes, number: int) -> str:
    """Text of a field of an embedded message; the last one counts."""
    value = b""
    for each, found in _fields(message):
        if each == number:
            value = found
    return _text(value)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise WireError("text is not UTF-8") from error
