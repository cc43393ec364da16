"""API keys for a stack: made by ``router keys``, and a user-org-service that answers as it is told."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from cli.keys import keys as keys_command
from extproc.keys.record import digest, record_from
from extproc.keys.register import FileRegister

PATH = "/v1/auth/validate-api-key"


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeKey:
    """What ``router keys create`` shows once."""

    key: str
    id: str
    signing_secret: str


class KeyStoreCommands:
    """``router keys`` on one store: ``("--file", path)`` or ``("--redis", address)``."""

    def __init__(self, *store: str) -> None:
        self._store = store

    def _run(self, *arguments: str) -> str:
        result = CliRunner(env={"KEY_FILE": "", "REDIS_ADDR": ""}).invoke(keys_command, [*arguments, *self._store])
        assert result.exit_code == 0, result.output
        return result.stdout

    def create(self, *options: str, org: str = "acme") -> MadeKey:
        """Make a key."""
        made = json.loads(self._run("create", "--org", org, "--json", *options))
        return MadeKey(key=made["key"], id=made["id"], signing_secret=made.get("signing_secret", ""))

    def revoke(self, key: MadeKey) -> None:
        """Revoke a key."""
        self._run("revoke", key.id)


def add_expired(path: Path, key: str) -> None:
    """A key that ended long ago, which the command would not make."""
    fields = {"id": "expired", "organization_id": "acme", "digest": digest(key), "expires_at": 1.0}
    FileRegister(path).add(record_from(fields))


class UserOrg:
    """A user-org-service that knows no key. ``down`` makes it answer 500; while ``held`` it does not answer."""

    def __init__(self) -> None:
        self.down = False
        self.asked: Counter[str] = Counter()
        self._go = threading.Event()
        self._go.set()
        self._known: dict[str, dict[str, Any]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def knows(self, key: str, **fields: Any) -> None:
        """Make it know a key; fields as the service answers them."""
        self._known[key] = {"valid": True, "apiKeyId": f"id-of-{key}", "organizationId": "acme", **fields}

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
    def running(self) -> Iterator[UserOrg]:
        """Serve from a thread."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self._go.set()
            self._server.shutdown()
            self._server.server_close()

    def _answer(self, key: str) -> tuple[int, dict[str, Any]]:
        self.asked[key] += 1
        self._go.wait(30)
        return (500, {}) if self.down else (200, self._known.get(key, {"valid": False, "message": "no such key"}))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self._answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, body = answer(asked["apiKeySecret"]) if self.path == PATH else (404, {})
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        return Handler
