"""A gRPC server of ours on a loop in a thread, and clients of it: grpcio, and sockets that send what they like."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
import uvloop
from h2.config import H2Configuration
from h2.connection import H2Connection

from extproc.http2.call import Call, Handler
from extproc.http2.server import GrpcServer

T = TypeVar("T")

METHOD = "/s/m"
MESSAGE_MAX_BYTES = 9 * 1024 * 1024
WAIT_S = 20.0


class Served:
    """A running server. ``events`` is what it has logged."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="h2-", dir="/tmp"))
        self.path = self.directory / "s.sock"
        self.events: deque[Mapping[str, Any]] = deque(maxlen=1_000)
        self.server = GrpcServer(
            {path.encode(): handler for path, handler in handlers.items()},
            message_max_bytes=MESSAGE_MAX_BYTES,
            log=self._log(),
        )
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def _log(self) -> Any:
        def keep(_: Any, level: str, event: Mapping[str, Any]) -> Any:
            self.events.append({"level": level, **event})
            raise structlog.DropEvent

        return structlog.wrap_logger(None, processors=[keep], wrapper_class=structlog.stdlib.BoundLogger)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self.run(self.server.listen(self.path))

    def stop(self) -> None:
        """End everything."""
        self.run(self.server.drain(grace_s=0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()
        self.directory.rmdir()

    @contextlib.contextmanager
    def channel(self, **options: Any) -> Iterator[grpc.Channel]:
        """A grpcio client's connection."""
        settings = {
            "grpc.max_receive_message_length": -1,
            "grpc.max_send_message_length": -1,
            "grpc.use_local_subchannel_pool": 1,
            **options,
        }
        with grpc.insecure_channel(f"unix:{self.path}", options=list(settings.items())) as channel:
            yield channel

    @contextlib.contextmanager
    def raw(self) -> Iterator[RawClient]:
        """A client that does what it is told."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_S)
            connection.connect(str(self.path))
            yield RawClient(connection)


class RawClient:
    """``h2`` on a socket that is read and written only when the test says so."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.h2 = H2Connection(H2Configuration(client_side=True))
        self.h2.initiate_connection()

    def open(self, method: str = METHOD) -> int:
        """A new stream of a call."""
        stream_id = self.h2.get_next_available_stream_id()
        fields = ((":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x"))
        self.h2.send_headers(stream_id, fields)
        return stream_id

    def send(self) -> None:
        """Send what ``h2`` has."""
        self.socket.sendall(self.h2.data_to_send())

    def hear(self, condition: Callable[[list[Any]], object]) -> list[Any]:
        """Read events, answering settings and pings, until ``condition`` holds of all that have come."""
        heard: list[Any] = []
        while not condition(heard):
            data = self.socket.recv(1 << 20)
            assert data, f"the server closed; heard {heard}"
            heard += self.h2.receive_data(data)
            self.send()
        return heard


@contextlib.contextmanager
def serving(handler: Handler, *, paths: Mapping[str, Handler] | None = None) -> Iterator[Served]:
    """A server of ``handler`` at ``/s/m``, of ``echo`` at ``/s/echo``, and of more ``paths``."""
    served = Served({METHOD: handler, "/s/echo": echo, **(paths or {})})
    served.start()
    try:
        yield served
    finally:
        served.stop()


async def echo(call: Call) -> None:
    """Sends every message back."""
    while (message := await call.read()) is not None:
        await call.write(message)


def call_stream(channel: grpc.Channel, messages: Any, method: str = METHOD, **options: Any) -> Any:
    """A call with a stream in both directions, of raw bytes."""
    return channel.stream_stream(method)(iter(messages), timeout=WAIT_S, wait_for_ready=True, **options)
