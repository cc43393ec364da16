"""``healthcheck.py http URL`` or ``healthcheck.py workers``: exit code 0 when well, else 1 and the reason.

For the health checks of containers: starts fast, so it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 2.0


def check_http(url: str) -> None:
    """GET ``url`` answers 2xx, whatever proxy the environment names."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=TIMEOUT_S):
        pass


def check_workers() -> None:
    """Every ext_proc worker, and the status server beside them, accepts connections on its socket in RUN_DIR."""
    workers = int(os.environ.get("EXTPROC_WORKERS") or os.cpu_count() or 1)
    names = [f"extproc-{worker}.sock" for worker in range(workers)]
    for name in (*names, "extproc-status.sock"):
        path = Path(os.environ["RUN_DIR"]) / name
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT_S)
            try:
                client.connect(str(path))
            except OSError as error:
                raise OSError(f"{path}: {error}") from error


def main(arguments: list[str]) -> int:
    """Run the check that the arguments name."""
    try:
        match arguments:
            case ["http", url]:
                check_http(url)
            case ["workers"]:
                check_workers()
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (OSError, urllib.error.URLError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
