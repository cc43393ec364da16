"""A mock backend as a process of its own on a free port, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from mocks.control import MockControl

STOP_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MockProcess:
    """A running mock backend."""

    backend_id: str
    url: str
    control: MockControl
    process: subprocess.Popen[str]


@contextmanager
def mock_backend(backend_id: str, *options: str, port: int = 0) -> Iterator[MockProcess]:
    """Run a mock backend; ``options`` are further arguments of :mod:`mocks.backend`.

    Raises:
        RuntimeError: it did not start; its own message is on stderr.
    """
    command = [sys.executable, "-m", "mocks.backend", "--id", backend_id, "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  (our own module)
        assert process.stdout is not None  # noqa: S101  (a pipe was asked for)
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{backend_id} did not start")
            url = json.loads(line)["url"]
            with MockControl(url, verify=False) as control:
                yield MockProcess(backend_id=backend_id, url=url, control=control, process=process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
