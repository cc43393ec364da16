"""The access log of a stack as Envoy sends it, taken in the ledger's place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from gateway import names
from gateway.protobuf import message_classes
from gateway.settings import USAGE_SOCKET
from tests.harness.process import eventually
from tests.harness.stack import Stack

_Message: Final = message_classes("usage", "access_log.binpb")("envoy.service.accesslog.v3.StreamAccessLogsMessage")

_ENDED: Final = 6  # AccessLogType.DownstreamEnd
Said = dict[str, Any]
"""Dynamic metadata of one namespace."""


class Told:
    """What Envoy told of one request."""

    def __init__(self, entry: Any) -> None:
        self.status = int(entry.response.response_code.value)
        self.flags = tuple(field.name for field, _ in entry.common_properties.response_flags.ListFields())
        self._entry = entry
        self._metadata = entry.common_properties.metadata.filter_metadata

    @property
    def message(self) -> bytes:
        """A message that tells of this request alone."""
        message = _Message()
        message.http_logs.log_entry.append(self._entry)
        return bytes(message.SerializeToString())

    def _said(self, namespace: str) -> Said:
        if namespace not in self._metadata:
            return {}
        fields = self._metadata[namespace].fields
        return {key: getattr(value, value.WhichOneof("kind")) for key, value in fields.items()}

    @property
    def router(self) -> Said:
        """What is the same for many requests."""
        return self._said(names.METADATA_NAMESPACE)

    @property
    def limits(self) -> Said:
        """What differs from request to request."""
        return self._said(names.LIMITS_NAMESPACE)

    @property
    def usage(self) -> Said:
        """What the backend reported, and events."""
        return self._said(names.USAGE_NAMESPACE)

    @property
    def counted(self) -> Said:
        """What ext_proc counted."""
        return self._said(names.COUNTED_NAMESPACE)


class AccessLog:
    """Keeps what it is told, by request id."""

    def __init__(self) -> None:
        self._told: dict[str, Told] = {}

    def take(self, messages: Iterator[bytes]) -> None:
        """One stream; only of the public listener's does anything count, and of it the ends of requests."""
        listener = ""
        for data in messages:
            message = _Message.FromString(data)
            listener = message.identifier.log_name or listener  # the first message alone has it
            for entry in message.http_logs.log_entry if listener == names.LISTENER_PUBLIC else ():
                if entry.common_properties.access_log_type == _ENDED:
                    self._told[entry.request.request_id] = Told(entry)

    def of(self, response: httpx.Response | str) -> Told:
        """What was told of a response's request, once it is."""
        request_id = response if isinstance(response, str) else response.headers["x-request-id"]
        eventually(lambda: request_id in self._told, f"the access log has {request_id}")
        return self._told[request_id]


@contextlib.contextmanager
def access_log_of(stack: Stack) -> Iterator[AccessLog]:
    """Take the access log of a stack, whose ledger is stopped for it."""
    stack.usage.stop()
    log = AccessLog()

    def stream(messages: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
        with contextlib.suppress(grpc.RpcError):  # Envoy has gone
            log.take(messages)
        return b""

    server = grpc.server(ThreadPoolExecutor(4))
    handlers = {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(names.ACCESS_LOG_SERVICE, handlers)])
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for service in ("", names.ACCESS_LOG_SERVICE):
        health.set(service, health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"unix:{stack.directory / USAGE_SOCKET}")
    server.start()
    try:
        yield log
    finally:
        server.stop(None).wait()
