"""The ext_proc server of one worker: bytes in, bytes out, on a unix socket of its own.

Envoy docs: "External Processing". The transport is ours (``extproc.http2``), because grpc.aio costs several times what
the decision does (ADR 0009).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from extproc.exchange import OutOfPhase
from extproc.health import CHECK, Health
from extproc.http2.call import Call
from extproc.http2.grpc import GrpcError, Status
from extproc.http2.server import GrpcServer
from extproc.pipeline import Deciders, Decision
from extproc.wire import WireError, decode, encode
from gateway.names import EXTPROC_SERVICE
from gateway.telemetry import Logger

PROCESS: Final = f"/{EXTPROC_SERVICE}/Process".encode()
# A message holds the whole body, and Envoy adds headers and framing to it.
_ROOM_BYTES: Final = 1024 * 1024
_ENDINGS_S: Final = 1.0


class ExtProcServer:
    """Serves the exchanges of one worker."""

    def __init__(self, deciders: Deciders, *, socket: Path, buffer_bytes: int, traced: bool, log: Logger) -> None:
        """``traced``: Envoy sends the trace's ids along; to look for them in vain costs as much as a step."""
        self._deciders = deciders
        self._socket = socket
        self._traced = traced
        self._log = log
        self._health = Health(EXTPROC_SERVICE)
        self._endings: set[asyncio.Future[None]] = set()
        self._server = GrpcServer(
            {PROCESS: self._process, CHECK: self._health.check},
            message_max_bytes=buffer_bytes + _ROOM_BYTES,
            log=log,
        )

    async def _process(self, call: Call) -> None:
        decision = Decision(self._deciders, _traceparent(call) if self._traced else None)
        try:
            while (data := await call.read()) is not None:
                event = decode(data)
                await call.write(encode(await decision.on_event(event), event))
        except (WireError, OutOfPhase) as error:
            self._log.error("ext_proc_protocol_error", error=str(error))
            raise GrpcError(Status.INVALID_ARGUMENT, str(error)) from error
        finally:
            if decision.waited_for:
                # A task of its own: this one may have been cancelled.
                ending = asyncio.ensure_future(decision.end())
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def start(self) -> None:
        """Listen, then say that it serves."""
        await self._server.listen(self._socket)
        self._health.serving = True

    async def drain(self, *, notice_s: float, grace_s: float) -> None:
        """Say that it no longer serves, give Envoy's health check ``notice_s`` to hear it, finish what is open."""
        self._health.serving = False
        await asyncio.sleep(notice_s)
        await self._server.drain(grace_s=grace_s)
        if self._endings:
            await asyncio.wait(self._endings, timeout=_ENDINGS_S)


def _traceparent(call: Call) -> str | None:
    value = call.fields.get(b"traceparent")
    return value.decode("latin-1") if value is not None else None
