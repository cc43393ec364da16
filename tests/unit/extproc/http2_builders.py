"""An ``h2`` client joined to our connection in memory, and frames that no client would send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, RemoteSettingsChanged
from hpack import Encoder

from extproc.http2 import events, frames
from extproc.http2.connection import Connection
from extproc.http2.grpc import RESPONSE_HEADERS, trailers

STREAM_WINDOW = 1_000_000
REQUEST = ((":method", "POST"), (":scheme", "http"), (":path", "/s/m"), (":authority", "ext_proc"))
FIELDS = {name.encode(): value.encode() for name, value in REQUEST}
HELLO = frames.PREFACE + frames.settings({})


def block(fields: Sequence[tuple[str, str]] = REQUEST) -> bytes:
    """A header block as the first of a connection."""
    return Encoder().encode(fields)


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Any frame, sound or not."""
    return frames.head(len(payload), kind, flags, stream_id) + payload


def opening(stream_id: int, *, ends: bool = False) -> bytes:
    """HEADERS of a new stream."""
    return frames.headers(stream_id, block(), end_stream=ends)


def data(stream_id: int, payload: bytes, *, ends: bool = False) -> bytes:
    """A DATA frame."""
    return frame(frames.DATA, frames.END_STREAM if ends else 0, stream_id, payload)


def sent_by(connection: Connection) -> list[frames.Frame]:
    """Every frame that a connection can send now."""
    found = []
    while (sent := connection.data_to_send()[0]) != b"":
        while sent:
            size = int.from_bytes(sent[:3], "big")
            stream_id = int.from_bytes(sent[5:9], "big")
            found.append(frames.Frame(sent[3], sent[4], stream_id, sent[9 : 9 + size]))
            sent = sent[9 + size :]
    return found


def a_connection(*, stream_window: int = STREAM_WINDOW, hello: bytes = HELLO) -> Connection:
    """A connection whose client has said hello, and which has said all there is to say to that."""
    connection = Connection(stream_window=stream_window)
    connection.receive(hello)
    sent_by(connection)
    return connection


class Joined:
    """An ``h2`` client and our connection. ``heard`` is what the client was told, ``drained`` what the server was."""

    def __init__(self, *, stream_window: int = STREAM_WINDOW, acknowledges: bool = True) -> None:
        """``acknowledges``: the client opens its windows again for all that comes."""
        self.client = H2Connection(H2Configuration(client_side=True))
        self.connection = Connection(stream_window=stream_window)
        self.heard: list[Event] = []
        self.drained: list[int] = []
        self.acknowledges = acknowledges
        self.client.initiate_connection()
        self.exchange()

    def exchange(self) -> list[events.Event]:
        """Carry bytes both ways until neither side has any: what the server sees."""
        seen: list[events.Event] = []
        while True:
            asked = self.client.data_to_send()
            seen += self.connection.receive(asked)
            answered, drained = self.connection.data_to_send()
            self.drained += drained
            self._hear(self.client.receive_data(answered) if answered else [])
            if not asked and not answered:
                return seen

    def _hear(self, told: list[Event]) -> None:
        self.heard += told
        for event in told:
            if self.acknowledges and isinstance(event, DataReceived) and event.flow_controlled_length:
                self.client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def open(self, *, ends: bool = False) -> int:
        """A new stream."""
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, REQUEST, end_stream=ends)
        self.exchange()
        return stream_id

    def answer(self, stream_id: int, *bodies: bytes) -> None:
        """A whole response."""
        self.connection.send_headers(stream_id, RESPONSE_HEADERS)
        for body in bodies:
            self.connection.send_data(stream_id, body)
        self.connection.send_trailers(stream_id, trailers(None))
        self.exchange()

    def body(self, stream_id: int) -> bytes:
        """What the client has received as the body of a response."""
        return b"".join(e.data for e in self.heard if isinstance(e, DataReceived) and e.stream_id == stream_id)

    def of(self, kind: type[Any]) -> list[Any]:
        """What the client heard of one kind."""
        return [event for event in self.heard if isinstance(event, kind)]

    @property
    def settings(self) -> dict[int, int]:
        """What the server has announced."""
        [changed] = self.of(RemoteSettingsChanged)
        return {int(name): setting.new_value for name, setting in changed.changed_settings.items()}
