"""The command: start the four, check that each answers rightly, load them in turn, say what came out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import click
import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench import backend, contestants, machine, report
from bench.contestants import ENVOY, ROOT, Contestant
from bench.keys import write_key
from bench.load import BODY, MODEL, PATH, LoadFailed, Sample, measure
from tests.harness.process import eventually

CONNECTIONS: Final = (report.ONE, report.MANY)
WARM_UP_S: Final = 1
TURNS: Final = 20
_PACKAGES: Final = ("grpcio", "uvloop", "protobuf")


class CannotMeasure(Exception):
    """Something does not answer as it should; the text has the logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how often."""

    rounds: int
    seconds: int
    workers: int
    threads: int


def _missing() -> list[str]:
    """What this machine lacks, each with the way to get it."""
    found = []
    if sys.platform != "linux":
        found.append("Linux: memory and processor time are read from /proc")
    if not ENVOY.exists():
        found.append("Envoy: run `make bench`, or pip install '.[dev]'")
    if not backend.binary():
        found.append("nginx: apt-get install nginx-light")
    if not shutil.which("wrk"):
        found.append("wrk: apt-get install wrk")
    return found


@contextlib.contextmanager
def _started(plan: Plan) -> Iterator[tuple[list[Contestant], str]]:
    """All four, running, and the key they are asked with. Idle ones take next to no processor time."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp")))
        for name in ("nginx", "a", "b", "c", "d"):
            (directory / name).mkdir()
        key = write_key(directory / "keys.yaml")
        nginx = stack.enter_context(backend.running_backend(directory / "nginx"))
        threads, workers = plan.threads, plan.workers
        direct = contestants.envoy_direct(directory / "a", nginx, threads=threads)
        idle = contestants.envoy_do_nothing(directory / "b", nginx, threads=threads, workers=workers)
        routers = [
            contestants.router(
                directory / name,
                nginx,
                threads=threads,
                workers=workers,
                model=MODEL,
                key_file=directory / "keys.yaml",
                limited=limited,
            )
            for name, limited in (("c", False), ("d", True))
        ]
        yield [stack.enter_context(each) for each in (direct, idle, *routers)], key


def _ask(contestant: Contestant, key: str) -> httpx.Response | None:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        return httpx.post(contestant.url + PATH, content=BODY, headers=headers, trust_env=False, timeout=10)
    except httpx.TransportError:
        return None


def _check(contestant: Contestant, key: str, workers: int) -> None:
    """Wait until the contestant answers as it should, so that no error page is measured.

    Raises:
        AssertionError: it does not.
    """

    def answers() -> bool:
        # Often enough in a row that every worker and every Envoy thread has had its turn.
        responses = [_ask(contestant, key) for _ in range(TURNS * workers)]
        return all(response is not None and response.status_code == 200 for response in responses)

    eventually(answers, f"{contestant.name} answers 200")
    if contestant.letter != "A":
        eventually(lambda: len(contestant.worker_pids()) == workers, f"{contestant.name} has {workers} workers")
    if contestant.letter in {"C", "D"}:
        good, bad = _ask(contestant, key), _ask(contestant, "rk-unknown")
        assert good is not None, "the router does not answer"
        assert good.json()["object"] == "chat.completion", "the router does not give the backend's answer"
        assert "x-routing-backend" in good.headers, "the router does not name a backend"
        limits = "x-ratelimit-remaining-tokens" in good.headers
        assert limits == (contestant.letter == "D"), "the router does not tell of its limits, or of limits it has not"
        assert bad is not None, "the router does not answer"
        assert bad.status_code == 401, "the router does not check keys"


def _measure(plan: Plan, running: Sequence[Contestant], key: str, console: Console) -> list[Sample]:
    """Rounds of A B C D at one connection, then A B C D at many."""
    samples = []
    steps = (plan.rounds + 1) * len(running) * len(CONNECTIONS)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps)
        for number in range(plan.rounds + 1):
            for connections in CONNECTIONS:
                for contestant in running:
                    named = f"round {number} of {plan.rounds}" if number else "warm-up"
                    progress.update(task, description=f"{named}, {contestant.name}, {connections} connections")
                    seconds = plan.seconds if number else min(WARM_UP_S, plan.seconds)
                    sample = measure(contestant, key=key, connections=connections, seconds=seconds, number=number)
                    samples += [sample] if number else []
                    progress.advance(task)
    return samples


