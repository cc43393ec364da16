"""The state of one stream (RFC 9113, section 5): what may still come, what may be sent and what waits for it."""

from __future__ import annotations

from collections import deque


class Stream:
    """A stream that is open, or half-closed by the peer."""

    __slots__ = ("consumed_bytes", "ended", "receive_window", "send_window", "stream_id", "trailers", "waiting")

    def __init__(self, stream_id: int, *, receive_window: int, send_window: int) -> None:
        self.stream_id = stream_id
        self.receive_window = receive_window
        self.consumed_bytes = 0
        """Of what came, this much has been used and is not yet given back to the peer's window."""
        self.ended = False
        """The peer has ended its half."""
        self.send_window = send_window
        """Bytes that the peer takes; below zero after it has made its windows smaller (6.9.2)."""
        self.waiting: deque[memoryview] = deque()
        self.trailers: bytes | None = None
        """Sent when nothing waits any more."""
