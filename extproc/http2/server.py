"""A gRPC server on a unix socket: the transports of its peers, and a task for each call."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

from extproc.http2.call import Call, Handler
from extproc.http2.connection import Connection
from extproc.http2.events import Ended, Event, Failed, Opened, Received, Reset
from extproc.http2.frames import ErrorCode
from extproc.http2.grpc import PREFIX_BYTES, GrpcError, Status, trailers_only
from gateway.telemetry import Logger

BACKLOG: Final = 1024
WRITE_BUFFER_BYTES: Final = 1024 * 1024
"""Above it bodies wait until the peer has read."""
_FLOOD_BYTES: Final = 8 * 1024 * 1024
"""Answers to a peer that asks and asks and does not read."""
_CLOSE_S: Final = 5.0
"""How long a peer has to read the last bytes."""


class _Peer(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: GrpcServer) -> None:
        self._server = server
        # Half a window holds any message: when half of it is consumed, the rest can always come.
        self._connection = Connection(stream_window=2 * (server.message_max_bytes + PREFIX_BYTES))
        self._calls: dict[int, Call] = {}
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not say so itself
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._server.made(self)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._abandon_all()
        self._server.lost(self)

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._connection.receive(data):
                self._on_event(event)
            self._flush()
        except Exception:  # our bug: it costs this connection and no other
            self._server.log.exception("http2_connection_failed")
            self._connection.fail(ErrorCode.INTERNAL_ERROR, "internal error")
            self._abandon_all()
            self._flush()

    def pause_writing(self) -> None:
        self._connection.pause(True)

    def resume_writing(self) -> None:
        self._connection.pause(False)
        self._flush()

    def go_away(self) -> None:
        """Ask for no new calls, and close when the last one is over."""
        self._connection.go_away()
        self._flush()

    def abort(self) -> None:
        """Close at once, whatever is open."""
        if self._transport is not None:
            self._transport.abort()

    def _on_event(self, event: Event) -> None:
        match event:
            case Received():
                call = self._calls.get(event.stream_id)
                if call is not None:
                    call.received(event.data)
                    self._begin(call)
            case Opened():
                self._open(event)
            case Ended():
                call = self._calls.get(event.stream_id)
                if call is not None:
                    call.ended()
                    self._begin(call)
            case Reset():
                call = self._calls.pop(event.stream_id, None)
                if call is not None:
                    self._abandon(call)
            case Failed():
                self._server.log.error("http2_protocol_error", code=event.code.name, error=event.what)
                self._abandon_all()

    def _open(self, event: Opened) -> None:
        path = event.fields.get(b":path", b"")
        handler = self._server.handlers.get(path)
        if handler is None:
            unknown = GrpcError(Status.UNIMPLEMENTED, f"unknown method {path.decode('latin-1')}")
            self._connection.send_trailers(event.stream_id, trailers_only(unknown))
            return
        self._calls[event.stream_id] = Call(
            event.stream_id,
            event.fields,
            handler=handler,
            connection=self._connection,
            message_max_bytes=self._server.message_max_bytes,
            flush=self._flush,
        )

    def _begin(self, call: Call) -> None:
        if call.may_begin:
            call.task = asyncio.get_running_loop().create_task(self._serve(call))

    async def _serve(self, call: Call) -> None:
        error: GrpcError | None = None
        call.begin()
        try:
            await call.handler(call)
        except GrpcError as raised:
            error = raised
        except Exception:  # our bug: it costs this call and no other
            self._server.log.exception("call_failed")
            error = GrpcError(Status.INTERNAL, "internal error")
        self._calls.pop(call.stream_id, None)
        call.finish(error)

    def _abandon_all(self) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            self._abandon(call)

    def _abandon(self, call: Call) -> None:
        if call.abandon() and call.task is not None:
            self._server.cancelled(call.task)

    def _flush(self) -> None:
        """Hand everything to the transport that may be sent now."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        while True:
            data, drained = self._connection.data_to_send()
            if not data:
                break
            transport.write(data)
            for stream_id in drained:
                call = self._calls.get(stream_id)
                if call is not None:
                    call.drained()
        if self._connection.finished:
            transport.close()
            asyncio.get_running_loop().call_later(_CLOSE_S, transport.abort)
        elif transport.get_write_buffer_size() > _FLOOD_BYTES:
            self._server.log.error("http2_peer_does_not_read")
            transport.abort()


class GrpcServer:
    """Serves calls by the handler of their path, each in a task of its own."""

    def __init__(self, handlers: Mapping[bytes, Handler], *, message_max_bytes: int, log: Logger) -> None:
        self.handlers = handlers
        self.message_max_bytes = message_max_bytes
        self.log = log
        self.peers: set[_Peer] = set()
        self._socket: Path | None = None
        self._listener: asyncio.Server | None = None
        self._draining = False
        self._alone = asyncio.Event()
        self._cancelled: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path) -> None:
        """Listen on a unix socket that its group may use, in place of one that was left behind."""
        self._listener = await asyncio.get_running_loop().create_unix_server(
            lambda: _Peer(self), sock=_bound(path), backlog=BACKLOG
        )
        self._socket = path

    async def drain(self, *, grace_s: float) -> None:
        """Take no new calls, give those that are open ``grace_s``, close everything."""
        self._draining = True
        if self._listener is not None:
            self._listener.close()
        for peer in list(self.peers):
            peer.go_away()
        if not await self._is_alone(grace_s):
            for peer in list(self.peers):
                peer.abort()
            await self._is_alone(_CLOSE_S)
        if self._cancelled:
            await asyncio.wait(self._cancelled, timeout=_CLOSE_S)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    def made(self, peer: _Peer) -> None:
        """A connection is there; one that was accepted as the listener closed has to go at once."""
        self.peers.add(peer)
        if self._draining:
            peer.go_away()

    def lost(self, peer: _Peer) -> None:
        """A connection is no more."""
        self.peers.discard(peer)
        if not self.peers:
            self._alone.set()

    def cancelled(self, task: asyncio.Task[None]) -> None:
        """Hold a task until it has ended: nobody else does, once its call is gone."""
        self._cancelled.add(task)
        task.add_done_callback(self._cancelled.discard)

    async def _is_alone(self, within_s: float) -> bool:
        if self.peers:
            self._alone.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._alone.wait(), within_s)
        return not self.peers


def _bound(path: Path) -> socket.socket:
    """A socket that nobody can connect to before its mode is set."""
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(path))
    path.chmod(0o660)
    return bound
