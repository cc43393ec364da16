"""The server on a real socket, called by grpcio and by clients that misbehave."""

from __future__ import annotations

import asyncio
import itertools
import queue
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import pytest
from h2.events import DataReceived, StreamEnded, TrailersReceived

from extproc.http2 import frames
from extproc.http2.call import Call
from extproc.http2.grpc import GrpcError, Status, framed
from tests.harness.process import eventually
from tests.unit.extproc.http2_serving import MESSAGE_MAX_BYTES, Served, call_stream, echo, serving

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def echoing() -> Iterator[Served]:
    with serving(echo) as served:
        yield served


def test_messages_come_back_in_their_order(echoing: Served) -> None:
    messages = [b"%d" % number * (number % 50) for number in range(500)]
    with echoing.channel() as channel:
        assert list(call_stream(channel, messages)) == messages


def test_a_dialogue_goes_message_by_message(echoing: Served) -> None:
    asked: queue.Queue[bytes | None] = queue.Queue()
    with echoing.channel() as channel:
        answers = call_stream(channel, iter(asked.get, None))
        for message in (b"one", b"two", b"three"):
            asked.put(message)
            assert next(answers) == message
        asked.put(None)
        assert list(answers) == []
        assert answers.code() is grpc.StatusCode.OK


def test_messages_of_8_mib_both_ways(echoing: Served) -> None:
    messages = [bytes([number]) * (8 * MIB) for number in range(4)]
    with echoing.channel() as channel:
        assert list(call_stream(channel, messages)) == messages


def test_200_calls_at_once_on_one_connection(echoing: Served) -> None:
    with echoing.channel() as channel, ThreadPoolExecutor(20) as pool:
        calls = [call_stream(channel, [b"%d" % n, b"x" * 100_000, b"%d" % -n]) for n in range(200)]
        answers = list(pool.map(list, calls))
    assert answers == [[b"%d" % n, b"x" * 100_000, b"%d" % -n] for n in range(200)]


def test_a_call_without_a_message_is_ok(echoing: Served) -> None:
    with echoing.channel() as channel:
        call = call_stream(channel, [])
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK


def test_an_unknown_method_is_unimplemented(echoing: Served) -> None:
    with echoing.channel() as channel:
        call = call_stream(channel, [b"x"], "/s/nothing")
        with pytest.raises(grpc.RpcError):
            list(call)
    assert call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert call.details() == "unknown method /s/nothing"


def test_a_message_that_is_too_long_exhausts_resources(echoing: Served) -> None:
    with echoing.channel() as channel:
        assert list(call_stream(channel, [b"x" * MESSAGE_MAX_BYTES])) == [b"x" * MESSAGE_MAX_BYTES]
        call = call_stream(channel, [b"first", b"x" * (MESSAGE_MAX_BYTES + 1)])
        assert next(call) == b"first"
        with pytest.raises(grpc.RpcError):
            next(call)
    assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_compressed_message_is_unimplemented(echoing: Served) -> None:
    with echoing.channel() as channel:
        call = call_stream(channel, [b"x" * 1_000], compression=grpc.Compression.Gzip)
        with pytest.raises(grpc.RpcError):
            list(call)
    assert call.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_that_is_cut_off_is_an_internal_error(echoing: Served) -> None:
    with echoing.raw() as client:
        stream_id = client.open()
        client.h2.send_data(stream_id, framed(b"whole") + framed(b"cut")[:-1], end_stream=True)
        client.send()
        heard = client.hear(lambda heard: any(isinstance(event, StreamEnded) for event in heard))
    assert [event.data for event in heard if isinstance(event, DataReceived)] == [framed(b"whole")]
    [trailers] = [dict(event.headers) for event in heard if isinstance(event, TrailersReceived)]
    assert trailers[b"grpc-status"] == b"13"


def test_a_handlers_error_ends_its_call_by_that_status() -> None:
    async def refuse(call: Call) -> None:
        await call.write(await call.read() or b"")
        raise GrpcError(Status.INVALID_ARGUMENT, "grün is not a number: 100%")

    with serving(refuse) as served, served.channel() as channel:
        call = call_stream(channel, [b"first"])
        assert next(call) == b"first"
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert call.details() == "grün is not a number: 100%"