def _memory(running: Sequence[Contestant]) -> report.MemoryOf:
    return {each.letter: {name: machine.memory(pid) for name, pid in each.pids().items()} for each in running}


def _alone(script: str) -> dict[str, float]:
    """Figures of a part measured by itself, in a process of its own."""
    command = [sys.executable, str(ROOT / "bench" / script), "--json"]
    measured: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return measured


def _first_line(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout + run.stderr).strip().splitlines()[0]


def _about(plan: Plan) -> dict[str, Any]:
    """What it was measured with."""
    return {
        "cores": machine.cores(),
        "rounds_each": plan.rounds,
        "seconds_each": plan.seconds,
        "workers": plan.workers,
        "envoy_threads": plan.threads,
        "body_bytes": len(BODY),
        "load_average": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            "envoy": _first_line(str(ENVOY), "--version").rpartition("version: ")[2].split("/")[1],
            "nginx": _first_line(str(backend.binary()), "-v").rpartition("/")[2],
            "wrk": _first_line("wrk", "-v").split()[1],
            "linux": platform.release(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def _say_about(console: Console, about: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    console.print(
        f"{about['cores']} cores shared by wrk, Envoy, workers and nginx; load average before: "
        f"{about['load_average'][0]:.1f}. {about['rounds_each']} rounds of {about['seconds_each']} s, "
        f"{about['workers']} workers, {about['envoy_threads']} Envoy threads, body of {about['body_bytes']} bytes.",
        versions,
        sep="\n",
        highlight=False,
    )


def _bench(plan: Plan, console: Console) -> tuple[list[Sample], report.MemoryOf, dict[str, str]]:
    with _started(plan) as (running, key):
        try:
            with console.status("starting Envoy four times, the workers, xds and nginx"):
                for contestant in running:
                    _check(contestant, key, plan.workers)
            samples = _measure(plan, running, key, console)
        except (AssertionError, LoadFailed) as error:
            logs = "\n".join(contestant.logs() for contestant in running)
            raise CannotMeasure(f"{error}\n{logs}") from error
        return samples, _memory(running), {each.letter: each.name for each in running}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=click.IntRange(1, 60), default=4, show_default=True, help="Of each measurement.")
@click.option("--workers", type=click.IntRange(1, 64), default=machine.cores(), help="[default: cores]")
@click.option("--threads", type=click.IntRange(1), default=machine.cores(), help="Of each Envoy.  [default: cores]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
@click.option("--quick", is_flag=True, help="Three rounds of one second: a look, not a measurement.")
def main(*, rounds: int, seconds: int, workers: int, threads: int, json_path: Path | None, quick: bool) -> None:
    """Measure the router beside Envoy alone and Envoy with an ext_proc that does nothing."""
    missing = _missing()
    if missing:
        click.echo("bench needs what is not here:\n  " + "\n  ".join(missing), err=True)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console() if sys.stdout.isatty() else Console(width=150)
    plan = Plan(rounds=3 if quick else rounds, seconds=1 if quick else seconds, workers=workers, threads=threads)
    about = _about(plan)
    _say_about(console, about)
    try:
        samples, memory, names = _bench(plan, console)
    except CannotMeasure as error:
        click.echo(f"bench: {error}", err=True)
        sys.exit(1)
    with console.status("the router's own Python and the limit store, each by itself"):
        hot_path, limits = _alone("hot_path.py"), _alone("limits.py")
    report.show(console, samples, memory, hot_path=hot_path, limits=limits, contestants=names)
    if json_path:
        json_path.write_text(json.dumps(report.document(samples, memory, hot_path, limits, about), indent=2) + "\n")
