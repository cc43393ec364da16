"""One gRPC call on asyncio: what its handler reads and writes, and what the connection tells it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from extproc.http2.connection import Connection
from extproc.http2.grpc import (
    PREFIX_BYTES,
    RESPONSE_HEADERS,
    GrpcError,
    MessageReader,
    Status,
    framed,
    trailers,
    trailers_only,
)
from extproc.http2.headers import Fields

Handler: TypeAlias = "Callable[[Call], Awaitable[None]]"


class Call:
    """A call of any kind: messages in, messages out. It is over when its handler returns or raises GrpcError."""

    __slots__ = (
        "_blocked",
        "_connection",
        "_ended",
        "_flush",
        "_inbox",
        "_reader",
        "_responds",
        "_waiter",
        "_waits",
        "fields",
        "handler",
        "stream_id",
        "task",
    )

    def __init__(
        self,
        stream_id: int,
        fields: Fields,
        *,
        handler: Handler,
        connection: Connection,
        message_max_bytes: int,
        flush: Callable[[], None],
    ) -> None:
        self.stream_id = stream_id
        self.fields = fields
        """Request headers and metadata."""
        self.handler = handler
        self.task: asyncio.Task[None] | None = None
        """Runs the handler, from the first message or the end on."""
        self._connection = connection
        self._flush = flush
        self._reader: MessageReader | None = MessageReader(message_max_bytes)
        self._inbox: deque[bytes | GrpcError] = deque()
        self._ended = False
        self._responds = False
        self._blocked = False
        """The last message that was written still waits for the peer."""
        self._waits = True
        """The handler waits for a message, or has not begun yet."""
        self._waiter: asyncio.Future[None] | None = None

    # --- For the handler.

    async def read(self) -> bytes | None:
        """The next message; None after the last.

        Raises:
            GrpcError: the peer sent what is no message.
        """
        self._waits = True
        while not self._inbox and not self._ended:
            await self._wait()
        self._waits = False
        if not self._inbox:
            return None
        message = self._inbox.popleft()
        if isinstance(message, GrpcError):
            raise message
        if self._connection.consumed(self.stream_id, PREFIX_BYTES + len(message)):
            self._flush()
        return message

    async def write(self, message: bytes) -> None:
        """Send a message, and wait while the peer cannot take all of it."""
        if not self._responds:
            self._responds = True
            self._connection.send_headers(self.stream_id, RESPONSE_HEADERS)
        self._blocked = not self._connection.send_data(self.stream_id, framed(message))
        self._flush()
        while self._blocked:
            await self._wait()

    # --- For the connection.

    def received(self, data: bytes) -> None:
        """Data has come; what is behind a faulty message is dropped."""
        if self._reader is None:
            return
        try:
            self._inbox.extend(self._reader.feed(data))
        except GrpcError as error:
            self._inbox.append(error)
            self._reader = None
        if self._inbox:
            self._wake()

    def ended(self) -> None:
        """No more data comes."""
        if self._reader is not None and self._reader.in_message:
            self._inbox.append(GrpcError(Status.INTERNAL, "the last message is not complete"))
        self._ended = True
        self._wake()

    def drained(self) -> None:
        """The peer has been sent everything."""
        self._blocked = False
        self._wake()

    @property
    def may_begin(self) -> bool:
        """Whether there is something for a handler that does not run yet."""
        return self.task is None and (self._ended or bool(self._inbox))

    def begin(self) -> None:
        """The handler begins now."""
        self._waits = False

    def abandon(self) -> bool:
        """The peer is gone: a handler that works is cancelled (True), one that waits for a message sees the end."""
        self._inbox.clear()
        self._reader = None
        self._ended = True
        if not self._waits and self.task is not None:
            return self.task.cancel()
        self._wake()
        return False

    def finish(self, error: GrpcError | None) -> None:
        """Send the status."""
        block = trailers(error) if self._responds else trailers_only(error)
        self._connection.send_trailers(self.stream_id, block)
        self._flush()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
