"""HTTP/1.1 by the byte, for what no client library would send."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import httpx


@contextlib.contextmanager
def connected(port: int, *, timeout_s: float = 15.0) -> Iterator[socket.socket]:
    """A connection to a local port."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        yield connection


def read_response(connection: socket.socket, *, method: str = "GET", path: str = "/") -> httpx.Response:
    """The next response on a connection, interim ones left out, as if ``method`` and ``path`` had been asked for."""
    response = HTTPResponse(connection, method=method)
    response.begin()
    body = response.read()
    request = httpx.Request(method, f"http://router{path}")
    return httpx.Response(response.status, headers=response.getheaders(), content=body, request=request)


def exchange(port: int, sent: bytes, *, method: str = "GET", path: str = "/") -> httpx.Response:
    """What a local port answers to some bytes."""
    with connected(port) as connection:
        connection.sendall(sent)
        return read_response(connection, method=method, path=path)
