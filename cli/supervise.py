"""Start programs in the order of their needs, watch them, stop them in reverse. Knows no program by name.

Each runs in a session of its own, so that Ctrl-C reaches the supervisor alone, and on a leash
(:mod:`cli.leash`), so that it dies with it. Its output goes to its log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cli import leash
from cli.readiness import Probe

POLL_S: Final = 0.02
TAIL_LINES: Final = 20
TAIL_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program to run."""

    name: str
    command: tuple[str, ...]
    log: Path
    probe: Probe
    needs: tuple[str, ...] = ()
    """Programs that must be ready before this one starts; names of programs not there are ignored."""
    address: str = ""
    """Where it answers, for people."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Besides the supervisor's own."""
    directory: Path | None = None
    orphan_signal: signal.Signals = signal.SIGKILL
    """Sent by the kernel when the supervisor dies; SIGTERM for a program that has processes of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A program that was started."""

    program: Program
    pid: int
    exited: asyncio.Task[int]


class ProgramFailed(Exception):
    """A program did not become ready, or ended by itself; the text has its last log lines."""

    def __init__(self, program: Program, why: str) -> None:
        lines = "".join(f"\n  {line}" for line in last_lines(program.log)) or " (none)"
        super().__init__(f"{program.name} {why}. Its last lines in {program.log}:{lines}")


def last_lines(log: Path, count: int = TAIL_LINES) -> list[str]:
    """Last lines of a log file, as many as there are."""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_MAX_BYTES))
        return file.read().decode(errors="replace").splitlines()[-count:]
    return []


def stop_on(*signals: signal.Signals) -> tuple[asyncio.Event, asyncio.Event]:
    """Events of the running loop: ``stop``, set by the first of the signals, and ``kill``, by the next."""
    stop, kill = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (kill if stop.is_set() else stop).set()

    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, kill


class Supervisor:
    """A set of programs, from their start to their end."""

    def __init__(self, programs: Iterable[Program], *, start_timeout_s: float, stop_timeout_s: float) -> None:
        self._programs = {program.name: program for program in programs}
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._ready = {name: asyncio.Event() for name in self._programs}
        self._children: dict[str, Child] = {}
        self._failed: asyncio.Future[ProgramFailed] = asyncio.get_running_loop().create_future()
        self._stopping = False

    @property
    def children(self) -> tuple[Child, ...]:
        """The programs started, in the order given."""
        return tuple(self._children[name] for name in self._programs if name in self._children)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the programs that are not ready."""
        return tuple(name for name, ready in self._ready.items() if not ready.is_set())

    async def run(self, *, stop: asyncio.Event, kill: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Start all, call ``on_ready``, and stop all when ``stop`` is set or one fails; ``kill`` hurries the end.

        Raises:
            ProgramFailed: one did not become ready in time or ended by itself; nothing runs any more.
        """
        starting: asyncio.Future[Any] = asyncio.ensure_future(self._start())
        stopped: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([starting, self._failed, stopped], return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and not starting.exception() and not self._failed.done() and not stop.is_set():
                on_ready()
                await asyncio.wait([self._failed, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping = True
            for task in (starting, stopped):
                task.cancel()
            results = await asyncio.gather(starting, return_exceptions=True)
            await self._stop(kill)
        if self._failed.done():
            raise self._failed.result()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _start(self) -> None:
        await _all(self._bring_up(program) for program in self._programs.values())

    async def _bring_up(self, program: Program) -> None:
        for name in program.needs:
            if name in self._ready:
                await self._ready[name].wait()
        child = await self._spawn(program)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_s
        while why := await program.probe():
            if loop.time() > deadline:
                self._fail(program, f"was not ready within {self._start_timeout_s:g} s ({why})")
            if child.exited.done() or self._failed.done():
                return
            await asyncio.wait([child.exited], timeout=POLL_S)
        self._ready[program.name].set()

    async def _spawn(self, program: Program) -> Child:
        program.log.parent.mkdir(parents=True, exist_ok=True)
        if program.log.exists():
            program.log.replace(program.log.with_name(f"{program.log.name}.1"))
        with program.log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", leash.__file__, str(os.getpid()), str(int(program.orphan_signal))),
                *program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=program.directory,
                # Unbuffered, so that a log has its lines in the order they were printed.
                env={**os.environ, "PYTHONUNBUFFERED": "1", **program.environment},
                start_new_session=True,
            )
        exited = asyncio.create_task(process.wait())
        child = Child(program=program, pid=process.pid, exited=exited)
        self._children[program.name] = child
        exited.add_done_callback(lambda task: self._ended(child, task))
        return child

    def _ended(self, child: Child, task: asyncio.Task[int]) -> None:
        if task.cancelled() or self._stopping:
            return
        how = "before it was ready" if child.program.name in self.waiting else "while running"
        self._fail(child.program, f"{_exit_text(task.result())} {how}")

    def _fail(self, program: Program, why: str) -> None:
        if not self._failed.done():
            self._failed.set_result(ProgramFailed(program, why))

    async def _stop(self, kill: asyncio.Event) -> None:
        """Stop each program when those that need it have ended."""
        ended = {name: asyncio.Event() for name in self._children}
        killed: asyncio.Future[Any] = asyncio.ensure_future(kill.wait())

        async def take_down(child: Child) -> None:
            for other in self._children.values():
                if child.program.name in other.program.needs:
                    await ended[other.program.name].wait()
            if not child.exited.done():
                _signal(child.pid, signal.SIGTERM)
                await asyncio.wait(
                    [child.exited, killed], timeout=self._stop_timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
            _signal_group(child.pid, signal.SIGKILL)
            await child.exited
            ended[child.program.name].set()

        try:
            await _all(take_down(child) for child in self._children.values())
        finally:
            killed.cancel()


async def _all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for coroutine in coroutines:
            group.create_task(coroutine)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_group(pid: int, number: signal.Signals) -> None:
    """To a program and whatever it has left behind; after its end the group has a number while it has members."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _exit_text(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
