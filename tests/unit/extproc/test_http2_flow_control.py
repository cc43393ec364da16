"""Windows in both directions (RFC 9113, 5.2): nobody is sent more than it takes, and everything arrives."""

from __future__ import annotations

from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st

from extproc.http2 import frames
from extproc.http2.connection import CONNECTION_WINDOW
from extproc.http2.events import Opened, Received
from extproc.http2.frames import Setting
from extproc.http2.grpc import RESPONSE_HEADERS, trailers
from extproc.http2.sender import TURN_BYTES
from tests.unit.extproc.http2_builders import FIELDS, Joined, a_connection, data, opening, sent_by

DEFAULT = 65_535


def _sizes(sent: list[frames.Frame], stream_id: int = 1) -> list[int]:
    return [len(each.payload) for each in sent if each.kind == frames.DATA and each.stream_id == stream_id]


# --- What is sent.


def test_an_answer_of_16_mib_arrives_whole_in_frames_that_the_client_takes() -> None:
    joined = Joined()
    stream_id, body = joined.open(ends=True), bytes(range(256)) * 65_536
    joined.answer(stream_id, body)
    assert joined.body(stream_id) == body
    assert joined.drained == [stream_id]


def test_what_does_not_fit_waits_for_the_stream_window_and_trailers_wait_behind_it() -> None:
    connection = a_connection(hello=frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 10}))
    connection.receive(opening(1, ends=True))
    assert not connection.send_data(1, b"0123456789abcdef")
    connection.send_trailers(1, trailers(None))
    [first] = sent_by(connection)
    assert first.payload == b"0123456789"
    connection.receive(frames.window_update(1, 4))
    [second] = sent_by(connection)
    assert second.payload == b"abcd"
    connection.receive(frames.window_update(1, 100))
    third, last = sent_by(connection)
    assert third.payload == b"ef"
    assert (last.kind, last.flags) == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM)


def test_the_connections_window_is_shared_and_who_waited_first_is_served_first() -> None:
    connection = a_connection(hello=frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 1_000_000}))
    connection.receive(opening(1) + opening(3))
    connection.send_data(1, b"x" * 70_000)
    assert sum(_sizes(sent_by(connection))) == DEFAULT
    assert not connection.send_data(3, b"y" * 1_000)
    connection.receive(frames.window_update(0, 4_000))
    sent = sent_by(connection)
    assert (_sizes(sent, 1), _sizes(sent, 3)) == ([4_000], [])
    connection.receive(frames.window_update(0, 1_000))
    sent = sent_by(connection)
    assert (_sizes(sent, 1), _sizes(sent, 3)) == ([465], [535])


def test_a_small_answer_goes_out_while_a_large_one_waits_for_its_own_window() -> None:
    connection = a_connection(hello=frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 100}))
    connection.receive(opening(1) + opening(3))
    assert not connection.send_data(1, b"x" * 101)
    assert connection.send_data(3, b"small")
    assert _sizes(sent_by(connection), 3) == [5]


def test_settings_change_the_windows_of_open_streams_below_zero_too() -> None:
    connection = a_connection()
    connection.receive(opening(1))
    assert connection.send_data(1, b"x" * 10_000)
    sent_by(connection)
    connection.receive(frames.settings({Setting.INITIAL_WINDOW_SIZE: 4_000}))  # 6,000 below zero
    assert not connection.send_data(1, b"y" * 5_000)
    connection.receive(frames.window_update(1, 6_000))
    assert _sizes(sent_by(connection)) == []
    connection.receive(frames.window_update(1, 1))
    assert _sizes(sent_by(connection)) == [1]
    connection.receive(frames.settings({Setting.INITIAL_WINDOW_SIZE: 9_000}))
    assert _sizes(sent_by(connection)) == [4_999]
    connection.receive(opening(3))
    assert connection.send_data(3, b"z" * 9_000)
    assert not connection.send_data(3, b"z")


def test_larger_frames_are_used_once_the_client_takes_them() -> None:
    connection = a_connection()
    connection.receive(opening(1))
    connection.send_data(1, b"x" * 20_000)
    assert _sizes(sent_by(connection)) == [16_384, 3_616]
    connection.receive(frames.settings({Setting.MAX_FRAME_SIZE: 20_000}))
    connection.send_data(1, b"x" * 20_000)
    assert _sizes(sent_by(connection)) == [20_000]


def test_frames_never_become_so_large_that_one_answer_holds_up_all_others() -> None:
    hello = frames.settings({Setting.MAX_FRAME_SIZE: 2**24 - 1, Setting.INITIAL_WINDOW_SIZE: 2**24})
    connection = a_connection(hello=frames.PREFACE + hello)
    connection.receive(opening(1) + frames.window_update(0, 2**24))
    connection.send_data(1, b"x" * 150_000)
    assert _sizes(sent_by(connection)) == [65_536, 65_536, 18_928]


def test_only_so_much_of_what_waits_is_handed_to_the_transport_at_a_time() -> None:
    connection = a_connection(hello=frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31 - 1}))
    connection.receive(opening(1) + frames.window_update(0, 2**30))
    connection.send_data(1, b"x" * (3 * TURN_BYTES))
    sizes = [len(connection.data_to_send()[0]) for _ in range(4)]
    assert TURN_BYTES <= sizes[0] < TURN_BYTES * 1.01
    assert sizes[3] == 0


