"""The access log's gRPC server: bytes in, on a unix socket. Envoy docs: "Access log service (ALS)".

Envoy opens one stream for each of its threads and expects no answer, so nothing here makes it wait.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from gateway.names import ACCESS_LOG_SERVICE
from usage.access_log import Batch, decode, log_name

MESSAGE_MAX_BYTES: Final = 16 * 1024 * 1024
"""Envoy sends some 16 kB at a time, but one entry may have long headers."""


class AccessLogServer:
    """Hands what every message of every stream tells to ``receive``."""

    def __init__(self, socket: Path, receive: Callable[[Batch], None]) -> None:
        self._socket = socket
        self._receive = receive
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", MESSAGE_MAX_BYTES), ("grpc.so_reuseport", 0)]
        )
        stream: grpc.RpcMethodHandler[Any, Any] = grpc.stream_unary_rpc_method_handler(self._stream)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(ACCESS_LOG_SERVICE, {"StreamAccessLogs": stream}),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def _stream(self, messages: AsyncIterator[bytes], _: Any) -> bytes:
        listener = ""
        async for data in messages:
            listener = listener or log_name(data)  # only the first message of a stream says it
            self._receive(decode(data, listener))
        return b""

    async def start(self) -> None:
        """Listen, then say that it serves."""
        self._socket.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        os.chmod(self._socket, 0o660)
        await self._tell(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Take no new stream, read the open ones a moment longer."""
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace_s)
        self._socket.unlink(missing_ok=True)

    async def _tell(self, status: int) -> None:
        for service in ("", ACCESS_LOG_SERVICE):
            await self._health.set(service, status)
