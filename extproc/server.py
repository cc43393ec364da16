"""The ext_proc gRPC server of one worker: bytes in, bytes out, on a unix socket of its own.

Envoy docs: "External Processing". Raw-bytes handlers on ``context.read()`` and ``context.write()`` are the
fastest way through grpc.aio (design, "Two codecs").
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from extproc.exchange import OutOfPhase
from extproc.pipeline import Deciders, Decision
from extproc.wire import WireError, decode, encode
from gateway.names import EXTPROC_SERVICE
from gateway.telemetry import Logger

_EOF: Final = grpc.aio.EOF
# A message holds the whole body, and Envoy adds headers and framing to it.
_ROOM_BYTES: Final = 1024 * 1024


def _traceparent(context: Any) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return str(value)
    return None


class ExtProcServer:
    """Serves the exchanges of one worker."""

    def __init__(self, deciders: Deciders, *, socket: Path, buffer_bytes: int, traced: bool, log: Logger) -> None:
        """``traced``: Envoy sends the trace's ids along; to look for them in vain costs as much as a step."""
        self._deciders = deciders
        self._socket = socket
        self._traced = traced
        self._log = log
        self._health = HealthServicer()
        self._endings: set[asyncio.Future[None]] = set()
        limit = buffer_bytes + _ROOM_BYTES
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 10_000),
            ]
        )
        process: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._process)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(EXTPROC_SERVICE, {"Process": process}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def _process(self, _: Any, context: Any) -> None:
        decision = Decision(self._deciders, _traceparent(context) if self._traced else None)
        try:
            while (data := await context.read()) is not _EOF:
                event = decode(data)
                await context.write(encode(await decision.on_event(event), event))
        except (WireError, OutOfPhase) as error:
            self._log.error("ext_proc_protocol_error", error=str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            if decision.waited_for:
                # A task of its own: this one may have been cancelled.
                ending = asyncio.ensure_future(decision.end())
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def start(self) -> None:
        """Listen, then say that it serves."""
        self._socket.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        os.chmod(self._socket, 0o660)
        await self._tell(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, *, notice_s: float, grace_s: float) -> None:
        """Say that it no longer serves, give Envoy's health check ``notice_s`` to hear it, finish what is open."""
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(notice_s)
        await self._server.stop(grace_s)
        self._socket.unlink(missing_ok=True)

    async def _tell(self, status: int) -> None:
        for service in ("", EXTPROC_SERVICE):
            await self._health.set(service, status)
