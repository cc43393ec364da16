"""HTTP servers of the programs: admin, status and metrics, on uvicorn in the program's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from gateway.settings import SettingsError


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals stay the program's own."""
        yield


def tcp_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        SettingsError: the address cannot be bound.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def unix_listener(path: Path) -> socket.socket:
    """A listening unix socket in place of whatever was left at ``path``."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o660)
    return listener


async def serve(app: ASGIApp, *listeners: socket.socket) -> None:
    """Serve on sockets until cancelled, then close them."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=list(listeners)))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        await serving
        for listener in listeners:
            listener.close()
