"""``router up``: start the whole stack on this machine, say what runs, stop all of it at the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click

from cli import preflight, stack
from cli.supervise import ProgramFailed, Supervisor, stop_on
from cli.up_settings import UpSettings
from gateway.settings import read

DEVELOPMENT_KEY: Final = "dev-key"
PROGRESS_S: Final = 0.25
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="When ready, print one line of JSON instead.")
@click.option("--verbose", is_flag=True, help="Show the programs' output too.")
def up(*, as_json: bool, verbose: bool) -> None:
    """Start everything on this machine: Envoy, xds, extproc, usage, Valkey and two mock backends.

    Ctrl-C stops it. Every port and path is a setting: see configs/router.sample.yaml.
    """
    settings = read(UpSettings)
    run_dir = preflight.run_directory(settings.run_dir)
    if run_dir != settings.run_dir.absolute():
        _say(f"RUN_DIR: the path is too long for unix sockets; using {run_dir}")
    with preflight.run_lock(run_dir):
        preflight.check_ports(stack.port_uses(settings))
        _raise_file_limit()
        try:
            asyncio.run(_run(settings, run_dir, as_json=as_json, verbose=verbose))
        except ProgramFailed as error:
            _say(f"router: {error}")
            sys.exit(1)


async def _run(settings: UpSettings, run_dir: Path, *, as_json: bool, verbose: bool) -> None:
    began = time.monotonic()
    programs = stack.programs(settings, run_dir)
    supervisor = Supervisor(programs, start_timeout_s=settings.start_timeout_s, stop_timeout_s=settings.stop_timeout_s)
    stop, kill = stop_on(*SIGNALS)
    with ExitStack() as progress:
        beside: list[asyncio.Task[None]] = []
        if verbose:
            beside.append(asyncio.create_task(_follow([program.log for program in programs])))
        elif sys.stderr.isatty():
            beside.append(asyncio.create_task(_show_progress(supervisor, progress)))

        def on_ready() -> None:
            progress.close()
            report = _report(settings, supervisor, seconds=time.monotonic() - began)
            _say(json.dumps(report) if as_json else _as_text(report), to_stdout=True)

        try:
            await supervisor.run(stop=stop, kill=kill, on_ready=on_ready)
        finally:
            for task in beside:
                task.cancel()
    _say("stopped")


def _report(settings: UpSettings, supervisor: Supervisor, *, seconds: float) -> dict[str, Any]:
    """What runs and how to use it, for people and for programs."""
    base = f"http://{stack.reachable(settings.http_host)}:{settings.http_port}"
    admin = f"http://{stack.reachable(settings.admin_host)}:{settings.admin_port}"
    return {
        "event": "ready",
        "seconds": round(seconds, 2),
        "programs": [
            {
                "name": child.program.name,
                "address": child.program.address,
                "pid": child.pid,
                "log": str(child.program.log),
            }
            for child in supervisor.children
        ],
        "urls": {
            "public": base,
            "ready": f"{base}/v1/status/readyz",
            "admin": admin,
            "envoy admin": f"http://{stack.LOOPBACK}:{settings.envoy_admin_port}",
            "extproc metrics": f"http://{stack.LOOPBACK}:{settings.extproc_metrics_port}/metrics",
            "usage metrics": f"http://{stack.LOOPBACK}:{settings.usage_metrics_port}/metrics",
        },
        "try": list(_curls(base, development=settings.environment == "development")),
    }


def _curls(base: str, *, development: bool) -> Iterator[str]:
    """Three requests that work as pasted: inference, chat, streaming chat."""
    key = f"'X-API-Key: {DEVELOPMENT_KEY}'" if development else '"X-API-Key: $API_KEY"'
    chat = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
    asks = (
        ("", "/v1/inference", {"request_id": str(uuid.uuid4()), "model": "gpt-4o", "payload": "Hello"}),
        ("", "/v1/chat/completions", chat),
        ("-N ", "/v1/chat/completions", chat | {"stream": True}),
    )
    for options, path, body in asks:
        data = shlex.quote(json.dumps(body))
        yield f"curl -sS {options}{base}{path} -H {key} -H 'Content-Type: application/json' -d {data}"


def _as_text(report: dict[str, Any]) -> str:
    rows = [("program", "address", "pid", "log")]
    rows += [(p["name"], p["address"], str(p["pid"]), p["log"]) for p in report["programs"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    urls = [f"{name:16} {url}" for name, url in report["urls"].items()]
    ready = f"Ready in {report['seconds']} s. Ctrl-C stops everything."
    return "\n".join([*table, "", *report["try"], "", *urls, "", ready])


async def _show_progress(supervisor: Supervisor, progress: ExitStack) -> None:
    """Name what is being waited for, on a terminal, until ``progress`` is closed."""
    from rich.console import Console

    status = progress.enter_context(Console(stderr=True).status("starting"))
    while supervisor.waiting:
        status.update(f"waiting for {', '.join(supervisor.waiting)}")
        await asyncio.sleep(PROGRESS_S)


async def _follow(logs: list[Path]) -> None:
    """Copy what is added to the logs to stderr, each line behind its program's name."""
    width = max(len(log.stem) for log in logs)
    offsets = dict.fromkeys(logs, 0)
    while True:
        for log in logs:
            with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
                file.seek(offsets[log])
                lines, newline, _ = file.read().rpartition(b"\n")
                offsets[log] += len(lines) + len(newline)
                for line in lines.decode(errors="replace").splitlines():
                    _say(f"{log.stem:{width}} | {line}")
        await asyncio.sleep(PROGRESS_S)


def _raise_file_limit() -> None:
    """As many open files as we are allowed: each connection takes some in Envoy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _say(text: str, *, to_stdout: bool = False) -> None:
    """Print; a terminal or pipe that has gone away must not keep us from stopping what runs."""
    with contextlib.suppress(OSError):
        click.echo(text, err=not to_stdout)
