"""An HTTP/1.1 server connection on h11 that can also misbehave: reset, drop, stop in the middle of a body."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, cast

import h11

Headers = Sequence[tuple[str, str]]

HEAD_MAX_BYTES: Final = 256 * 1024


class Exchange:
    """One request received in full, and the means to answer it or not."""

    def __init__(self, connection: Connection, request: h11.Request, body: bytes) -> None:
        self.method = request.method.decode("ascii")
        self.target = request.target.decode("latin-1")
        self.headers = tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in request.headers.raw_items())
        self.body = body
        self.finished = False
        self._connection = connection

    def header(self, name: str) -> str | None:
        """Value of the first header of that name, in lower case."""
        return next((value for n, value in self.headers if n.lower() == name), None)

    def start(self, status: int, headers: Headers) -> None:
        """Write the status and the headers; the body is chunked unless they have a content-length."""
        self._connection.write(h11.Response(status_code=status, headers=list(headers)))

    async def send(self, data: bytes) -> None:
        """Write a piece of the body at once, and wait while the client is slow to read."""
        self._connection.write(h11.Data(data=data))
        await self._connection.drained()

    def finish(self) -> None:
        """End the body."""
        self.finished = not self.left
        self._connection.end()

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a whole response."""
        self.start(status, [*headers, ("content-length", str(len(body)))])
        if body and self.method != "HEAD":
            await self.send(body)
        self.finish()

    async def left_within(self, seconds: float | None) -> bool:
        """Wait so long, or forever, unless the client leaves; tells whether it left."""
        await asyncio.wait({self._connection.lost}, timeout=seconds)
        return self.left

    @property
    def left(self) -> bool:
        """The connection is gone."""
        return self._connection.lost.done()

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done when the connection is gone."""
        return self._connection.lost

    def reset(self) -> None:
        """Close with TCP RST."""
        self._connection.abort()

    def drop(self) -> None:
        """Close with TCP FIN after what was written, in the middle of the exchange."""
        self._connection.close()


class Connection(asyncio.Protocol):
    """One client's connection: hands every request to ``handle``, one at a time."""

    def __init__(self, handle: Callable[[Exchange], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = loop.create_future()
        self._handle = handle
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX_BYTES)
        self._request: h11.Request | None = None
        self._body: list[bytes] = []
        self._writable = asyncio.Event()
        self._writable.set()
        self._task: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake whoever waits for the client."""
        if not self.lost.done():
            self.lost.set_result(None)
        self._writable.set()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Parse, and start the exchange once its request is complete."""
        try:
            self._http.receive_data(data)
            self._advance()
        except h11.RemoteProtocolError as error:
            self._refuse(error)

    def write(self, event: h11.Response | h11.Data | h11.EndOfMessage | h11.InformationalResponse) -> None:
        """Write an event unless the client is gone."""
        if not self.lost.done():
            self._transport.write(self._http.send(event) or b"")

    async def drained(self) -> None:
        """Wait until the transport takes more."""
        if not self._writable.is_set():
            await self._writable.wait()

    def end(self) -> None:
        """End the response, then close, or go on to the next request."""
        self.write(h11.EndOfMessage())
        if self.lost.done():
            return
        if self._http.our_state is h11.MUST_CLOSE:
            self._transport.close()
            return
        self._http.start_next_cycle()
        try:
            self._advance()
        except h11.RemoteProtocolError as error:
            self._refuse(error)

    def close(self) -> None:
        """FIN."""
        self._transport.close()

    def abort(self) -> None:
        """RST: SO_LINGER of zero makes the kernel send it on close."""
        sock: socket.socket | None = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _advance(self) -> None:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                self._request, self._body = event, []
            elif isinstance(event, h11.Data):
                self._body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._begin()
            else:
                if self._http.they_are_waiting_for_100_continue:
                    self.write(h11.InformationalResponse(status_code=100, headers=[]))
                return

    def _begin(self) -> None:
        assert self._request is not None  # noqa: S101  (h11's order of events)
        exchange = Exchange(self, self._request, b"".join(self._body))
        self._task = asyncio.ensure_future(self._handle(exchange))
        self._task.add_done_callback(self._failed)

    def _failed(self, task: asyncio.Future[None]) -> None:
        """A bug in the handler must show in the log and to the client, as a dropped connection."""
        if not task.cancelled() and task.exception():
            asyncio.get_running_loop().call_exception_handler({"message": "handler", "exception": task.exception()})
            self._transport.abort()

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            body = str(error).encode()
            headers = [("content-length", str(len(body))), ("connection", "close")]
            self.write(h11.Response(status_code=error.error_status_hint, headers=headers))
            self.write(h11.Data(data=body))
        self._transport.close()
