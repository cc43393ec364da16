"""One HTTP/2 connection as its server sees it, without I/O (RFC 9113): bytes in, events out; calls in, bytes out.

Nothing the peer sends makes a method raise: what breaks the protocol for a stream resets it, what breaks it for the
connection ends it with GOAWAY (section 5.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from extproc.http2 import frames
from extproc.http2.events import Ended, Event, Failed, Opened, Received, Reset
from extproc.http2.frames import ConnectionFault, ErrorCode, Frame, FrameReader, Setting, StreamFault
from extproc.http2.headers import MAX_LIST_BYTES, Fields, HeaderDecoder
from extproc.http2.sender import Sender
from extproc.http2.stream import Stream

CONNECTION_WINDOW: Final = 16 * 1024 * 1024
"""What the peer may have under way in all streams together; open again as soon as it has come."""
MAX_STREAMS: Final = 10_000
_SETTINGS: Final = {Setting.MAX_CONCURRENT_STREAMS: MAX_STREAMS, Setting.MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES}
_DRAIN_PING: Final = b"draining"


class Connection:
    """The state of one connection."""

    def __init__(self, *, stream_window: int) -> None:
        """``stream_window``: what the peer may send on a stream before any of it is consumed."""
        self._reader = FrameReader()
        self._decoder = HeaderDecoder()
        self._sender = Sender()
        self._stream_window = stream_window
        self._window = CONNECTION_WINDOW
        self._streams: dict[int, Stream] = {}
        self._last_stream_id = 0
        self._leaves = False
        self._refuse_after: int | None = None
        """The last stream that is served, once we leave and the peer knows it."""
        self._block: tuple[Frame, bytearray] | None = None
        """HEADERS that CONTINUATION has to complete, and their block so far."""
        self._settled = False
        self._peer_leaves = False
        self._failed = False
        self._events: list[Event] = []
        self._takers: Mapping[int, Callable[[Frame], None]] = {
            frames.DATA: self._on_data,
            frames.HEADERS: self._on_headers,
            frames.RST_STREAM: self._on_rst_stream,
            frames.SETTINGS: self._on_settings,
            frames.PUSH_PROMISE: self._on_push_promise,
            frames.PING: self._on_ping,
            frames.GOAWAY: self._on_goaway,
            frames.WINDOW_UPDATE: self._on_window_update,
            frames.CONTINUATION: self._on_continuation,
        }
        self._sender.frame(frames.settings({**_SETTINGS, Setting.INITIAL_WINDOW_SIZE: stream_window}))
        self._sender.frame(frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

    @property
    def finished(self) -> bool:
        """Whether nothing can follow: the transport is to be closed when everything is sent."""
        leaving = self._peer_leaves or self._refuse_after is not None
        return self._failed or (leaving and not self._streams)

    def receive(self, data: bytes) -> list[Event]:
        """What the peer has done by ``data``."""
        events = self._events = []
        if self._failed:
            return events
        try:
            for frame in self._reader.feed(data):
                self._take(frame)
        except ConnectionFault as fault:
            self.fail(fault.code, str(fault))
            events.append(Failed(fault.code, str(fault)))
        return events

    def data_to_send(self) -> tuple[bytes, Sequence[int]]:
        """The next bytes for the transport, none when nothing can be sent, and streams on which nothing waits now."""
        if not self._sender.has_output():
            return b"", ()
        data, freed = self._sender.take()
        for stream in freed:
            if stream.trailers is not None:
                self._close(stream)
        return data, [stream.stream_id for stream in freed]

    def pause(self, paused: bool) -> None:
        """The transport holds enough; bodies wait until it says otherwise."""
        self._sender.may_send = not paused

    # --- What the server does. On a stream that is no more nothing happens: it may have been reset meanwhile.

    def send_headers(self, stream_id: int, block: bytes) -> None:
        """Begin the response."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._sender.headers(stream, block)

    def send_data(self, stream_id: int, data: bytes) -> bool:
        """Send data; False when some of it has to wait for the peer."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return True
        self._sender.data(stream, data)
        return not stream.waiting

    def send_trailers(self, stream_id: int, block: bytes) -> None:
        """End the response, behind the data that waits."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.trailers is not None:
            return
        self._sender.trailers(stream, block)
        if not stream.waiting:
            self._close(stream)

    def consumed(self, stream_id: int, size: int) -> bool:
        """So much of a stream's data is used: True when that opens its window again, of which half was closed (6.9)."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.ended:
            return False
        stream.consumed_bytes += size
        if stream.consumed_bytes * 2 < self._stream_window:
            return False
        self._sender.frame(frames.window_update(stream_id, stream.consumed_bytes))
        stream.receive_window += stream.consumed_bytes
        stream.consumed_bytes = 0
        return True

    def go_away(self) -> None:
        """Ask for no new streams; those under way already are still taken, until a PING has come back (6.8)."""
        if not self._failed and not self._leaves:
            self._leaves = True
            self._sender.frame(frames.goaway(frames.MAX_STREAM_ID, ErrorCode.NO_ERROR))
            self._sender.frame(frames.ping(_DRAIN_PING, ack=False))

    def fail(self, code: ErrorCode, what: str) -> None:
        """End the connection (5.4.1)."""
        last = self._last_stream_id if self._refuse_after is None else self._refuse_after
        self._sender.frame(frames.goaway(last, code, what))
        self._failed = True
        for stream_id in list(self._streams):
            self._forget(stream_id)

    # --- Frames.

    def _take(self, frame: Frame) -> None:
        if not self._settled and (frame.kind != frames.SETTINGS or frame.flags & frames.ACK):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None and frame.kind != frames.CONTINUATION:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted")
        taker = self._takers.get(frame.kind)
        if taker is None:
            return  # PRIORITY, which is deprecated (5.3.2), or an extension that nobody asked for (5.5)
        try:
            taker(frame)
        except StreamFault as fault:
            self._sender.frame(frames.rst_stream(frame.stream_id, fault.code))
            if self._forget(frame.stream_id):
                self._events.append(Reset(frame.stream_id, fault.code))

    def _on_data(self, frame: Frame) -> None:
        size, stream_id = len(frame.payload), frame.stream_id
        self._no_idle(stream_id, "DATA")
        self._window -= size
        if self._window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        if self._window * 2 < CONNECTION_WINDOW:
            self._sender.frame(frames.window_update(0, CONNECTION_WINDOW - self._window))
            self._window = CONNECTION_WINDOW
        stream = self._streams.get(stream_id)
        if stream is None:
            return  # sent before the peer knew that the stream is closed (5.1)
        if stream.ended:
            raise StreamFault(ErrorCode.STREAM_CLOSED, "DATA after END_STREAM")
        stream.receive_window -= size
        if stream.receive_window < 0:
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window")
        data = frame.payload
        if frame.flags & frames.PADDED:
            data = frames.unpadded(frame)
            self.consumed(stream_id, size - len(data))
        if data:
            self._events.append(Received(stream_id, data))
        if frame.flags & frames.END_STREAM:
            self._end(stream)

    def _on_headers(self, frame: Frame) -> None:
        if not frame.stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {frame.stream_id}")
        block = frames.unpadded(frame)
        if frame.flags & frames.END_HEADERS:
            self._on_block(frame, block)
        else:
            self._block = (frame, bytearray(block))

    def _on_continuation(self, frame: Frame) -> None:
        if self._block is None or self._block[0].stream_id != frame.stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        begun, block = self._block
        block += frame.payload
        if len(block) > MAX_LIST_BYTES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block that is too long")
        if frame.flags & frames.END_HEADERS:
            self._block = None
            self._on_block(begun, bytes(block))

    def _on_block(self, frame: Frame, block: bytes) -> None:
        fields, stream_id = self._decoder.decode(block), frame.stream_id
        ends = bool(frame.flags & frames.END_STREAM)
        stream = self._streams.get(stream_id)
        if stream is not None:
            if stream.ended:
                raise StreamFault(ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM")
            if not ends:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, "trailers without END_STREAM")
            self._end(stream)
        elif stream_id > self._last_stream_id:
            self._open(stream_id, fields, ends=ends)

    def _open(self, stream_id: int, fields: Fields, *, ends: bool) -> None:
        self._last_stream_id = stream_id
        if self._refuse_after is not None or len(self._streams) >= MAX_STREAMS:
            # Nothing has been done for it, so the peer may send it again elsewhere (8.7).
            raise StreamFault(ErrorCode.REFUSED_STREAM, "no more streams")
        stream = Stream(stream_id, receive_window=self._stream_window, send_window=self._sender.initial_window)
        self._streams[stream_id] = stream
        self._events.append(Opened(stream_id, fields))
        if ends:
            self._end(stream)

    def _on_rst_stream(self, frame: Frame) -> None:
        frames.sized(frame, 4)
        self._no_idle(frame.stream_id, "RST_STREAM")
        if self._forget(frame.stream_id):
            self._events.append(Reset(frame.stream_id, int.from_bytes(frame.payload, "big")))

    def _on_settings(self, frame: Frame) -> None:
        frames.of_connection(frame)
        self._settled = True
        if frame.flags & frames.ACK:
            frames.sized(frame, 0)
            return
        for name, value in frames.settings_in(frame):
            if name == Setting.INITIAL_WINDOW_SIZE:
                self._sender.resize_windows(self._streams.values(), value)
            elif name == Setting.MAX_FRAME_SIZE:
                self._sender.resize_frames(value)
        self._sender.frame(frames.SETTINGS_ACK)

    def _on_push_promise(self, frame: Frame) -> None:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client's PUSH_PROMISE")

    def _on_ping(self, frame: Frame) -> None:
        frames.of_connection(frame)
        frames.sized(frame, 8)
        if not frame.flags & frames.ACK:
            self._sender.frame(frames.ping(frame.payload, ack=True))
        elif self._leaves and frame.payload == _DRAIN_PING:
            self._refuse_after = self._last_stream_id
            self._sender.frame(frames.goaway(self._last_stream_id, ErrorCode.NO_ERROR))

    def _on_goaway(self, frame: Frame) -> None:
        frames.of_connection(frame)
        self._peer_leaves = True

    def _on_window_update(self, frame: Frame) -> None:
        frames.sized(frame, 4)
        increment = int.from_bytes(frame.payload, "big") & frames.MAX_WINDOW
        if frame.stream_id == 0:
            self._sender.grant(None, increment)
            return
        self._no_idle(frame.stream_id, "WINDOW_UPDATE")
        stream = self._streams.get(frame.stream_id)
        if stream is not None:
            self._sender.grant(stream, increment)

    # --- Streams.

    def _end(self, stream: Stream) -> None:
        stream.ended = True
        self._events.append(Ended(stream.stream_id))

    def _close(self, stream: Stream) -> None:
        """The response is complete: a peer that has not ended its half yet may spare the rest (8.1)."""
        if not stream.ended:
            self._sender.frame(frames.rst_stream(stream.stream_id, ErrorCode.NO_ERROR))
        self._forget(stream.stream_id)

    def _forget(self, stream_id: int) -> bool:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._sender.drop(stream)
        return stream is not None

    def _no_idle(self, stream_id: int, what: str) -> None:
        if stream_id > self._last_stream_id or not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {stream_id}, which is idle")
