"""What goes to the peer: frames at once, bodies as its windows allow (RFC 9113, sections 5.2 and 6.9), without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from extproc.http2 import frames
from extproc.http2.frames import ConnectionFault, ErrorCode, StreamFault
from extproc.http2.headers import NO_TABLE
from extproc.http2.stream import Stream

_FRAME_BYTES: Final = 65_536
"""A frame of ours has no more, though the peer may take it: nothing else can be sent until it has ended."""
TURN_BYTES: Final = 1024 * 1024
"""Of bodies that wait, this much is handed out at a time."""


class Sender:
    """The sending half of one connection."""

    def __init__(self) -> None:
        self.may_send = True
        """False while the transport asks for a pause: bodies wait then, whatever their windows are."""
        self._frames: list[bytes | memoryview] = []
        self._window = frames.DEFAULT_WINDOW
        self.initial_window = frames.DEFAULT_WINDOW
        self._max_frame_bytes = frames.MAX_FRAME_BYTES
        self._held: dict[int, Stream] = {}
        self._first_block = NO_TABLE

    def frame(self, frame: bytes) -> None:
        """Send a frame that no window applies to."""
        self._frames.append(frame)

    def headers(self, stream: Stream, block: bytes, *, end_stream: bool = False) -> None:
        """Send a header block, which is shorter than any frame may be."""
        if self._first_block:
            block, self._first_block = self._first_block + block, b""
        self._frames.append(frames.headers(stream.stream_id, block, end_stream=end_stream))

    def data(self, stream: Stream, data: bytes) -> None:
        """Send data, now or when the windows allow it."""
        size = len(data)
        fits = size <= min(stream.send_window, self._window, self._max_frame_bytes)
        if fits and self.may_send and not stream.waiting:
            stream.send_window -= size
            self._window -= size
            self._frames += (frames.head(size, frames.DATA, 0, stream.stream_id), data)
        elif size:
            stream.waiting.append(memoryview(data))
            self._held[stream.stream_id] = stream

    def trailers(self, stream: Stream, block: bytes) -> None:
        """End the stream by trailers, behind what waits."""
        if stream.waiting:
            stream.trailers = block
        else:
            self.headers(stream, block, end_stream=True)

    def drop(self, stream: Stream) -> None:
        """Forget what waits on a stream that is no more."""
        self._held.pop(stream.stream_id, None)

    def grant(self, stream: Stream | None, increment: int) -> None:
        """The peer has opened a window: a stream's, or the connection's.

        Raises:
            StreamFault, ConnectionFault: by nothing, or wider than a window may be (6.9, 6.9.1).
        """
        fault = ConnectionFault if stream is None else StreamFault
        if increment == 0:
            raise fault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        window = (self._window if stream is None else stream.send_window) + increment
        if window > frames.MAX_WINDOW:
            raise fault(ErrorCode.FLOW_CONTROL_ERROR, "WINDOW_UPDATE beyond the largest window")
        if stream is None:
            self._window = window
        else:
            stream.send_window = window

    def resize_windows(self, streams: Iterable[Stream], size: int) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE: the windows of open streams change by the difference (6.9.2).

        Raises:
            ConnectionFault: a window becomes wider than it may be.
        """
        if size > frames.MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE beyond the largest")
        difference, self.initial_window = size - self.initial_window, size
        for stream in streams:
            stream.send_window += difference
            if stream.send_window > frames.MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS make a window too wide")

    def resize_frames(self, size: int) -> None:
        """SETTINGS_MAX_FRAME_SIZE (6.5.2).

        Raises:
            ConnectionFault: not a size that a frame may have.
        """
        if not frames.MAX_FRAME_BYTES <= size < 2**24:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"SETTINGS_MAX_FRAME_SIZE of {size}")
        self._max_frame_bytes = min(size, _FRAME_BYTES)

    def has_output(self) -> bool:
        """Whether there is anything to send, if the windows allow it."""
        return bool(self._frames or self._held)

    def take(self) -> tuple[bytes, Sequence[Stream]]:
        """The next bytes for the transport, and the streams on which nothing waits any more."""
        freed = self._hand_out() if self._held and self.may_send else ()
        data = b"".join(self._frames)
        self._frames.clear()
        return data, freed

    def _hand_out(self) -> list[Stream]:
        """Frames of what waits, first come, first served, as the windows and this turn allow."""
        freed, turn = [], TURN_BYTES
        for stream in list(self._held.values()):
            while stream.waiting and (size := min(stream.send_window, self._window, turn, self._max_frame_bytes)) > 0:
                turn -= self._send_waiting(stream, size)
            if not stream.waiting:
                del self._held[stream.stream_id]
                freed.append(stream)
                if stream.trailers is not None:
                    self.headers(stream, stream.trailers, end_stream=True)
        return freed

    def _send_waiting(self, stream: Stream, size: int) -> int:
        """One frame of at most ``size`` bytes: how many it has."""
        first = stream.waiting.popleft()
        if len(first) > size:
            stream.waiting.appendleft(first[size:])
            first = first[:size]
        stream.send_window -= len(first)
        self._window -= len(first)
        self._frames += (frames.head(len(first), frames.DATA, 0, stream.stream_id), first)
        return len(first)
