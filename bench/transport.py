"""What the transport of ext_proc alone costs: a do-nothing server on grpc.aio beside one on ``extproc.http2``.

``python -m bench.transport`` puts an Envoy before each and loads both in turn, several times. Processor time of the
workers per request is the figure to look at: other programs on the machine disturb it least.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final

import click
import httpx
import uvloop

from bench import backend, do_nothing, envoy_configs
from bench.contestants import ENVOY, ROOT, Contestant
from bench.load import Sample, measure
from extproc.health import CHECK, Health
from extproc.http2.call import Call
from extproc.http2.server import GrpcServer
from extproc.server import PROCESS
from gateway.telemetry import get_logger
from tests.harness.process import Process, eventually, free_ports

CONNECTIONS: Final = 16
_KEY: Final = "nobody-looks"
_SERVERS: Final = (("G", "grpc.aio", "bench.do_nothing"), ("H", "extproc.http2", "bench.transport"))


async def process(call: Call) -> None:
    """What ``bench.do_nothing`` does: let one request pass."""
    for answer in do_nothing.CONTINUE:
        if await call.read() is None:
            return
        await call.write(answer)
    await call.read()


async def serve(socket: Path) -> None:
    """Listen on a unix socket until SIGTERM."""
    health = Health(do_nothing.SERVICE)
    server = GrpcServer({PROCESS: process, CHECK: health.check}, message_max_bytes=16 * 1024 * 1024, log=get_logger())
    await server.listen(socket)
    health.serving = True
    gc.collect()
    gc.freeze()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.drain(grace_s=0)


@contextlib.contextmanager
def running(directory: Path, letter: str, name: str, module: str, nginx: backend.Backend) -> Iterator[Contestant]:
    """One worker, and an Envoy that sends every request through it."""
    directory.mkdir()
    port, admin_port = free_ports(2)
    socket = directory / "worker.sock"
    config = envoy_configs.bootstrap(port=port, admin_port=admin_port, backend_ports=nginx.ports, sockets=[str(socket)])
    (directory / "envoy.json").write_text(json.dumps(config))
    envoy_command = (str(ENVOY), "-c", str(directory / "envoy.json"), "--concurrency", "1", "--disable-hot-restart")
    worker_command = (sys.executable, "-m", module, "--socket", str(socket))
    worker = Process("worker", worker_command, directory=directory, environ={"PYTHONPATH": str(ROOT)})
    envoy = Process("envoy", (*envoy_command, "--log-level", "warning"), directory=directory, environ={})
    try:
        worker.start()
        eventually(socket.exists, f"{name} listens")
        envoy.start()
        eventually(lambda: _answers(port), f"{name} answers behind Envoy")
        yield Contestant(
            letter=letter,
            name=name,
            url=f"http://127.0.0.1:{port}",
            backend=nginx,
            processes=(envoy, worker),
            workers=lambda: {"worker": worker.pid},
        )
    finally:
        envoy.stop()
        worker.stop()


def _answers(port: int) -> bool:
    """Whether a request gets through the worker."""
    try:
        return httpx.post(f"http://127.0.0.1:{port}/", json={}, trust_env=False).status_code == HTTPStatus.OK
    except httpx.TransportError:
        return False


def _say(name: str, samples: list[Sample]) -> str:
    cpu_us = [sample.workers_cpu_us for sample in samples]
    requests_per_s = statistics.median(sample.requests_per_s for sample in samples)
    each = " ".join(f"{figure:.0f}" for figure in cpu_us)
    median = statistics.median(cpu_us)
    return f"{name:14} worker CPU {median:5.0f} µs a request (rounds: {each}), {requests_per_s:.0f} requests/s"


def compare(*, rounds: int, seconds: int) -> None:
    """Load both servers in turn and print what a request costs in each."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp")))
        (directory / "nginx").mkdir()
        nginx = stack.enter_context(backend.running_backend(directory / "nginx"))
        servers = [stack.enter_context(running(directory / server[0], *server, nginx)) for server in _SERVERS]
        samples: dict[str, list[Sample]] = {server.name: [] for server in servers}
        for number in range(-1, rounds):  # the first warms up
            for server in servers:
                sample = measure(server, key=_KEY, connections=CONNECTIONS, seconds=seconds, number=number)
                if number >= 0:
                    samples[server.name].append(sample)
    for name, measured in samples.items():
        click.echo(_say(name, measured))


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2, show_default=True, help="Of each server in each round.")
@click.option("--socket", type=click.Path(path_type=Path), hidden=True, help="Be the server.")
def main(rounds: int, seconds: int, socket: Path | None) -> None:
    """Compare the two transports."""
    if socket is None:
        compare(rounds=rounds, seconds=seconds)
    else:
        uvloop.run(serve(socket))


if __name__ == "__main__":
    main()
