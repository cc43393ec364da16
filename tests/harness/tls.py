"""Certificates for https backends: an authority of the test's own, and a server that notes what it is asked for.

Certificates are made by the ``openssl`` command, which comes with the system's CA bundle nearly everywhere.
"""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer
from weakref import WeakKeyDictionary

_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {name}
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
[server]
basicConstraints = critical, CA:FALSE
subjectAltName = {san}
"""
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """PEM files of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority whose certificate is ``certificate``, a PEM file."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory / name
        self._directory.mkdir(parents=True)
        self.certificate = self._directory / "authority.pem"
        self._config("authority", san="DNS:unused")
        self._openssl("req", "-x509", *_KEY, "authority.key", "-days", "2", "-config", "authority.cnf",
                      "-extensions", "authority", "-out", "authority.pem")  # fmt: skip

    def issue(self, san: str) -> Certificate:
        """A server's certificate for ``san``, such as ``DNS:localhost`` or ``IP:127.0.0.1``."""
        stem = san.replace(":", "-")
        self._config(stem, san=san)
        self._openssl("req", "-new", *_KEY, f"{stem}.key", "-config", f"{stem}.cnf", "-out", f"{stem}.csr")
        self._openssl("x509", "-req", "-in", f"{stem}.csr", "-CA", "authority.pem", "-CAkey", "authority.key",
                      "-CAcreateserial", "-days", "2", "-extfile", f"{stem}.cnf", "-extensions", "server",
                      "-out", f"{stem}.pem")  # fmt: skip
        return Certificate(certificate=self._directory / f"{stem}.pem", key=self._directory / f"{stem}.key")

    def _config(self, stem: str, *, san: str) -> None:
        (self._directory / f"{stem}.cnf").write_text(_CONFIG.format(name=f"test {stem}", san=san))

    def _openssl(self, *arguments: str) -> None:
        command = shutil.which("openssl")
        assert command, "the openssl command is needed to make certificates (Debian: apt install openssl)"
        ended = subprocess.run([command, *arguments], cwd=self._directory, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as an https backend received it."""

    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpsBackend:
    """What an https backend has seen: the server name (SNI) of every handshake, None where there was none."""

    port: int
    server_names: list[str | None] = field(default_factory=list)
    received: list[Request] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all of it."""
        self.server_names.clear()
        self.received.clear()


@contextmanager
def https_backend(certificate: Certificate) -> Iterator[HttpsBackend]:
    """Answers every POST with an empty JSON object."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _EmptyAnswer)
    backend = _seen_by[server] = HttpsBackend(port=server.server_address[1])
    context.sni_callback = lambda _socket, name, _context: backend.server_names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield backend
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_seen_by: WeakKeyDictionary[BaseServer, HttpsBackend] = WeakKeyDictionary()


class _EmptyAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        request = Request(path=self.path, headers=tuple(self.headers.items()), body=body)
        _seen_by[self.server].received.append(request)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "2")
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass
