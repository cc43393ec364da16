"""What a peer does on a connection: a closed vocabulary, in the peer's order."""

from __future__ import annotations

from typing import NamedTuple

from extproc.http2.frames import ErrorCode
from extproc.http2.headers import Fields


class Opened(NamedTuple):
    """A new stream."""

    stream_id: int
    fields: Fields


class Received(NamedTuple):
    """Data of a stream, to be given back by :meth:`Connection.consumed`."""

    stream_id: int
    data: bytes


class Ended(NamedTuple):
    """Nothing more comes on a stream that can still be answered: it is half-closed (5.1)."""

    stream_id: int


class Reset(NamedTuple):
    """A stream is no more."""

    stream_id: int
    code: int


class Failed(NamedTuple):
    """The peer broke the protocol; the connection is over, and every stream with it."""

    code: ErrorCode
    what: str


Event = Opened | Received | Ended | Reset | Failed
