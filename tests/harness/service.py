"""A service of somebody else's on a free port, which answers as it is told."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

HELD_MAX_S = 30


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none of the service's business; anything else shows in the test's output."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class LocalService:
    """``down`` makes it answer 500; while ``held`` it does not answer. A subclass says what it answers else."""

    def __init__(self) -> None:
        self.down = False
        self._go = threading.Event()
        self._go.set()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, method: str, path: str, asked: Any) -> tuple[int, Any]:
        """Status and body of an answer; ``asked`` is the JSON that came, if any."""
        raise NotImplementedError

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody gets an answer within the block."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def release(self) -> None:
        """Let the held answers go."""
        self._go.set()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Every answer within the block is a 500."""
        self.down = True
        try:
            yield
        finally:
            self.down = False

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Serve from a thread."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield self
        finally:
            self._go.set()
            self._server.shutdown()
            self._server.server_close()

    def _answer(self, method: str, path: str, asked: Any) -> tuple[int, bytes]:
        status, body = self.answer(method, path, asked)
        self._go.wait(HELD_MAX_S)
        if self.down:
            status, body = 500, {}
        return status, body if isinstance(body, bytes) else json.dumps(body).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self._answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self) -> None:
                sent = self.rfile.read(int(self.headers.get("content-length", "0")))
                status, data = answer(self.command, self.path, json.loads(sent) if sent else None)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _do

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        return Handler
