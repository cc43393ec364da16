"""The wire as a dialogue: commands go out, replies come back in their order, and it ends for everybody at once."""

from __future__ import annotations

import asyncio
from typing import Any

import hiredis
import pytest

from gateway.errors import StoreUnavailable
from limits.resp import pack
from limits.wire import PENDING_MAX, Asked, Wire


class Pipe(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True


class Dialogue:
    """A wire, what it wrote, and what it told."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.moved: list[tuple[str, Asked]] = []
        self.wire = Wire(
            lost=lambda _, why: self.lost.append(why), moved=lambda error, asked: self.moved.append((error, asked))
        )
        self.pipe = Pipe()
        self.wire.connection_made(self.pipe)

    def ask(self, command: bytes = b"PING", *, hops: int = 0) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self.wire.send(command, future, now_s=1.0, hops=hops)
        return future


async def test_replies_answer_the_commands_in_their_order() -> None:
    dialogue = Dialogue()
    futures = [dialogue.ask(b"a"), dialogue.ask(b"b"), dialogue.ask(b"c")]
    assert dialogue.pipe.written == [b"a", b"b", b"c"]
    dialogue.wire.data_received(b"+one\r\n:2\r\n*2\r\n$1\r\nx\r\n$-1\r\n")
    assert [await future for future in futures] == [b"one", 2, [b"x", None]]


@pytest.mark.parametrize("cut", range(1, 20))
async def test_reply_may_come_in_pieces(cut: int) -> None:
    dialogue = Dialogue()
    first, second = dialogue.ask(), dialogue.ask()
    answer = b"$5\r\nhello\r\n+done\r\n\r\n"[:18]
    dialogue.wire.data_received(answer[:cut])
    dialogue.wire.data_received(answer[cut:])
    assert [await first, await second] == [b"hello", b"done"]


async def test_answer_to_who_has_left_goes_to_nobody_else() -> None:
    dialogue = Dialogue()
    leaving, staying = dialogue.ask(), dialogue.ask()
    leaving.cancel()
    dialogue.wire.data_received(b":1\r\n:2\r\n")
    assert await staying == 2


async def test_error_of_the_server_is_a_value() -> None:
    dialogue = Dialogue()
    future = dialogue.ask()
    dialogue.wire.data_received(b"-NOSCRIPT no such script\r\n")
    reply = await future
    assert isinstance(reply, hiredis.ReplyError)
    assert str(reply) == "NOSCRIPT no such script"


async def test_what_another_node_is_to_answer_is_given_away() -> None:
    dialogue = Dialogue()
    future, other = dialogue.ask(b"a", hops=2), dialogue.ask(b"b")
    dialogue.wire.data_received(b"-MOVED 7 127.0.0.1:1\r\n+mine\r\n")
    ((error, asked),) = dialogue.moved
    assert (error, asked.command, asked.hops) == ("MOVED 7 127.0.0.1:1", b"a", 2)
    assert asked.future is future
    assert not future.done()
    assert await other == b"mine"


@pytest.mark.parametrize(
    "end",
    [
        lambda wire: wire.end("because"),
        lambda wire: wire.connection_lost(None),
        lambda wire: wire.connection_lost(OSError()),
        lambda wire: wire.data_received(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        lambda wire: wire.data_received(b"+1\r\n+2\r\n+unasked\r\n"),
    ],
    ids=["given up", "closed", "broken", "no RESP", "unasked"],
)
async def test_end_is_told_once_and_to_all_who_wait(end: Any) -> None:
    dialogue = Dialogue()
    futures = [dialogue.ask(), dialogue.ask()]
    end(dialogue.wire)
    dialogue.wire.connection_lost(None)
    for future in futures:
        assert future.done()
    assert len(dialogue.lost) == 1
    assert dialogue.pipe.aborted
    with pytest.raises(StoreUnavailable):
        dialogue.ask()


async def test_connection_that_is_made_after_the_end_is_not_kept() -> None:
    wire = Wire(lost=lambda *_: None, moved=lambda *_: None)
    wire.end("too late")
    pipe = Pipe()
    wire.connection_made(pipe)
    assert pipe.aborted


async def test_no_more_calls_wait_than_there_may() -> None:
    dialogue = Dialogue()
    for _ in range(PENDING_MAX):
        dialogue.ask()
    with pytest.raises(StoreUnavailable):
        dialogue.ask()
    dialogue.wire.data_received(b":1\r\n")
    dialogue.ask()


def test_command_is_packed_with_lengths_in_bytes() -> None:
    assert pack(b"SET", "ä".encode(), b"") == b"*3\r\n$3\r\nSET\r\n$2\r\n\xc3\xa4\r\n$0\r\n\r\n"
