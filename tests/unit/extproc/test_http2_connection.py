"""The connection as dialogues with an h2 client, and with clients that no library would play."""

from __future__ import annotations

import pytest
from h2 import events as h2_events
from hpack import Encoder

from extproc.http2 import frames
from extproc.http2.connection import CONNECTION_WINDOW, MAX_STREAMS, Connection
from extproc.http2.events import Ended, Failed, Opened, Received, Reset
from extproc.http2.frames import ErrorCode, Setting
from extproc.http2.grpc import RESPONSE_HEADERS, GrpcError, Status, trailers, trailers_only
from extproc.http2.headers import MAX_LIST_BYTES
from tests.unit.extproc.http2_builders import (
    FIELDS,
    HELLO,
    REQUEST,
    STREAM_WINDOW,
    Joined,
    a_connection,
    block,
    data,
    frame,
    opening,
    sent_by,
)


def test_settings_are_exchanged_and_acknowledged_both_ways() -> None:
    joined = Joined()
    assert joined.settings[Setting.MAX_CONCURRENT_STREAMS] == MAX_STREAMS == 10_000
    assert joined.settings[Setting.INITIAL_WINDOW_SIZE] == STREAM_WINDOW
    assert joined.client.outbound_flow_control_window == CONNECTION_WINDOW
    assert len(joined.of(h2_events.SettingsAcknowledged)) == 1
    assert joined.client.remote_settings.initial_window_size == STREAM_WINDOW


def test_a_request_and_its_response() -> None:
    joined = Joined()
    stream_id = joined.open()
    joined.client.send_data(stream_id, b"question", end_stream=True)
    assert joined.exchange() == [Received(stream_id, b"question"), Ended(stream_id)]
    joined.answer(stream_id, b"an", b"swer")
    [response], [ended] = joined.of(h2_events.ResponseReceived), joined.of(h2_events.StreamEnded)
    assert dict(response.headers) == {b":status": b"200", b"content-type": b"application/grpc"}
    assert joined.body(stream_id) == b"answer"
    [trailer] = joined.of(h2_events.TrailersReceived)
    assert dict(trailer.headers) == {b"grpc-status": b"0"}
    assert ended.stream_id == stream_id
    assert not joined.of(h2_events.StreamReset)


def test_a_response_of_trailers_alone_is_one_frame() -> None:
    connection = a_connection()
    connection.receive(opening(1, ends=True))
    connection.send_trailers(1, trailers_only(GrpcError(Status.UNIMPLEMENTED, "unknown method /a/b")))
    [only] = sent_by(connection)
    assert (only.kind, only.flags) == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM)


def test_a_response_that_is_complete_before_the_request_spares_the_client_the_rest() -> None:
    joined = Joined()
    stream_id = joined.open()
    joined.answer(stream_id, b"no need to go on")
    assert joined.of(h2_events.StreamEnded)
    [reset] = joined.of(h2_events.StreamReset)
    assert (reset.stream_id, reset.error_code) == (stream_id, ErrorCode.NO_ERROR)


def test_the_end_of_a_stream_right_after_half_close() -> None:
    """What Envoy does at the end of every exchange."""
    connection = a_connection()
    connection.receive(opening(1))
    assert connection.receive(data(1, b"", ends=True) + frames.rst_stream(1, ErrorCode.CANCEL)) == [
        Ended(1),
        Reset(1, ErrorCode.CANCEL),
    ]
    connection.send_headers(1, RESPONSE_HEADERS)
    connection.send_data(1, b"too late")
    connection.send_trailers(1, trailers(None))
    connection.consumed(1, 10)
    assert sent_by(connection) == []


def test_padding_and_priority_of_headers_and_padding_of_data_are_taken_off() -> None:
    connection = a_connection()
    flags = frames.END_HEADERS | frames.PADDED | frames.HAS_PRIORITY
    headers = frame(frames.HEADERS, flags, 1, b"\x03" + b"\x80\x00\x00\x00\x10" + block() + b"\0" * 3)
    padded = frame(frames.DATA, frames.PADDED | frames.END_STREAM, 1, b"\x04" + b"body" + b"\0" * 4)
    assert connection.receive(headers + padded) == [Opened(1, FIELDS), Received(1, b"body"), Ended(1)]


def test_headers_in_continuations() -> None:
    connection, whole = a_connection(), block()
    first = frame(frames.HEADERS, frames.END_STREAM, 1, whole[:3])
    middle = frame(frames.CONTINUATION, 0, 1, whole[3:7])
    last = frame(frames.CONTINUATION, frames.END_HEADERS, 1, whole[7:])
    assert connection.receive(first + middle) == []
    assert connection.receive(last) == [Opened(1, FIELDS), Ended(1)]


