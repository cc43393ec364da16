"""The supervisor over tiny real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.supervise import Child, Program, ProgramFailed, Supervisor

GOOD = "open('{ready}', 'w').close(); signal.pause()"
"""Is ready at once and ends on SIGTERM."""


def a_program(
    directory: Path, name: str, code: str = GOOD, *, needs: tuple[str, ...] = (), orphan: int = signal.SIGKILL
) -> Program:
    """A Python one-liner that is ready when its file is there."""
    ready = directory / f"{name}.ready"

    async def probe() -> str | None:
        return None if ready.exists() else "not there yet"

    preamble = "import os, signal, sys, time, subprocess, pathlib; "
    return Program(
        name=name,
        command=(sys.executable, "-S", "-c", preamble + code.replace("{ready}", str(ready))),
        log=directory / "log" / f"{name}.log",
        probe=probe,
        needs=needs,
        orphan_signal=signal.Signals(orphan),
    )


class Run:
    """A supervisor run whose test decides when it ends."""

    def __init__(self, *programs: Program, start_timeout_s: float = 20, stop_timeout_s: float = 20) -> None:
        self.supervisor = Supervisor(programs, start_timeout_s=start_timeout_s, stop_timeout_s=stop_timeout_s)
        self.stop, self.kill, self.ready = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self.supervisor.run(stop=self.stop, kill=self.kill, on_ready=self.ready.set))

    async def until_ready(self) -> tuple[Child, ...]:
        waiting = asyncio.create_task(self.ready.wait())
        await asyncio.wait([waiting, self.task], return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            await self.task
        return self.supervisor.children


def is_alive(pid: int) -> bool:
    """A process runs, and is not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process does, at most 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


async def test_programs_start_after_what_they_need_and_stop_before_it(tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        f"signal.signal(signal.SIGTERM, lambda *_: (open('{order}', 'a').write('-NAME '), sys.exit())); "
        f"open('{order}', 'a').write('+NAME '); open('{{ready}}', 'w').close(); signal.pause()"
    )
    run = Run(
        a_program(tmp_path, "c", code.replace("NAME", "c"), needs=("b", "elsewhere")),
        a_program(tmp_path, "b", code.replace("NAME", "b"), needs=("a",)),
        a_program(tmp_path, "a", code.replace("NAME", "a")),
    )
    children = await run.until_ready()
    run.stop.set()
    await run.task
    assert order.read_text().split() == ["+a", "+b", "+c", "-c", "-b", "-a"]
    assert not any(is_alive(child.pid) for child in children)


async def test_failure_at_start_names_the_program_and_its_last_lines(tmp_path: Path) -> None:
    run = Run(
        a_program(tmp_path, "good"),
        a_program(
            tmp_path, "bad", "[print('line', n) for n in range(30)]; sys.exit('no such policy')", needs=("good",)
        ),
        a_program(tmp_path, "never", needs=("bad",)),
    )
    with pytest.raises(ProgramFailed) as failed:
        await run.task
    text = str(failed.value)
    assert text.startswith("bad ended with exit code 1 before it was ready. Its last lines in ")
    assert "no such policy" in text
    assert "line 29" in text
    assert "line 5\n" not in text
    assert not run.ready.is_set()
    assert [child.program.name for child in run.supervisor.children] == ["good", "bad"]
    assert not any(is_alive(child.pid) for child in run.supervisor.children)


async def test_command_that_does_not_exist_is_told(tmp_path: Path) -> None:
    program = a_program(tmp_path, "absent")
    missing = Program(name="absent", command=("/no/such/program",), log=program.log, probe=program.probe)
    with pytest.raises(ProgramFailed, match="cannot run /no/such/program: No such file"):
        await Run(missing).task


async def test_program_that_never_becomes_ready_is_told_with_the_reason(tmp_path: Path) -> None:
    run = Run(a_program(tmp_path, "slow", "signal.pause()"), start_timeout_s=0.2)
    with pytest.raises(ProgramFailed, match=r"slow was not ready within 0.2 s \(not there yet\)"):
        await run.task
    assert not any(is_alive(child.pid) for child in run.supervisor.children)


async def test_slow_program_is_waited_for(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists('{go}'), True)]; {GOOD}"
    run = Run(a_program(tmp_path, "slow", code), a_program(tmp_path, "quick"))
    await asyncio.to_thread(until, lambda: run.supervisor.waiting == ("slow",), "slow alone is waited for")
    assert not run.ready.is_set()
    go.touch()
    await run.until_ready()
    run.stop.set()
    await run.task


