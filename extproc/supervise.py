"""The workers' supervisor: starts them, starts a dead one again, stops them together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from gateway.settings import ExtprocSettings
from gateway.telemetry import Logger

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STEADY_AFTER_S = 10.0
CANNOT_START = 2
"""Exit code of a worker whose settings or policy cannot be used: starting it again would not help."""


class WorkersCannotStart(Exception):
    """A worker said that its settings cannot be used; its log has the reason."""


class Workers:
    """N worker processes, each with its own socket."""

    def __init__(self, settings: ExtprocSettings, *, metrics_dir: Path, log: Logger) -> None:
        self._settings = settings
        self._metrics_dir = metrics_dir
        self._log = log
        self._alive: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = False

    @property
    def alive(self) -> int:
        """How many worker processes run now."""
        return len(self._alive)

    async def run(self) -> None:
        """Keep every worker running until :meth:`stop`.

        Raises:
            ExceptionGroup of WorkersCannotStart: the settings or the policy cannot be used.
        """
        async with asyncio.TaskGroup() as tasks:
            for worker in range(self._settings.extproc_workers):
                tasks.create_task(self._keep(worker))

    async def stop(self) -> None:
        """Drain every worker; one that takes longer than it may is killed."""
        self._stopping = True
        processes = list(self._alive.values())
        for process in processes:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s + 5):
                await asyncio.gather(*(process.wait() for process in processes))
        except TimeoutError:
            for process in self._alive.values():
                process.kill()

    async def _keep(self, worker: int) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_FIRST_S
        while not self._stopping:
            started_s = loop.time()
            code = await self._run_once(worker)
            if self._stopping:
                return
            self._log.error("worker_died", worker=worker, exit_code=code)
            if code == CANNOT_START:
                raise WorkersCannotStart(f"worker {worker} cannot start")
            backoff_s = (
                BACKOFF_FIRST_S if loop.time() - started_s > STEADY_AFTER_S else min(backoff_s * 2, BACKOFF_MAX_S)
            )
            await asyncio.sleep(backoff_s)

    async def _run_once(self, worker: int) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "extproc",
            "--worker",
            str(worker),
            # Its end tells the worker that nobody supervises it any more.
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics_dir)},
        )
        self._alive[worker] = process
        try:
            return await process.wait()
        finally:
            del self._alive[worker]
            mark_process_dead(process.pid, str(self._metrics_dir))  # type: ignore[no-untyped-call]