def test_trailers_of_a_request_end_it() -> None:
    joined = Joined()
    stream_id = joined.open()
    joined.client.send_headers(stream_id, [("x-trailer", "1")], end_stream=True)
    assert joined.exchange() == [Ended(stream_id)]


def test_a_header_block_is_decoded_even_when_its_stream_is_over() -> None:
    """The last block refers to what the one before it has put into the table."""
    connection, encoder = a_connection(), Encoder()
    connection.receive(frames.headers(1, encoder.encode(REQUEST), end_stream=False))
    connection.send_trailers(1, trailers(None))
    assert connection.receive(frames.headers(1, encoder.encode([("x-new", "1")]), end_stream=True)) == []
    opened = frames.headers(3, encoder.encode([*REQUEST, ("x-new", "1")]), end_stream=False)
    assert connection.receive(opened) == [Opened(3, {**FIELDS, b"x-new": b"1"})]


def test_what_comes_late_for_a_stream_that_is_over_is_ignored() -> None:
    connection = a_connection()
    connection.receive(opening(1))
    connection.send_trailers(1, trailers(None))
    sent_by(connection)
    late = data(1, b"late") + frames.window_update(1, 5) + frames.rst_stream(1, ErrorCode.CANCEL)
    assert connection.receive(late) == []
    assert sent_by(connection) == []


def test_frames_that_mean_nothing_here_are_ignored() -> None:
    connection = a_connection()
    unknown = frame(0xFA, 0xFF, 7, b"whatever")
    priority = frame(frames.PRIORITY, 0, 1, b"\x00\x00\x00\x00\x10")
    setting = frame(frames.SETTINGS, 0, 0, b"\xfa\xfa\x00\x00\x00\x01")
    assert connection.receive(unknown + priority + setting + opening(1)) == [Opened(1, FIELDS)]


def test_a_ping_is_answered_with_its_own_bytes() -> None:
    joined = Joined()
    joined.client.ping(b"12345678")
    joined.exchange()
    [answered] = joined.of(h2_events.PingAckReceived)
    assert answered.ping_data == b"12345678"


def test_a_reset_is_told_once() -> None:
    connection = a_connection()
    connection.receive(opening(1))
    reset = frames.rst_stream(1, ErrorCode.CANCEL)
    assert connection.receive(reset) == [Reset(1, ErrorCode.CANCEL)]
    assert connection.receive(reset) == []


def test_a_stream_beyond_the_most_that_may_be_open_is_refused_and_the_others_go_on() -> None:
    connection = a_connection()
    for number in range(MAX_STREAMS):
        assert len(connection.receive(opening(2 * number + 1))) == 1
    beyond = 2 * MAX_STREAMS + 1
    assert connection.receive(opening(beyond) + data(beyond, b"for nobody")) == []
    [refused] = sent_by(connection)
    assert (refused.kind, refused.stream_id) == (frames.RST_STREAM, beyond)
    assert int.from_bytes(refused.payload, "big") == ErrorCode.REFUSED_STREAM
    assert connection.receive(frames.rst_stream(1, ErrorCode.CANCEL) + opening(beyond + 2)) == [
        Reset(1, ErrorCode.CANCEL),
        Opened(beyond + 2, FIELDS),
    ]


# --- Leaving.


def test_streams_under_way_are_served_after_goaway_and_no_others() -> None:
    connection = a_connection()
    connection.receive(opening(1))
    connection.go_away()
    first, ping = sent_by(connection)
    assert (first.kind, first.payload[:4]) == (frames.GOAWAY, b"\x7f\xff\xff\xff")
    assert connection.receive(opening(3)) == [Opened(3, FIELDS)]  # sent before the client knew
    connection.receive(frames.ping(ping.payload, ack=True))
    [last] = sent_by(connection)
    assert (last.kind, last.payload) == (frames.GOAWAY, b"\x00\x00\x00\x03" + b"\x00\x00\x00\x00")
    assert connection.receive(opening(5) + data(5, b"x")) == []
    [refused] = sent_by(connection)
    assert (refused.kind, refused.payload) == (frames.RST_STREAM, ErrorCode.REFUSED_STREAM.to_bytes(4, "big"))
    for stream_id in (1, 3):
        assert not connection.finished
        connection.send_trailers(stream_id, trailers(None))
    assert connection.finished


def test_a_connection_without_streams_is_finished_once_the_client_knows() -> None:
    connection = a_connection()
    connection.go_away()
    _, ping = sent_by(connection)
    assert not connection.finished
    connection.receive(frames.ping(b"somebody", ack=True))
    assert not connection.finished
    connection.receive(frames.ping(ping.payload, ack=True))
    assert connection.finished


def test_a_ping_that_nobody_sent_does_not_make_the_connection_leave() -> None:
    other = a_connection()
    other.go_away()
    _, ping = sent_by(other)
    connection = a_connection()
    assert connection.receive(frames.ping(ping.payload, ack=True) + opening(1)) == [Opened(1, FIELDS)]
    assert not connection.finished