def test_a_bug_costs_its_call_and_is_logged() -> None:
    async def fail(call: Call) -> None:
        raise ValueError(await call.read())

    with serving(fail) as served, served.channel() as channel:
        call = call_stream(channel, [b"secret"])
        with pytest.raises(grpc.RpcError):
            list(call)
        assert (call.code(), call.details()) == (grpc.StatusCode.INTERNAL, "internal error")
        assert list(call_stream(channel, [b"still here"], "/s/echo")) == [b"still here"]
        assert [event["event"] for event in served.events] == ["call_failed"]


def test_a_handler_sees_the_metadata_of_its_call() -> None:
    async def tell(call: Call) -> None:
        await call.write(call.fields[b"traceparent"])

    with serving(tell) as served, served.channel() as channel:
        assert list(call_stream(channel, [], metadata=[("traceparent", "00-1-2-03")])) == [b"00-1-2-03"]


# --- Clients that leave.


class Watched:
    """A handler that reads a message, works until it is let go, and reads again; it keeps what became of it."""

    def __init__(self) -> None:
        self.working = threading.Event()
        self.ends: list[str] = []

    async def work(self, call: Call) -> None:
        await call.read()
        self.working.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise

    async def wait(self, call: Call) -> None:
        await call.read()
        self.working.set()
        self.ends.append("ended" if await call.read() is None else "went on")


@pytest.mark.parametrize("leaves", ["by RST_STREAM", "by closing the connection"])
@pytest.mark.parametrize(("what", "end"), [("work", "cancelled"), ("wait", "ended")])
def test_a_client_that_leaves_ends_its_handler(what: str, end: str, leaves: str) -> None:
    watched = Watched()
    with serving(getattr(watched, what)) as served:
        with served.raw() as client:
            stream_id = client.open()
            client.h2.send_data(stream_id, framed(b"x"))
            client.send()
            assert watched.working.wait(10)
            if leaves == "by RST_STREAM":
                client.h2.reset_stream(stream_id)
                client.send()
                eventually(lambda: watched.ends, "the handler has ended")
        eventually(lambda: watched.ends, "the handler has ended")
        eventually(lambda: not served.server.peers, "the connection is forgotten")
        assert watched.ends == [end]
        assert not served.events


def test_a_handler_that_cannot_write_on_is_cancelled_when_its_client_leaves() -> None:
    ends: queue.Queue[str] = queue.Queue()

    async def pour(call: Call) -> None:
        try:
            for _ in itertools.count():
                await call.write(b"x" * MIB)
        except asyncio.CancelledError:
            ends.put("cancelled")
            raise

    with serving(pour) as served:
        with served.channel() as channel:
            call = call_stream(channel, [b"go"])
            assert len(next(call)) == MIB
            call.cancel()
        assert ends.get(timeout=10) == "cancelled"


def test_connections_that_say_nothing_are_forgotten_when_they_close(echoing: Served) -> None:
    eventually(lambda: not echoing.server.peers, "nobody is connected")
    with echoing.raw(), echoing.raw():
        eventually(lambda: len(echoing.server.peers) == 2, "both are connected")
    eventually(lambda: not echoing.server.peers, "both are forgotten")


# --- Clients that misbehave.


def test_a_client_that_breaks_the_protocol_disturbs_nobody_else(echoing: Served) -> None:
    with echoing.channel() as channel, echoing.raw() as broken:
        assert list(call_stream(channel, [b"before"])) == [b"before"]
        broken.socket.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        heard = b""
        while part := broken.socket.recv(65_536):
            heard += part
        assert frames.goaway(0, frames.ErrorCode.PROTOCOL_ERROR, "the connection preface is missing") in heard
        assert list(call_stream(channel, [b"after"])) == [b"after"]


def test_a_client_that_asks_and_does_not_read_is_cut_off() -> None:
    pings = frames.ping(b"12345678", ack=False) * 10_000
    with serving(echo) as served, served.raw() as client:
        client.send()
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(200):  # 34 MB
                client.socket.sendall(pings)
        eventually(lambda: not served.server.peers, "the connection is forgotten")
        assert [event["event"] for event in served.events] == ["http2_peer_does_not_read"]


def test_answers_wait_for_a_client_that_does_not_read() -> None:
    """Its windows would allow everything; without a pause all of it would be in this process's memory."""
    written: list[int] = []

    async def pour(call: Call) -> None:
        for number in range(64):
            await call.write(bytes([number]) * MIB)
            written.append(number)

    with serving(pour) as served, served.raw() as client, served.channel() as channel:
        client.h2.update_settings({frames.Setting.INITIAL_WINDOW_SIZE: 2**30})
        client.h2.increment_flow_control_window(2**30)
        stream_id = client.open()
        client.h2.end_stream(stream_id)
        client.send()
        eventually(lambda: written, "an answer is written")
        assert list(call_stream(channel, [b"x"] * 100, "/s/echo")) == [b"x"] * 100
        assert len(written) < 8
        heard = client.hear(lambda heard: any(isinstance(event, StreamEnded) for event in heard))
    body = b"".join(event.data for event in heard if isinstance(event, DataReceived))
    assert body == b"".join(framed(bytes([number]) * MIB) for number in range(64))


