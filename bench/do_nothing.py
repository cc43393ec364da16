"""An ext_proc server that does nothing, in the router's runtime: what is the least that two messages can cost.

Raw-bytes handlers on grpc.aio and uvloop, as ``extproc.server`` has them; every answer is a constant.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
from typing import Any, Final

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
CONTINUE: Final = (b"\x0a\x00", b"\x1a\x00")
"""ProcessingResponse with an empty ``request_headers``, then one with an empty ``request_body``."""


async def process(_: Any, context: Any) -> None:
    """Let one request pass: one constant for its headers, one for its body."""
    for answer in CONTINUE:
        if await context.read() is grpc.aio.EOF:
            return
        await context.write(answer)
    await context.read()


async def serve(socket: str) -> None:
    """Listen on a unix socket until SIGTERM."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", 10_000)])
    handlers: dict[str, Any] = {"Process": grpc.stream_stream_rpc_method_handler(process)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    gc.collect()
    gc.freeze()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    uvloop.run(serve(parser.parse_args().socket))