def test_a_client_that_goes_away_is_served_to_the_end_of_its_streams() -> None:
    connection = a_connection()
    connection.receive(opening(1, ends=True) + frames.goaway(0, ErrorCode.NO_ERROR))
    assert not connection.finished
    connection.send_headers(1, RESPONSE_HEADERS)
    connection.send_trailers(1, trailers(None))
    assert connection.finished
    assert [sent.kind for sent in sent_by(connection)] == [frames.HEADERS, frames.HEADERS]


# --- Clients that break the protocol.

_BLOCK = block()
_OPEN = opening(1)
_PART = frame(frames.HEADERS, 0, 1, _BLOCK)
_WINDOW_MAX = 2**31 - 1
_WIDER = frames.settings({Setting.INITIAL_WINDOW_SIZE: 65_536})


@pytest.mark.parametrize(
    ("code", "sent"),
    [
        pytest.param("PROTOCOL_ERROR", data(0, b"x"), id="DATA on the connection"),
        pytest.param("PROTOCOL_ERROR", data(1, b"x"), id="DATA on an idle stream"),
        pytest.param("PROTOCOL_ERROR", data(2, b"x"), id="DATA on a stream of ours"),
        pytest.param("PROTOCOL_ERROR", opening(0), id="HEADERS on the connection"),
        pytest.param("PROTOCOL_ERROR", opening(2), id="HEADERS on an even stream"),
        pytest.param("PROTOCOL_ERROR", _PART + data(1, b"x"), id="a block interrupted by DATA"),
        pytest.param("PROTOCOL_ERROR", _PART + frame(0xFA, 0, 0, b""), id="a block interrupted by an extension"),
        pytest.param("PROTOCOL_ERROR", _PART + frame(frames.CONTINUATION, 4, 3, b""), id="CONTINUATION of another"),
        pytest.param("PROTOCOL_ERROR", frame(frames.CONTINUATION, 4, 1, _BLOCK), id="CONTINUATION of nothing"),
        pytest.param(
            "ENHANCE_YOUR_CALM",
            frame(frames.HEADERS, 0, 1, b"")
            + frame(frames.CONTINUATION, 0, 1, b"\x82" * frames.MAX_FRAME_BYTES) * (MAX_LIST_BYTES // 16_384 + 1),
            id="a block without end",
        ),
        pytest.param("COMPRESSION_ERROR", frames.headers(1, b"\xff\xff\xff", end_stream=False), id="no HPACK"),
        pytest.param("COMPRESSION_ERROR", frames.headers(1, b"\xfe", end_stream=False), id="no such entry"),
        pytest.param(
            "COMPRESSION_ERROR",
            frames.headers(1, b"\x82" + Encoder().encode([("x", "y" * 4000)]) + b"\xbe" * 17, end_stream=False),
            id="a small block of a long list",
        ),
        pytest.param("FRAME_SIZE_ERROR", frame(frames.HEADERS, 0x0C, 1, b""), id="padded without padding's length"),
        pytest.param("FRAME_SIZE_ERROR", frame(frames.HEADERS, 0x24, 1, b"\0\0"), id="HEADERS without its priority"),
        pytest.param("PROTOCOL_ERROR", _OPEN + frame(frames.DATA, 8, 1, b"\x05abcd"), id="more padding than DATA"),
        pytest.param("PROTOCOL_ERROR", frame(frames.HEADERS, 0x0C, 1, b"\x05abcd"), id="more padding than HEADERS"),
        pytest.param("FRAME_SIZE_ERROR", _OPEN + data(1, b"x" * 16_385), id="a frame that is too long"),
        pytest.param("PROTOCOL_ERROR", frames.rst_stream(1, ErrorCode.CANCEL), id="RST_STREAM of an idle stream"),
        pytest.param("PROTOCOL_ERROR", frames.rst_stream(0, ErrorCode.CANCEL), id="RST_STREAM of the connection"),
        pytest.param("FRAME_SIZE_ERROR", _OPEN + frame(frames.RST_STREAM, 0, 1, b"\0" * 5), id="RST_STREAM of 5 bytes"),
        pytest.param("PROTOCOL_ERROR", frame(frames.SETTINGS, 0, 1, b""), id="SETTINGS of a stream"),
        pytest.param("FRAME_SIZE_ERROR", frame(frames.SETTINGS, 0, 0, b"\0" * 5), id="SETTINGS of 5 bytes"),
        pytest.param("FRAME_SIZE_ERROR", frame(frames.SETTINGS, 1, 0, b"\0" * 6), id="a SETTINGS ACK with settings"),
        pytest.param("FLOW_CONTROL_ERROR", frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31}), id="window too wide"),
        pytest.param(
            "FLOW_CONTROL_ERROR",
            _OPEN + frames.window_update(1, _WINDOW_MAX - 65_535) + _WIDER,
            id="a stream's window made too wide by settings",
        ),
        pytest.param("PROTOCOL_ERROR", frames.settings({Setting.MAX_FRAME_SIZE: 16_383}), id="frames too small"),
        pytest.param("PROTOCOL_ERROR", frames.settings({Setting.MAX_FRAME_SIZE: 2**24}), id="frames too large"),
        pytest.param("PROTOCOL_ERROR", frame(frames.PUSH_PROMISE, 4, 1, b"\0\0\0\x02" + _BLOCK), id="PUSH_PROMISE"),
        pytest.param("FRAME_SIZE_ERROR", frame(frames.PING, 0, 0, b"\0" * 7), id="PING of 7 bytes"),
        pytest.param("PROTOCOL_ERROR", frame(frames.PING, 0, 1, b"\0" * 8), id="PING of a stream"),
        pytest.param("PROTOCOL_ERROR", frame(frames.GOAWAY, 0, 1, b"\0" * 8), id="GOAWAY of a stream"),
        pytest.param("FRAME_SIZE_ERROR", frame(frames.WINDOW_UPDATE, 0, 0, b"\0" * 3), id="WINDOW_UPDATE of 3 bytes"),
        pytest.param("PROTOCOL_ERROR", frames.window_update(0, 0), id="WINDOW_UPDATE by nothing"),
        pytest.param("PROTOCOL_ERROR", frames.window_update(1, 1), id="WINDOW_UPDATE of an idle stream"),
        pytest.param("FLOW_CONTROL_ERROR", frames.window_update(0, _WINDOW_MAX), id="a connection's window too wide"),
    ],
)  # fmt: skip
def test_a_broken_protocol_ends_the_connection_and_nothing_else(code: str, sent: bytes) -> None:
    connection = a_connection()
    failed = connection.receive(sent + frames.ping(b"too late", ack=False))[-1]
    assert isinstance(failed, Failed)
    assert failed.code is ErrorCode[code]
    farewell = sent_by(connection)[-1]
    assert (farewell.kind, farewell.payload[4:8]) == (frames.GOAWAY, failed.code.to_bytes(4, "big"))
    assert connection.finished
    assert connection.receive(opening(9)) == []
    assert sent_by(connection) == []


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", id="HTTP/1.1"),
        pytest.param(frames.PREFACE[:-1] + b"?" + frames.settings({}), id="almost"),
        pytest.param(frames.PREFACE + opening(1), id="HEADERS before SETTINGS"),
        pytest.param(frames.PREFACE + frames.SETTINGS_ACK, id="an ACK before SETTINGS"),
    ],
)
def test_a_client_that_does_not_say_hello_is_turned_away(sent: bytes) -> None:
    connection = Connection(stream_window=STREAM_WINDOW)
    [failed] = connection.receive(sent)
    assert isinstance(failed, Failed)
    assert failed.code is ErrorCode.PROTOCOL_ERROR
    assert connection.finished