def test_a_client_that_sends_ahead_is_held_until_its_messages_are_read() -> None:
    reading, sent = threading.Event(), itertools.count()
    ahead = 60

    async def read_late(call: Call) -> None:
        await asyncio.to_thread(reading.wait)
        received = 0
        while (message := await call.read()) is not None:
            received += len(message)
        await call.write(b"%d" % received)

    def messages() -> Iterator[bytes]:
        for _ in range(ahead):
            next(sent)
            yield b"x" * MIB

    with serving(read_late) as served, served.channel() as channel:
        call = call_stream(channel, messages())
        with served.channel() as other:
            assert list(call_stream(other, [b"x"] * 100, "/s/echo")) == [b"x"] * 100
        reading.set()
        assert list(call) == [b"%d" % (ahead * MIB)]


# --- The socket, and leaving.


def test_the_socket_is_for_owner_and_group_alone(echoing: Served) -> None:
    assert stat.S_IMODE(echoing.path.stat().st_mode) == 0o660


def test_a_socket_that_was_left_behind_is_replaced() -> None:
    with serving(echo) as served:
        served.run(served.server.listen(served.path))
        with served.channel() as channel:
            assert list(call_stream(channel, [b"x"])) == [b"x"]


def test_a_drain_lets_open_calls_end_and_takes_no_new_ones() -> None:
    asked: queue.Queue[bytes | None] = queue.Queue()
    with serving(echo) as served, served.channel() as channel, ThreadPoolExecutor(1) as pool:
        open_call = call_stream(channel, iter(asked.get, None))
        asked.put(b"before")
        assert next(open_call) == b"before"
        draining = pool.submit(lambda: served.run(served.server.drain(grace_s=15)))
        eventually(lambda: not _connects(served), "nobody can connect")
        asked.put(b"meanwhile")
        assert next(open_call) == b"meanwhile"
        assert not draining.done()
        asked.put(None)
        assert list(open_call) == []
        assert open_call.code() is grpc.StatusCode.OK
        draining.result(10)
        assert not served.path.exists()
        assert not served.server.peers


def _connects(served: Served) -> bool:
    try:
        with served.raw():
            return True
    except OSError:
        return False


def test_a_drain_cuts_what_does_not_end_in_time() -> None:
    watched = Watched()
    with serving(watched.work) as served, served.channel() as channel:
        call = call_stream(channel, [b"x"])
        assert watched.working.wait(10)
        served.run(served.server.drain(grace_s=0.05))
        assert watched.ends == ["cancelled"]
        with pytest.raises(grpc.RpcError):
            next(call)


def test_a_drain_of_idle_connections_waits_for_none() -> None:
    with serving(echo) as served, served.channel() as channel:
        assert list(call_stream(channel, [b"x"])) == [b"x"]
        assert served.server.peers
        served.run(served.server.drain(grace_s=3600))  # run() itself waits for seconds alone
        assert not served.server.peers


def test_calls_that_cross_a_drain_are_served() -> None:
    """A call that has reached its handler is answered, whatever the moment of the drain; the others fail clearly."""
    begun = itertools.count()

    async def count(call: Call) -> None:
        next(begun)
        await echo(call)

    with serving(count) as served, served.channel() as channel, ThreadPoolExecutor(8) as pool:

        def call(number: int) -> object:
            outcome = channel.stream_stream("/s/m")(iter([b"%d" % number]), timeout=20)
            try:
                return list(outcome)
            except grpc.RpcError:
                return outcome.code()

        assert call(0) == [b"0"]
        calls = [pool.submit(call, number) for number in range(1, 400)]
        served.run(served.server.drain(grace_s=10))
        outcomes = [each.result(20) for each in calls]
    answered = [number for number, outcome in enumerate(outcomes, 1) if outcome == [b"%d" % number]]
    assert set(map(str, outcomes)) - {str([b"%d" % number]) for number in answered} <= {
        str(grpc.StatusCode.UNAVAILABLE)
    }
    assert next(begun) == len(answered) + 1
