"""The Valkey of a running ``router up``, for commands that are told of no other store."""

from __future__ import annotations

from pathlib import Path

from cli.preflight import run_path
from gateway.settings import VALKEY_SOCKET


def embedded_valkey(run_dir: Path) -> str | None:
    """Address of the Valkey that ``router up`` has started in a run directory, where there is one."""
    socket = run_path(run_dir) / VALKEY_SOCKET
    return f"unix://{socket}" if socket.exists() else None
