"""gRPC over HTTP/2: messages in data, a status in trailers ("PROTOCOL-HTTP2.md" of grpc), without I/O."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final
from urllib.parse import quote

from extproc.http2.headers import encode

_PREFIX: Final = struct.Struct(">BL")
PREFIX_BYTES: Final = _PREFIX.size
"""Before each message: whether it is compressed, and its length."""


class Status(IntEnum):
    """Those of gRPC's status codes that are used here."""

    OK = 0
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13


class GrpcError(Exception):
    """Ends a call by a status; the text goes to the peer."""

    def __init__(self, status: Status, what: str) -> None:
        super().__init__(what)
        self.status = status


_RESPONSE: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
RESPONSE_HEADERS: Final = encode(_RESPONSE)
_OK: Final = ((b"grpc-status", b"0"),)
_TRAILERS_OK: Final = encode(_OK)
_SAFE: Final = " !\"#$&'()*+,/:;<=>?@[]^`{|}~"
_TEXT_MAX: Final = 1024


def trailers(error: GrpcError | None) -> bytes:
    """The header block that ends a response."""
    return _TRAILERS_OK if error is None else encode(_status(error))


def trailers_only(error: GrpcError | None) -> bytes:
    """The one header block of a response that has no message."""
    return encode((*_RESPONSE, *(_OK if error is None else _status(error))))


def _status(error: GrpcError) -> tuple[tuple[bytes, bytes], ...]:
    text = quote(str(error)[:_TEXT_MAX], safe=_SAFE)
    return (b"grpc-status", b"%d" % error.status), (b"grpc-message", text.encode())


def framed(message: bytes) -> bytes:
    """A message behind its prefix, not compressed."""
    return _PREFIX.pack(0, len(message)) + message


class MessageReader:
    """Cuts the data of a stream into messages of at most ``max_bytes``."""

    __slots__ = ("_have_bytes", "_max_bytes", "_need_bytes", "_parts")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._have_bytes = 0
        self._need_bytes = PREFIX_BYTES
        """With fewer there is nothing to be done yet."""

    @property
    def in_message(self) -> bool:
        """Whether a message has begun and is not complete."""
        return self._have_bytes > 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that ``data`` completes.

        Raises:
            GrpcError: a message is too long, or compressed. What follows it means nothing any more.
        """
        self._parts.append(data)
        self._have_bytes += len(data)
        if self._have_bytes < self._need_bytes:
            return
        if len(self._parts) > 1:
            data = b"".join(self._parts)
        at, need = 0, PREFIX_BYTES
        while len(data) - at >= PREFIX_BYTES:
            need = PREFIX_BYTES + self._size(data, at)
            if len(data) - at < need:
                break
            yield data[at + PREFIX_BYTES : at + need]
            at, need = at + need, PREFIX_BYTES
        self._parts = [data[at:]] if at < len(data) else []
        self._have_bytes, self._need_bytes = len(data) - at, need

    def _size(self, data: bytes, at: int) -> int:
        """Length of the message whose prefix is at ``at``."""
        compressed, size = _PREFIX.unpack_from(data, at)
        if compressed:
            raise GrpcError(Status.UNIMPLEMENTED, "compressed messages are not supported")
        if size > self._max_bytes:
            raise GrpcError(Status.RESOURCE_EXHAUSTED, f"a message of {size} bytes; {self._max_bytes} are allowed")
        return int(size)
