"""One connection to Redis or Valkey that is kept up: calls are pipelined, none waits longer than its deadline.

It is the circuit breaker too: while there is no connection, or the server is slower than the deadline, every call
fails at once. A new connection counts only when the server has answered on it in time. ADR 0007 says why this is not
redis-py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import hiredis
from redis.asyncio.connection import parse_url

from gateway.errors import StoreUnavailable
from gateway.redis_url import redis_url
from gateway.telemetry import Logger
from limits.resp import pack
from limits.wire import Asked, Reply, Wire, fail

BACKOFF_FIRST_S: Final = 0.02
BACKOFF_MAX_S: Final = 1.0
CONNECT_TIMEOUT_S: Final = 2.0
PING_S: Final = 1.0
HOPS_MAX: Final = 5
CANNOT_SERVE: Final = ("READONLY", "LOADING", "MASTERDOWN", "NOAUTH")
"""Errors under which a new connection may do better. The server has then done nothing of what it was asked."""
_CLOSED: Final = "closed"

Call = Callable[..., Awaitable[Reply]]


class CommandRefused(StoreUnavailable):
    """The server answered a command with an error; the text is the server's."""


def _not_followed(error: str, asked: Asked) -> None:
    fail(asked.future, error)


class Connection:
    """Calls go out as they are made; :meth:`run` keeps the connection up until it is cancelled."""

    def __init__(
        self,
        address: str,
        *,
        prepare: Callable[[Call], Awaitable[None]],
        deadline_s: float,
        log: Logger,
        on_change: Callable[[bool], None] = lambda _: None,
        on_moved: Callable[[str, Asked], None] = _not_followed,
    ) -> None:
        """``prepare`` is run on every new connection, before others may use it.

        ``on_change`` is told up or down, ``on_moved`` takes over what another node of a cluster is to answer.

        Raises:
            ValueError: the address has no known form.
        """
        self._options: Mapping[str, Any] = {**parse_url(redis_url(address))}
        self._prepare = prepare
        self._deadline_s = deadline_s
        self._log = log
        self._on_change = on_change
        self._on_moved = on_moved
        self._wire: Wire | None = None
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._tried = asyncio.Event()
        self._why = "not connected yet"

    @property
    def is_up(self) -> bool:
        """Whether calls can be made."""
        return self._up.is_set()

    @property
    def was_tried(self) -> bool:
        """Whether the first attempt to connect has ended, well or not."""
        return self._tried.is_set()

    def call(self, command: bytes) -> asyncio.Future[Reply]:
        """Send a packed command.

        Raises:
            StoreUnavailable: at once while the connection is down; from the future where it goes down meanwhile.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._serving().send(command, future, now_s=loop.time())
        return future

    def take_over(self, asked: Asked) -> None:
        """Answer what another node was asked."""
        if asked.hops >= HOPS_MAX:
            fail(asked.future, "the nodes of the cluster do not agree who is to answer")
            return
        try:
            now_s = asyncio.get_running_loop().time()
            self._serving().send(asked.command, asked.future, now_s=now_s, hops=asked.hops + 1)
        except StoreUnavailable as error:
            fail(asked.future, str(error))

    def _serving(self) -> Wire:
        if self._wire is None or not self._up.is_set():
            raise StoreUnavailable(self._why)
        return self._wire

    async def wait_up(self, timeout_s: float) -> bool:
        """Whether the connection is up within so long."""
        if not self._up.is_set():
            # Not wait_for, here and below: in Python 3.11 it may take a cancellation for an answer.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._up.wait()
        return self._up.is_set()

    async def wait_tried(self, timeout_s: float) -> None:
        """Wait for the first attempt to connect, but no longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._tried.wait()

    def drop(self, why: str) -> None:
        """Give this connection up and make a new one: the server said that it cannot serve."""
        if self._wire is not None:
            self._wire.end(why)

    async def run(self) -> None:
        """Connect, watch over the deadline, connect again; until cancelled."""
        backoff_s = BACKOFF_FIRST_S
        try:
            while True:
                is_up = await self._connect()
                self._tried.set()
                if is_up:
                    backoff_s = BACKOFF_FIRST_S
                    await self._watch()
                else:
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
        finally:
            self.drop(_CLOSED)
            self._why = _CLOSED

    async def _connect(self) -> bool:
        """Whether there is a connection on which the server answers in time."""
        self._down.clear()
        wire = Wire(lost=self._lost, moved=self._on_moved)
        self._wire = wire
        loop = asyncio.get_running_loop()

        async def call(*arguments: bytes) -> Reply:
            future = loop.create_future()
            wire.send(pack(*arguments), future, now_s=loop.time())
            reply = await future
            if isinstance(reply, hiredis.ReplyError):
                raise CommandRefused(str(reply))
            return reply

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._open(wire)
            async with asyncio.timeout(self._deadline_s):
                await self._log_in(call)
                await self._prepare(call)
        except (OSError, StoreUnavailable, TimeoutError) as error:
            wire.end(str(error) or f"no answer within {self._deadline_s:g} s")
            return False
        if self._down.is_set():
            return False
        self._up.set()
        self._on_change(True)
        self._log.info("limit_store_up")
        return True

    async def _open(self, wire: Wire) -> None:
        loop, options = asyncio.get_running_loop(), self._options
        if "path" in options:
            await loop.create_unix_connection(lambda: wire, options["path"])
            return
        host = options.get("host", "localhost")
        context = _tls(options) if "connection_class" in options else None
        await loop.create_connection(
            lambda: wire, host, options.get("port", 6379), ssl=context, server_hostname=host if context else None
        )

    async def _log_in(self, call: Call) -> None:
        password, user = self._options.get("password"), self._options.get("username")
        if password is not None:
            await call(b"AUTH", *([user.encode()] if user else []), password.encode())
        if self._options.get("db"):
            await call(b"SELECT", str(self._options["db"]).encode())
        try:
            role = await call(b"ROLE")
        except CommandRefused:
            return  # a proxy, or a user who may not ask
        if role[0] != b"master":
            raise StoreUnavailable(f"the server is a {role[0].decode()}, which takes no writes")

    async def _watch(self) -> None:
        """Until the connection is lost, or a call has waited longer than its deadline."""
        loop, tick_s = asyncio.get_running_loop(), self._deadline_s / 5
        busy_s = loop.time()
        while not self._down.is_set():
            looked_s = loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(tick_s):
                    await self._down.wait()
            wire = self._wire
            if wire is None:
                return
            if wire.pending:
                busy_s = loop.time()
                # A loop that was held up may not even have sent what waits: the next look tells.
                if busy_s - looked_s < 2 * tick_s and self._is_late(wire):
                    await asyncio.sleep(0.001)  # this loop may have been held up, and the answer be there
                    if self._is_late(wire):
                        self.drop(f"no answer within {self._deadline_s:g} s")
            elif loop.time() - busy_s > PING_S:
                self.call(pack(b"PING"))  # so that a server which hangs is known before somebody needs it

    def _is_late(self, wire: Wire) -> bool:
        waited_s = asyncio.get_running_loop().time() - wire.pending[0].sent_s if wire.pending else 0.0
        return waited_s > self._deadline_s

    def _lost(self, wire: Wire, why: str) -> None:
        if wire is not self._wire:
            return
        was_up = self._up.is_set()
        if why != self._why or (was_up and why != _CLOSED):
            self._log.error("limit_store_down", error=why)
        self._wire, self._why = None, why
        self._up.clear()
        self._down.set()
        if was_up:
            self._on_change(False)


def _tls(options: Mapping[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    if options.get("ssl_cert_reqs") in {"none", "optional"}:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
