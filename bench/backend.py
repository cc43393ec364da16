"""nginx as the backend: it answers every request with the same small chat completion."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.harness.process import Process, free_ports

ANSWER: Final = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "gpt-4o",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Exit code 137 is SIGKILL: look at the memory limit first.",
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 61, "completion_tokens": 13, "total_tokens": 74},
    },
    separators=(",", ":"),
)

_CONFIG: Final = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  keepalive_timeout 1h;
  default_type application/json;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  server {{
    {listen}
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A running nginx that listens on each of ``ports``."""

    ports: tuple[int, ...]
    pid: int


def binary() -> str | None:
    """nginx of this machine; Debian puts it where a user's PATH does not look."""
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


@contextlib.contextmanager
def running_backend(directory: Path) -> Iterator[Backend]:
    """Run nginx on two free ports, one for each backend of the policy."""
    ports = tuple(free_ports(2))
    listen = " ".join(f"listen 127.0.0.1:{port};" for port in ports)
    config = directory / "nginx.conf"
    config.write_text(_CONFIG.format(listen=listen, answer=ANSWER))
    command = (str(binary()), "-p", str(directory), "-e", "stderr", "-c", str(config))
    nginx = Process("nginx", command, directory=directory, environ={})
    nginx.start()
    try:
        yield Backend(ports=ports, pid=nginx.pid)
    finally:
        nginx.stop()
