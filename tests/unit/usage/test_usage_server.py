"""The access log's server on a real socket: streams, health, and what comes in while it stops."""

from __future__ import annotations

import asyncio
import shutil
import socket as socketlib
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway import names
from gateway.names import ACCESS_LOG_SERVICE
from tests.unit.usage.usage_builders import Told, message_of, until
from usage.access_log import Batch
from usage.server import AccessLogServer

METHOD = f"/{ACCESS_LOG_SERVICE}/StreamAccessLogs"


@pytest.fixture
def socket() -> Iterator[Path]:
    """In a directory whose path is short enough."""
    directory = Path(tempfile.mkdtemp(prefix="als-", dir="/tmp"))
    yield directory / "usage.sock"
    shutil.rmtree(directory)


def a_channel(socket: Path) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)])


def a_stream(channel: grpc.aio.Channel) -> Any:
    stream: Any = channel.stream_unary(METHOD)
    return stream()


def mode(socket: Path) -> str | None:
    """Who may connect; None where it is not there."""
    return stat.filemode(socket.stat().st_mode) if socket.exists() else None


class Received:
    """What a server was told."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch) -> None:
        self.batches.append(batch)

    @property
    def ids(self) -> list[str]:
        return [ended.request_id for batch in self.batches for ended in batch.finished]


def a_message(request_id: str = "r-1", **changes: Any) -> bytes:
    return message_of(Told(request_id=request_id, **changes))


async def test_every_message_of_every_stream_is_received_and_never_answered(socket: Path) -> None:
    received = Received()
    server = AccessLogServer(socket, received)
    await server.start()
    async with a_channel(socket) as channel:
        streams = [a_stream(channel) for _ in range(3)]
        for number in range(5):
            for stream in streams:
                await stream.write(a_message(f"r-{number}"))
        await until(lambda: len(received.ids) == 15)
        assert not any(stream.done() for stream in streams)
        for stream in streams:
            await stream.done_writing()
            assert await stream == b""
    await server.stop(1)
    assert sorted(received.ids) == sorted(f"r-{number}" for number in range(5) for _ in range(3))


async def test_first_message_of_a_stream_says_which_listener_it_is_about(socket: Path) -> None:
    received = Received()
    server = AccessLogServer(socket, received)
    await server.start()
    unnamed = a_message(listener="")
    async with a_channel(socket) as channel:
        for first in (a_message(listener=names.LISTENER_BACKENDS, cluster="bk_a"), a_message()):
            stream = a_stream(channel)
            await stream.write(first)
            await stream.write(unnamed)
            await stream.done_writing()
            await stream
    await server.stop(1)
    assert [(len(batch.attempts), len(batch.finished)) for batch in received.batches] == [(1, 0)] * 2 + [(0, 1)] * 2


async def test_message_that_is_none_is_told_and_the_stream_goes_on(socket: Path) -> None:
    received = Received()
    server = AccessLogServer(socket, received)
    await server.start()
    async with a_channel(socket) as channel:
        stream = a_stream(channel)
        await stream.write(b"\xff")
        await stream.write(a_message())
        await until(lambda: received.ids)
        stream.cancel()
    await server.stop(1)
    assert [len(batch.malformed) for batch in received.batches] == [1, 0]


async def test_large_entry_is_received(socket: Path) -> None:
    received = Received()
    server = AccessLogServer(socket, received)
    await server.start()
    async with a_channel(socket) as channel:
        stream = a_stream(channel)
        await stream.write(a_message(path="/" + 8 * 1024 * 1024 * "x"))
        await until(lambda: received.ids)
        stream.cancel()
    await server.stop(1)


async def test_health_says_whether_it_serves_and_open_streams_are_read_to_the_end(socket: Path) -> None:
    received = Received()
    server = AccessLogServer(socket, received)
    await server.start()
    async with a_channel(socket) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service=ACCESS_LOG_SERVICE))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        stream = a_stream(channel)
        await stream.write(a_message("before"))
        await until(lambda: received.ids)
        stopping = asyncio.create_task(server.stop(5))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await stream.write(a_message("after"))
        await stream.done_writing()
        assert await stream == b""
        watching.cancel()
        await stopping
    assert received.ids == ["before", "after"]
    assert mode(socket) is None


@pytest.fixture
def left_behind(socket: Path) -> None:
    """A socket that nobody listens on any more."""
    with socketlib.socket(socketlib.AF_UNIX) as killed:
        killed.bind(str(socket))


@pytest.mark.usefixtures("left_behind")
async def test_it_takes_the_place_of_one_that_was_killed(socket: Path) -> None:
    received = Received()
    server = AccessLogServer(socket, received)
    await server.start()
    assert mode(socket) == "srw-rw----"
    async with a_channel(socket) as channel:
        stream = a_stream(channel)
        await stream.write(a_message())
        await until(lambda: received.ids)
        stream.cancel()
    await server.stop(1)
