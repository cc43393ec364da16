"""One TCP or unix connection to a server: replies come in the order of the commands."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

import hiredis

from gateway.errors import StoreUnavailable

PENDING_MAX: Final = 10_000

Reply = Any
"""What hiredis makes of RESP2: bytes, int, None, lists of these; a ReplyError is a value here, not raised."""


class Asked(NamedTuple):
    """A command on its way: what waits for the reply, and how often another node has been asked before."""

    command: bytes
    future: asyncio.Future[Reply]
    sent_s: float
    hops: int


class Wire(asyncio.Protocol):
    """See above. ``lost`` is told once, with the reason; ``moved`` takes over what another node is to answer."""

    def __init__(self, *, lost: Callable[[Wire, str], None], moved: Callable[[str, Asked], None]) -> None:
        self._lost = lost
        self._moved = moved
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._ended = False
        self.pending: deque[Asked] = deque()

    def send(self, command: bytes, future: asyncio.Future[Reply], *, now_s: float, hops: int = 0) -> None:
        """Ask for what ``future`` waits for.

        Raises:
            StoreUnavailable: too many calls wait already, or the connection has ended.
        """
        if self._transport is None or self._ended:
            raise StoreUnavailable("not connected")
        if len(self.pending) >= PENDING_MAX:
            raise StoreUnavailable(f"{PENDING_MAX} calls are waiting already")
        self.pending.append(Asked(command, future, now_s, hops))
        self._transport.write(command)  # uvloop sends what one turn of the loop has written together

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not say so itself
        if self._ended:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                if not self.pending:
                    self.end("answered what nobody had asked")
                    return
                asked = self.pending.popleft()
                if asked.future.done():
                    continue  # whoever asked has left
                if type(reply) is hiredis.ReplyError and str(reply).startswith("MOVED "):
                    self._moved(str(reply), asked)
                else:
                    asked.future.set_result(reply)
        except hiredis.ProtocolError:
            self.end("answered what is no RESP")

    def connection_lost(self, exc: Exception | None) -> None:
        self.end("the connection was lost")

    def end(self, why: str) -> None:
        """Give up the connection and everything that waits for it."""
        if self._ended:
            return
        self._ended = True
        if self._transport is not None:
            self._transport.abort()
        while self.pending:
            fail(self.pending.popleft().future, why)
        self._lost(self, why)


def fail(future: asyncio.Future[Reply], why: str) -> None:
    """Tell whoever waits; who has left need not be told."""
    if not future.done():
        future.set_exception(StoreUnavailable(why))
        future.exception()  # it counts as seen
