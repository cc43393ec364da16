"""A program under test: its process, its log, conditions to wait for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

WAIT_S = 30.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; held open together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def eventually(condition: Callable[[], object], what: str, *, within_s: float = WAIT_S, every_s: float = 0.02) -> None:
    """Wait until ``condition`` gives something true.

    Raises:
        AssertionError: it did not within ``within_s``.
    """
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(every_s)


class Process:
    """A child in a session of its own, with its output in a file."""

    def __init__(self, name: str, command: Sequence[str], *, directory: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self._command = list(command)
        self._directory = directory
        self._environ = environ
        self.log_path = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the program, or start it again."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                env={**os.environ, **self._environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Everything it has printed."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self, number: int = signal.SIGTERM, *, within_s: float = 20.0) -> int:
        """Send a signal and wait for the end; what is left of its session is killed."""
        if self._process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        try:
            return self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return self._kill_session()
        finally:
            self._kill_session()

    def _kill_session(self) -> int:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()