async def test_death_later_stops_the_rest(tmp_path: Path) -> None:
    run = Run(a_program(tmp_path, "a"), a_program(tmp_path, "b", "print('here I am', flush=True); " + GOOD))
    a, b = await run.until_ready()
    os.kill(b.pid, signal.SIGSEGV)
    with pytest.raises(ProgramFailed, match=r"b was killed by SIGSEGV while running.*\n  here I am"):
        await run.task
    assert not is_alive(a.pid)


async def test_stop_during_the_start_ends_it(tmp_path: Path) -> None:
    run = Run(a_program(tmp_path, "a"), a_program(tmp_path, "b", "signal.pause()"))
    await asyncio.to_thread(until, lambda: run.supervisor.waiting == ("b",), "b alone is waited for")
    run.stop.set()
    await run.task
    assert not run.ready.is_set()
    assert not any(is_alive(child.pid) for child in run.supervisor.children)


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + GOOD


async def test_program_that_ignores_sigterm_is_killed_at_the_deadline(tmp_path: Path) -> None:
    run = Run(a_program(tmp_path, "stubborn", STUBBORN), stop_timeout_s=0.1)
    (child,) = await run.until_ready()
    run.stop.set()
    await run.task
    assert child.exited.result() == -signal.SIGKILL


async def test_second_signal_kills_at_once(tmp_path: Path) -> None:
    run = Run(a_program(tmp_path, "a", STUBBORN), a_program(tmp_path, "b", STUBBORN, needs=("a",)), stop_timeout_s=3600)
    await run.until_ready()
    run.stop.set()
    run.kill.set()
    await run.task
    assert {child.exited.result() for child in run.supervisor.children} == {-signal.SIGKILL}


async def test_what_a_program_leaves_behind_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    sleeper = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    code = (
        f"p = subprocess.Popen([sys.executable, '-S', '-c', '{sleeper}']); "
        f"pathlib.Path('{pid_file}').write_text(str(p.pid)); {GOOD}"
    )
    run = Run(a_program(tmp_path, "parent", code))
    await run.until_ready()
    run.stop.set()
    await run.task
    until(lambda: not is_alive(int(pid_file.read_text())), "the grandchild's end")


async def test_log_of_the_start_before_is_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "a.ready").unlink(missing_ok=True)
        run = Run(a_program(tmp_path, "a", f"print('{text}', flush=True); {GOOD}"))
        await run.until_ready()
        run.stop.set()
        await run.task
    assert (tmp_path / "log" / "a.log").read_text() == "second\n"
    assert (tmp_path / "log" / "a.log.1").read_text() == "first\n"


DRIVER = """
import asyncio, json, signal, sys
from pathlib import Path
from cli.supervise import Supervisor, stop_on
from tests_supervise import STUBBORN, a_program

async def main(directory):
    stop, kill = stop_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    programs = (a_program(directory, "a"), a_program(directory, "b", needs=("a",)), a_program(directory, "s", STUBBORN))
    supervisor = Supervisor(programs, start_timeout_s=20, stop_timeout_s=float(sys.argv[2]))
    say = lambda: print(json.dumps([child.pid for child in supervisor.children]), flush=True)
    await supervisor.run(stop=stop, kill=kill, on_ready=say)

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.fixture
def start_driver(tmp_path: Path) -> Callable[[float], tuple[subprocess.Popen[str], list[int]]]:
    """Starts a supervisor in a process of its own, over three programs, one of them stubborn."""
    (tmp_path / "tests_supervise.py").write_text(Path(__file__).read_text())

    def start(stop_timeout_s: float) -> tuple[subprocess.Popen[str], list[int]]:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), str(stop_timeout_s)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        assert driver.stdout
        return driver, json.loads(driver.stdout.readline())

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_signal_stops_all(
    start_driver: Callable[[float], tuple[subprocess.Popen[str], list[int]]], number: signal.Signals
) -> None:
    driver, pids = start_driver(0.1)
    assert len(pids) == 3
    driver.send_signal(number)
    assert driver.wait(20) == 0
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_killed_supervisor_leaves_nothing(
    start_driver: Callable[[float], tuple[subprocess.Popen[str], list[int]]],
) -> None:
    driver, pids = start_driver(3600)
    assert all(is_alive(pid) for pid in pids)
    driver.kill()
    driver.wait(20)
    until(lambda: not any(is_alive(pid) for pid in pids), "the end of every child")