def test_half_a_hello_is_waited_for() -> None:
    connection = Connection(stream_window=STREAM_WINDOW)
    assert connection.receive(HELLO[:10]) == []
    assert connection.receive(HELLO[10:] + opening(1)) == [Opened(1, FIELDS)]


@pytest.mark.parametrize(
    ("code", "sent"),
    [
        pytest.param("STREAM_CLOSED", data(1, b"", ends=True) + data(1, b"x"), id="DATA after END_STREAM"),
        pytest.param("STREAM_CLOSED", data(1, b"", ends=True) + opening(1, ends=True), id="HEADERS after END_STREAM"),
        pytest.param("PROTOCOL_ERROR", opening(1), id="trailers without END_STREAM"),
        pytest.param("PROTOCOL_ERROR", frames.window_update(1, 0), id="WINDOW_UPDATE by nothing"),
        pytest.param("FLOW_CONTROL_ERROR", frames.window_update(1, _WINDOW_MAX), id="a window too wide"),
        pytest.param("FLOW_CONTROL_ERROR", data(1, b"x" * 10_000) * 11, id="more data than the window"),
    ],
)
def test_a_broken_stream_is_reset_and_the_others_go_on(code: str, sent: bytes) -> None:
    connection = a_connection(stream_window=100_000)
    connection.receive(opening(1) + opening(3))
    assert connection.receive(sent)[-1] == Reset(1, ErrorCode[code])
    [reset] = sent_by(connection)
    assert (reset.kind, reset.stream_id) == (frames.RST_STREAM, 1)
    assert reset.payload == ErrorCode[code].to_bytes(4, "big")
    assert connection.receive(data(3, b"fine")) == [Received(3, b"fine")]
