"""Laws of the connection: how bytes are cut does not matter, and nothing makes it raise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from h2.config import H2Configuration
from h2.connection import H2Connection
from hypothesis import given
from hypothesis import strategies as st

from extproc.http2 import frames
from extproc.http2.connection import Connection
from extproc.http2.events import Ended, Event, Failed, Opened, Received, Reset
from extproc.http2.grpc import RESPONSE_HEADERS, trailers
from tests.unit.extproc.http2_builders import HELLO, REQUEST, block, data, frame, opening

_STREAM_WINDOW = 100_000


def _outcome(parts: Sequence[bytes]) -> tuple[list[Event], bytes]:
    """Events, with the data of a stream in one piece, and everything sent."""
    connection, events, sent = Connection(stream_window=_STREAM_WINDOW), [], b""
    for part in parts:
        events += connection.receive(part)
        while (more := connection.data_to_send()[0]) != b"":
            sent += more
    return events, sent


def _a_dialogue() -> bytes:
    """Requests with every frame that a client sends."""
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    for number in range(3):
        stream_id = client.get_next_available_stream_id()
        client.send_headers(stream_id, [*REQUEST, ("x-number", str(number))])
        client.ping(b"%08d" % number)
        client.send_data(stream_id, b"x" * 1_000, pad_length=number or None, end_stream=number == 1)
    client.reset_stream(stream_id)
    sent = client.data_to_send()
    pieces = block()
    parts = frame(frames.HEADERS, 0, 9, pieces[:5]) + frame(frames.CONTINUATION, frames.END_HEADERS, 9, pieces[5:])
    faults = data(9, b"", ends=True) + data(9, b"x") + frames.window_update(0, 0)
    return sent + parts + frame(0xEE, 0, 0, b"extension") + data(9, b"y" * 20) + faults


@given(cuts=st.lists(st.integers(0, 5_000), max_size=60))
def test_events_and_answers_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    whole = _a_dialogue()
    bounds = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    parts = [whole[start:end] for start, end in pairwise(bounds)]
    assert _outcome(parts) == _outcome([whole])


def test_byte_for_byte_too() -> None:
    whole = _a_dialogue()
    events, _ = _outcome([whole[at : at + 1] for at in range(len(whole))])
    assert events == _outcome([whole])[0]
    assert {type(event) for event in events} == {Opened, Received, Ended, Reset, Failed}


_ANY_FRAME = st.builds(
    frame,
    kind=st.integers(0, 11),
    flags=st.sampled_from([0, 1, 4, 5, 8, 0xD, 0x20, 0x2D, 0xFF]),
    stream_id=st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1]),
    payload=st.one_of(st.binary(max_size=40), st.just(block()), st.just(b"\0" * 4), st.just(b"\0" * 8)),
)
_OPENING = st.builds(opening, st.sampled_from([1, 3, 5, 7]), ends=st.booleans())
_DATA = st.builds(data, st.sampled_from([1, 3, 5, 7]), st.binary(max_size=30), ends=st.booleans())


@given(sent=st.lists(st.one_of(_ANY_FRAME, _OPENING, _DATA, st.binary(max_size=30)), max_size=20))
def test_nothing_that_comes_makes_it_raise(sent: list[bytes]) -> None:
    """The server answers whatever it is asked, at once, as if every client were sound."""
    connection = Connection(stream_window=_STREAM_WINDOW)
    connection.receive(HELLO)
    for part in sent:
        for event in connection.receive(part):
            if isinstance(event, Received):
                connection.consumed(event.stream_id, len(event.data))
            elif isinstance(event, Opened | Ended):
                connection.send_headers(event.stream_id, RESPONSE_HEADERS)
                connection.send_data(event.stream_id, b"x" * 40_000)
                if isinstance(event, Ended):
                    connection.send_trailers(event.stream_id, trailers(None))
            elif isinstance(event, Failed):
                assert connection.finished
        while connection.data_to_send()[0]:
            pass
