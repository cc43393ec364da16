"""Health of the worker, which Envoy asks for by gRPC (grpc/health/v1/health.proto); Watch is not offered."""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from extproc.http2.call import Call
from extproc.http2.grpc import GrpcError, Status

CHECK: Final = b"/grpc.health.v1.Health/Check"
_SERVING: Final = health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
_NOT_SERVING: Final = health_pb2.HealthCheckResponse(status="NOT_SERVING").SerializeToString()


class Health:
    """Answers for some services, and for the server as a whole, whose name is empty."""

    def __init__(self, *services: str) -> None:
        self.serving = False
        self._services = frozenset(("", *services))

    async def check(self, call: Call) -> None:
        """One question, one answer.

        Raises:
            GrpcError: there is no such service, or that is no question.
        """
        try:
            question = health_pb2.HealthCheckRequest.FromString(await call.read() or b"")
        except DecodeError as error:
            raise GrpcError(Status.INVALID_ARGUMENT, "not a HealthCheckRequest") from error
        if question.service not in self._services:
            raise GrpcError(Status.NOT_FOUND, f"unknown service {question.service}")
        await call.write(_SERVING if self.serving else _NOT_SERVING)
