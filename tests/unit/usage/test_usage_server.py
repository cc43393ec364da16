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

from gateway.names import ACCESS_LOG_SERVICE
from tests.unit.usage.usage_builders import until
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


async def test_every_message_of_every_stream_is_received_and_never_answered(socket: Path) -> None:
    received: list[bytes] = []
    server = AccessLogServer(socket, received.append)
    await server.start()
    async with a_channel(socket) as channel:
        streams = [a_stream(channel) for _ in range(3)]
        for number in range(5):
            for stream in streams:
                await stream.write(b"%d" % number)
        await until(lambda: len(received) == 15)
        assert not any(stream.done() for stream in streams)
        for stream in streams:
            await stream.done_writing()
            assert await stream == b""
    await server.stop(1)
    assert sorted(received) == sorted(b"%d" % number for number in range(5) for _ in range(3))


async def test_large_entry_is_received(socket: Path) -> None:
    received: list[bytes] = []
    server = AccessLogServer(socket, received.append)
    await server.start()
    async with a_channel(socket) as channel:
        stream = a_stream(channel)
        await stream.write(bytes(8 * 1024 * 1024))
        await until(lambda: received)
        stream.cancel()
    await server.stop(1)
    assert len(received[0]) == 8 * 1024 * 1024


async def test_health_says_whether_it_serves_and_open_streams_are_read_to_the_end(socket: Path) -> None:
    received: list[bytes] = []
    server = AccessLogServer(socket, received.append)
    await server.start()
    async with a_channel(socket) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service=ACCESS_LOG_SERVICE))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        stream = a_stream(channel)
        await stream.write(b"before")
        await until(lambda: received)
        stopping = asyncio.create_task(server.stop(5))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await stream.write(b"after")
        await stream.done_writing()
        assert await stream == b""
        watching.cancel()
        await stopping
    assert received == [b"before", b"after"]
    assert mode(socket) is None


@pytest.fixture
def left_behind(socket: Path) -> None:
    """A socket that nobody listens on any more."""
    with socketlib.socket(socketlib.AF_UNIX) as killed:
        killed.bind(str(socket))


@pytest.mark.usefixtures("left_behind")
async def test_it_takes_the_place_of_one_that_was_killed(socket: Path) -> None:
    received: list[bytes] = []
    server = AccessLogServer(socket, received.append)
    await server.start()
    assert mode(socket) == "srw-rw----"
    async with a_channel(socket) as channel:
        stream = a_stream(channel)
        await stream.write(b"x")
        await until(lambda: received)
        stream.cancel()
    await server.stop(1)