def test_while_the_transport_pauses_bodies_wait_and_control_frames_do_not() -> None:
    connection = a_connection()
    connection.receive(opening(1))
    connection.pause(True)
    assert not connection.send_data(1, b"body")
    connection.receive(frames.ping(b"12345678", ack=False))
    [answered] = sent_by(connection)
    assert answered.kind == frames.PING
    connection.pause(False)
    data_to_send, drained = connection.data_to_send()
    assert data_to_send == data(1, b"body")
    assert drained == [1]


def test_what_waits_on_a_stream_that_is_reset_is_forgotten() -> None:
    connection = a_connection()
    connection.receive(opening(1) + opening(3))
    connection.send_data(1, b"x" * 100_000)
    assert sum(_sizes(sent_by(connection))) == DEFAULT
    connection.receive(frames.rst_stream(1, frames.ErrorCode.CANCEL) + frames.window_update(0, 100_000))
    connection.send_data(3, b"y" * 1_000)
    sent = sent_by(connection)
    assert (_sizes(sent, 1), _sizes(sent, 3)) == ([], [1_000])


@given(
    bodies=st.lists(st.integers(1, 200_000), min_size=1, max_size=5),
    windows=st.lists(st.integers(0, 100_000), max_size=5),
    frame_size=st.integers(16_384, 50_000),
)
def test_whatever_the_clients_windows_do_every_answer_arrives_whole(
    bodies: list[int], windows: list[int], frame_size: int
) -> None:
    """h2 raises when it is sent more than it takes."""
    joined = Joined()
    answers = {joined.open(ends=True): bytes([size % 251]) * size for size in bodies}
    joined.client.update_settings({SettingCodes.MAX_FRAME_SIZE: frame_size})
    joined.exchange()
    changes = iter(windows)
    for stream_id, body in answers.items():
        joined.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: next(changes, DEFAULT)})
        joined.answer(stream_id, body)
    for window in (*changes, DEFAULT):
        joined.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        joined.exchange()
    assert {stream_id: joined.body(stream_id) for stream_id in answers} == answers


# --- What is received.


def test_the_connections_window_opens_again_as_data_comes() -> None:
    """A stream that nobody reads from must not hold up the others."""
    connection = a_connection(stream_window=2 * CONNECTION_WINDOW)
    connection.receive(opening(1))
    frames_to_half = CONNECTION_WINDOW // 2 // frames.MAX_FRAME_BYTES
    connection.receive(data(1, b"x" * frames.MAX_FRAME_BYTES) * frames_to_half)
    assert sent_by(connection) == []
    connection.receive(data(1, b"x"))
    [update] = sent_by(connection)
    assert (update.kind, update.stream_id) == (frames.WINDOW_UPDATE, 0)
    assert int.from_bytes(update.payload, "big") == CONNECTION_WINDOW // 2 + 1


def test_more_than_the_connections_window_never_comes_in_one_go() -> None:
    joined = Joined(stream_window=2 * CONNECTION_WINDOW)
    stream_id, sent = joined.open(), 0
    while sent < 3 * CONNECTION_WINDOW // 2:  # h2 raises beyond what we allow
        size = min(joined.client.local_flow_control_window(stream_id), frames.MAX_FRAME_BYTES)
        joined.client.send_data(stream_id, b"x" * size)
        sent += size
        assert joined.exchange() == [Received(stream_id, b"x" * size)]


def test_a_streams_window_opens_again_when_half_of_it_is_consumed() -> None:
    connection = a_connection(stream_window=1_000)
    connection.receive(opening(1) + data(1, b"x" * 900))
    assert not connection.consumed(1, 499)
    assert sent_by(connection) == []
    assert connection.consumed(1, 1)
    [update] = sent_by(connection)
    assert (update.kind, update.stream_id, update.payload) == (frames.WINDOW_UPDATE, 1, (500).to_bytes(4, "big"))
    assert connection.receive(data(1, b"y" * 600)) == [Received(1, b"y" * 600)]


def test_a_stream_that_the_client_has_ended_needs_no_window() -> None:
    connection = a_connection(stream_window=1_000)
    connection.receive(opening(1) + data(1, b"x" * 900, ends=True))
    assert not connection.consumed(1, 900)
    assert sent_by(connection) == []


def test_padding_counts_as_consumed_at_once() -> None:
    connection = a_connection(stream_window=1_000)
    padded = frames.head(255, frames.DATA, frames.PADDED, 1) + bytes((254,)) + b"\0" * 254
    assert connection.receive(opening(1) + padded + padded) == [Opened(1, FIELDS)]
    [update] = sent_by(connection)
    assert update.payload == (510).to_bytes(4, "big")


def test_an_answer_begins_with_headers_whatever_its_size() -> None:
    connection = a_connection()
    connection.receive(opening(1))
    connection.send_headers(1, RESPONSE_HEADERS)
    connection.send_data(1, b"x" * 100_000)
    assert [sent.kind for sent in sent_by(connection)][:2] == [frames.HEADERS, frames.DATA]
