"""Probes: each tells why a program is not ready yet, or None when it is. None waits longer than a second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

Probe = Callable[[], Awaitable[str | None]]

PROBE_TIMEOUT_S: Final = 1.0
ANSWER_MAX_BYTES: Final = 4096
HTTP_OK: Final = b"200"


async def _ask(opening: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]], question: bytes) -> bytes:
    """First bytes of the answer to a question on a new connection; no question, no answer."""
    reader, writer = await opening
    try:
        if not question:
            return b""
        writer.write(question)
        return await reader.read(ANSWER_MAX_BYTES)
    finally:
        writer.close()


async def _why_not(
    opening: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]], question: bytes, want: bytes, at: str
) -> str | None:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            answer = await _ask(opening, question)
    except TimeoutError:
        return f"{at}: no answer within {PROBE_TIMEOUT_S:g} s"
    except OSError as error:
        return f"{at}: {error.strerror or error}"
    head, _, body = answer.partition(b"\r\n\r\n")
    first_line = head.split(b"\r\n", 1)[0]
    if want in first_line:
        return None
    return f"{at}: answered {(first_line + b' ' + body).decode(errors='replace').strip()!r}"


def http_ok(host: str, port: int, path: str) -> Probe:
    """``GET path`` answers 200."""
    question = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode()
    at = f"GET http://{host}:{port}{path}"

    async def probe() -> str | None:
        return await _why_not(asyncio.open_connection(host, port), question, HTTP_OK, at)

    return probe


def sockets_accept(*paths: Path) -> Probe:
    """Every unix socket accepts connections."""

    async def probe() -> str | None:
        for path in paths:
            why = await _why_not(asyncio.open_unix_connection(path), b"", b"", str(path))
            if why:
                return why
        return None

    return probe


def valkey_answers(path: Path) -> Probe:
    """A Valkey on a unix socket answers PING; while it loads its data it does not."""

    async def probe() -> str | None:
        return await _why_not(asyncio.open_unix_connection(path), b"PING\r\n", b"+PONG", str(path))

    return probe
