"""HTTP/2 frames, without I/O: from bytes and to bytes (RFC 9113, sections 3.4, 4.1 and 6)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Final, NamedTuple

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES: Final = 9
MAX_FRAME_BYTES: Final = 16_384
"""SETTINGS_MAX_FRAME_SIZE unless said otherwise (6.5.2), and the least it can be."""
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
MAX_STREAM_ID: Final = 2**31 - 1

# Frame types (section 6).
DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

# Flags.
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

_HEAD: Final = struct.Struct(">HBBBL")
_SETTING: Final = struct.Struct(">HL")
_PRIORITY_BYTES: Final = 5


class Setting(IntEnum):
    """Settings by their identifier (6.5.2)."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6


class ErrorCode(IntEnum):
    """Why a stream or a connection ends (section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class ConnectionFault(Exception):
    """The peer broke the protocol for the whole connection (5.4.1)."""

    def __init__(self, code: ErrorCode, what: str) -> None:
        super().__init__(what)
        self.code = code


class StreamFault(Exception):
    """The peer broke the protocol for one stream (5.4.2)."""

    def __init__(self, code: ErrorCode, what: str) -> None:
        super().__init__(what)
        self.code = code


class Frame(NamedTuple):
    """One frame as it came; what its payload means is not looked at yet."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


class FrameReader:
    """Cuts what a client sends into frames: its preface, then frames of at most MAX_FRAME_BYTES."""

    __slots__ = ("_preface", "_rest")

    def __init__(self) -> None:
        self._preface = PREFACE
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that ``data`` completes.

        Raises:
            ConnectionFault: no preface, or a frame that is too long.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if self._preface:
            data = self._without_preface(data)
        at, end = 0, len(data)
        while end - at >= HEAD_BYTES:
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, at)
            size = high << 8 | low
            if size > MAX_FRAME_BYTES:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            start = at + HEAD_BYTES
            if end - start < size:
                break
            at = start + size
            yield Frame(kind, flags, stream_id & MAX_STREAM_ID, data[start:at])
        self._rest = data[at:] if at else data

    def _without_preface(self, data: bytes) -> bytes:
        size = min(len(data), len(self._preface))
        if data[:size] != self._preface[:size]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the connection preface is missing")
        self._preface = self._preface[size:]
        return data[size:]


def unpadded(frame: Frame) -> bytes:
    """The payload of a DATA or HEADERS frame without padding and priority (6.1, 6.2).

    Raises:
        ConnectionFault: it is shorter than its flags say.
    """
    payload, start, padding = frame.payload, 0, 0
    if frame.flags & PADDED:
        if not payload:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without the length of its padding")
        start, padding = 1, payload[0]
    if frame.kind == HEADERS and frame.flags & HAS_PRIORITY:
        start += _PRIORITY_BYTES
        if len(payload) < start:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for their priority")
    if padding > len(payload) - start:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than payload")
    return payload[start : len(payload) - padding] if start else payload


def sized(frame: Frame, size: int) -> None:
    """Look at the length of a payload that can have but one.

    Raises:
        ConnectionFault: it has another.
    """
    if len(frame.payload) != size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"frame type {frame.kind} of {len(frame.payload)} bytes")


def of_connection(frame: Frame) -> None:
    """Look at the stream of a frame that is the connection's.

    Raises:
        ConnectionFault: it has one.
    """
    if frame.stream_id:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"frame type {frame.kind} on stream {frame.stream_id}")


def settings_in(frame: Frame) -> Iterable[tuple[int, int]]:
    """Identifiers and values of a SETTINGS frame, in their order (6.5.1).

    Raises:
        ConnectionFault: its length is not one of whole settings.
    """
    if len(frame.payload) % _SETTING.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of an odd length")
    return _SETTING.iter_unpack(frame.payload)


def head(size: int, kind: int, flags: int, stream_id: int) -> bytes:
    """The head of a frame whose payload has ``size`` bytes."""
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id)


def settings(values: Mapping[Setting, int]) -> bytes:
    """A SETTINGS frame."""
    payload = b"".join(_SETTING.pack(name, value) for name, value in values.items())
    return head(len(payload), SETTINGS, 0, 0) + payload


SETTINGS_ACK: Final = head(0, SETTINGS, ACK, 0)


def ping(data: bytes, *, ack: bool) -> bytes:
    """A PING frame; ``data`` has 8 bytes (6.7)."""
    return head(8, PING, ACK if ack else 0, 0) + data


def window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection (6.9)."""
    return head(4, WINDOW_UPDATE, 0, stream_id) + increment.to_bytes(4, "big")


def rst_stream(stream_id: int, code: ErrorCode) -> bytes:
    """A RST_STREAM frame (6.4)."""
    return head(4, RST_STREAM, 0, stream_id) + code.to_bytes(4, "big")


def goaway(last_stream_id: int, code: ErrorCode, what: str = "") -> bytes:
    """A GOAWAY frame; ``what`` is for the peer's log (6.8)."""
    payload = last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + what.encode()
    return head(len(payload), GOAWAY, 0, 0) + payload


def headers(stream_id: int, block: bytes, *, end_stream: bool) -> bytes:
    """A HEADERS frame with a whole header block (6.2)."""
    return head(len(block), HEADERS, END_HEADERS | (END_STREAM if end_stream else 0), stream_id) + block
