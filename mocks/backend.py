"""``python -m mocks.backend``: an OpenAI-compatible HTTP/1.1 backend with faults on demand.

::

    python -m mocks.backend --port 8001 --id mock-backend-1 [--host 127.0.0.1 | --unix PATH]
                            [--tls-cert FILE --tls-key FILE] [--completions text] [--no-bodies] [--seed N]

When it listens it prints one JSON line: ``{"event": "listening", "id": …, "url": …}``; with ``--port 0`` the
port in the url is a free one. Endpoints work under any path prefix. Faults and the journal:
:mod:`mocks.control_api`; fields that shape an answer: :mod:`mocks.answers`; a fault for one request is
its header ``x-mock-fault: status=503`` (:func:`mocks.faults.parse_fault_header`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import ssl
import sys
from pathlib import Path
from random import Random

import uvloop

from mocks import control_api
from mocks.faults import Faults
from mocks.http1 import Connection, Exchange
from mocks.journal import Journal
from mocks.service import Backend

BACKLOG = 1024


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    options = _parser().parse_args()
    if bool(options.tls_cert) != bool(options.tls_key):
        sys.exit("--tls-cert and --tls-key go together")
    try:
        uvloop.run(serve(options))
    except OSError as error:
        sys.exit(f"{options.id}: cannot listen: {error}")


async def serve(options: argparse.Namespace) -> None:
    """Listen, say where, and answer until told to stop."""
    backend = Backend(
        backend_id=options.id,
        faults=Faults(Random(options.seed)),  # noqa: S311  (draws lots for faults)
        journal=Journal(keep_bodies=not options.no_bodies),
        text_format=options.completions == "text",
    )

    async def handle(exchange: Exchange) -> None:
        await control_api.handle(backend, exchange)

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tls = _tls(options.tls_cert, options.tls_key) if options.tls_cert else None
    if options.unix:
        with contextlib.suppress(FileNotFoundError):
            Path(options.unix).unlink()  # noqa: ASYNC240  (at start, before anyone waits)
        server = await loop.create_unix_server(lambda: Connection(handle), options.unix, ssl=tls, backlog=BACKLOG)
        url = f"unix:{options.unix}"
    else:
        server = await loop.create_server(
            lambda: Connection(handle), options.host, options.port, ssl=tls, backlog=BACKLOG
        )
        port = server.sockets[0].getsockname()[1]
        url = f"{'https' if tls else 'http'}://{options.host}:{port}"
    print(json.dumps({"event": "listening", "id": options.id, "url": url}), flush=True)
    await stop.wait()
    server.close()


def _tls(cert: str, key: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    return context


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mocks.backend", description="A mock inference backend.")
    parser.add_argument("--id", default="mock-backend-1")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001, help="0: a free one")
    parser.add_argument("--unix", metavar="PATH", help="listen on a unix socket instead")
    parser.add_argument("--tls-cert", metavar="FILE")
    parser.add_argument("--tls-key", metavar="FILE")
    parser.add_argument("--completions", choices=("openai", "text"), default="openai", help="format of /v1/completions")
    parser.add_argument("--no-bodies", action="store_true", help="keep no bodies in the journal")
    parser.add_argument("--seed", type=int, default=0, help="of the flaky fault's lots")
    return parser


if __name__ == "__main__":
    main()
