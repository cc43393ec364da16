"""The program behind :mod:`tests.harness.kafka`: librdkafka's mock cluster, and a TCP proxy before each broker.

The mock brokers speak the real protocol, listen on ports of their own choice and keep everything in memory. Clients are
told the proxies' ports, which stay the same across restarts. While the cluster is down the proxies cut everyone but
the reader, so that what was written can still be read. librdkafka: src/rdkafka_mock.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

READER: Final = "consumed"
"""The client id that is never cut."""
PRODUCE: Final = 0
"""API key of a Produce request."""
ALL_BROKERS: Final = -1
_FRAME: Final = struct.Struct(">ihhih")  # size, API key, version, correlation id, length of the client id
_BLOCK: Final = 256 * 1024


def _library() -> ctypes.CDLL:
    import confluent_kafka

    libraries = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
    library = ctypes.CDLL(str(next(libraries.glob("librdkafka-*.so*"))))
    pointer, text, small, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int16, ctypes.c_int32
    library.rd_kafka_new.restype = pointer
    library.rd_kafka_new.argtypes = [ctypes.c_int, pointer, text, ctypes.c_size_t]
    library.rd_kafka_mock_cluster_new.restype = pointer
    library.rd_kafka_mock_cluster_new.argtypes = [pointer, ctypes.c_int]
    library.rd_kafka_mock_cluster_bootstraps.restype = text
    library.rd_kafka_mock_cluster_bootstraps.argtypes = [pointer]
    library.rd_kafka_mock_broker_set_host_port.restype = None
    library.rd_kafka_mock_broker_set_host_port.argtypes = [pointer, number, text, ctypes.c_int]
    library.rd_kafka_mock_broker_set_rtt.argtypes = [pointer, number, ctypes.c_int]
    library.rd_kafka_mock_topic_create.argtypes = [pointer, text, ctypes.c_int, ctypes.c_int]
    library.rd_kafka_mock_topic_set_error.restype = None
    library.rd_kafka_mock_topic_set_error.argtypes = [pointer, text, ctypes.c_int]
    library.rd_kafka_mock_clear_request_errors.restype = None
    library.rd_kafka_mock_clear_request_errors.argtypes = [pointer, small]
    library.rd_kafka_mock_push_request_errors_array.restype = None
    library.rd_kafka_mock_push_request_errors_array.argtypes = [pointer, small, ctypes.c_size_t, pointer]
    return library


class Cluster:
    """Mock brokers, in librdkafka's own thread."""

    def __init__(self, *, ports: list[int], topics: Mapping[str, int]) -> None:
        """``ports`` are what clients are told; ``topics`` have so many partitions."""
        self._library = _library()
        problem = ctypes.create_string_buffer(512)
        client = self._library.rd_kafka_new(0, None, problem, len(problem))
        assert client, problem.value
        self._cluster = self._library.rd_kafka_mock_cluster_new(client, len(ports))
        bootstraps = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self.ports = [int(each.rpartition(":")[2]) for each in bootstraps.split(",")]
        for number, port in enumerate(ports, 1):
            self._library.rd_kafka_mock_broker_set_host_port(self._cluster, number, b"127.0.0.1", port)
        for topic, partitions in topics.items():
            self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, len(ports))

    def latency(self, *, ms: int) -> None:
        """Answer so much later."""
        self._library.rd_kafka_mock_broker_set_rtt(self._cluster, ALL_BROKERS, ms)

    def refuse(self, *, code: int, times: int) -> None:
        """Answer the next Produce requests with an error of the protocol; 0 times: none any more."""
        if not times:
            self._library.rd_kafka_mock_clear_request_errors(self._cluster, PRODUCE)
            return
        errors = (ctypes.c_int * times)(*[code] * times)
        self._library.rd_kafka_mock_push_request_errors_array(self._cluster, PRODUCE, times, errors)

    def topic_error(self, *, topic: str, code: int) -> None:
        """What Metadata requests are told of a topic; 0: that it is well."""
        self._library.rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), code)


class Proxy:
    """A fixed port before one broker."""

    def __init__(self, port: int, behind: int) -> None:
        self._port = port
        self._behind = behind
        self._is_down = False
        self._others: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    def down(self) -> None:
        """Cut everyone but the reader, until :meth:`up`."""
        self._is_down = True
        for writer in self._others:
            writer.transport.abort()

    def up(self) -> None:
        """Let everyone in."""
        self._is_down = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            first = await reader.readexactly(_FRAME.size)
            client = await reader.readexactly(max(_FRAME.unpack(first)[-1], 0))
            if client.decode() != READER:
                if self._is_down:
                    writer.transport.abort()
                    return
                self._others.add(writer)
            answers, behind = await asyncio.open_connection("127.0.0.1", self._behind)
            behind.write(first + client)
            pumps = [asyncio.ensure_future(_pump(reader, behind)), asyncio.ensure_future(_pump(answers, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        self._others.discard(writer)
        for each in (writer, behind):
            if each is not None:
                each.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_BLOCK):
            writer.write(data)
            await writer.drain()


async def run(control: str, ports: list[int], topics: Mapping[str, int]) -> None:
    """Serve until killed or left alone; commands are JSON lines ``{"do": …, …}`` on the socket ``control``."""
    cluster = Cluster(ports=ports, topics=topics)
    proxies = [Proxy(port, behind) for port, behind in zip(ports, cluster.ports, strict=True)]

    def obey(do: str, **arguments: Any) -> None:
        if do in {"down", "up"}:
            for proxy in proxies:
                getattr(proxy, do)()
        else:
            getattr(cluster, do)(**arguments)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            obey(**json.loads(line))
            writer.write(b"done\n")
        writer.close()

    for proxy in proxies:
        await proxy.start()
    await asyncio.start_unix_server(serve, control)
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - nobody tells that a parent is gone
        await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(run(**json.loads(sys.argv[1])))
