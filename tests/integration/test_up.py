"""``router up`` with everything it starts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

pytestmark = [pytest.mark.integration, pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")]

PORTS = (
    "HTTP_PORT",
    "ADMIN_PORT",
    "ENVOY_ADMIN_PORT",
    "EXTPROC_METRICS_PORT",
    "USAGE_METRICS_PORT",
    "MOCK_BACKEND_1_PORT",
    "MOCK_BACKEND_2_PORT",
)
PROGRAMS = ["valkey", "mock-backend-1", "mock-backend-2", "xds", "extproc", "usage", "envoy"]
START_S = 90


@pytest.fixture
def run_dir() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="up-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


def an_environment(run_dir: Path, **settings: str) -> dict[str, str]:
    """Free ports and a run directory; settings of the caller's shell do not count."""
    with ExitStack() as open_sockets:
        servers = [open_sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        ports = {name: str(server.getsockname()[1]) for name, server in zip(PORTS, servers, strict=True)}
    plain = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return plain | ports | {"RUN_DIR": str(run_dir), "HTTP_HOST": "127.0.0.1", "EXTPROC_WORKERS": "1"} | settings


def router_up(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "up", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


@contextmanager
def running(environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A stack that is ready, and its report."""
    with router_up(environment) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"router up did not start: {process.communicate()[1]}")
            yield process, json.loads(line)
        finally:
            process.terminate()
            process.communicate(timeout=START_S)


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of the processes that were told this run directory."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if f"RUN_DIR={run_dir}\0".encode() in (directory / "environ").read_bytes():
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def chat(environment: dict[str, str]) -> httpx.Response:
    return httpx.post(
        f"http://127.0.0.1:{environment['HTTP_PORT']}/v1/chat/completions",
        headers={"x-api-key": "dev-key"},
        json={"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]},
        trust_env=False,
    )


def test_what_it_prints_works_and_sigterm_leaves_nothing(run_dir: Path) -> None:
    environment = an_environment(run_dir)
    with running(environment) as (process, report):
        assert [program["name"] for program in report["programs"]] == PROGRAMS
        assert all(Path(program["log"]).is_file() for program in report["programs"])
        for name in ("ready", "extproc metrics", "usage metrics", "envoy admin"):
            assert httpx.get(report["urls"][name], trust_env=False).status_code == 200
        assert len(report["try"]) == 3
        for command in report["try"]:
            shown = shlex.split(command)
            assert shown[0] == "curl"
            if shutil.which("curl"):
                pasted = f"{command} -o /dev/null -w '%{{http_code}}'"
                status = subprocess.run(pasted, shell=True, capture_output=True, check=True)
                assert status.stdout == b"200"

        refused = router_up(environment)
        _, complaint = refused.communicate(timeout=START_S)
        assert refused.returncode == 2
        assert f"a router already runs in {run_dir} (process {process.pid})" in complaint

        with redis.Redis(unix_socket_path=str(run_dir / "valkey.sock")) as store:
            store.set("kept", "yes")
        process.terminate()
        _, said = process.communicate(timeout=START_S)
        assert process.returncode == 0
        assert said == "stopped\n"
        assert processes_of(run_dir) == []
    with running(environment):
        with redis.Redis(unix_socket_path=str(run_dir / "valkey.sock")) as store:
            assert store.get("kept") == b"yes"
        assert chat(environment).status_code == 200


def test_two_stacks_run_side_by_side_and_each_dies_alone(run_dir: Path) -> None:
    first, second = an_environment(run_dir / "1"), an_environment(run_dir / "2")
    with running(first) as (process, report), running(second):
        for environment in (first, second):
            answer = chat(environment)
            assert answer.status_code == 200
        with httpx.Client(base_url=f"http://127.0.0.1:{first['MOCK_BACKEND_1_PORT']}", trust_env=False) as one:
            one_total = one.get("/__requests/count").json()["total"]
        with httpx.Client(base_url=f"http://127.0.0.1:{first['MOCK_BACKEND_2_PORT']}", trust_env=False) as two:
            assert one_total + two.get("/__requests/count").json()["total"] == 1

        envoy = next(program["pid"] for program in report["programs"] if program["name"] == "envoy")
        os.kill(envoy, signal.SIGKILL)
        _, said = process.communicate(timeout=START_S)
        assert process.returncode == 1
        assert "envoy was killed by SIGKILL while running" in said
        assert processes_of(run_dir / "1") == []
        assert chat(second).status_code == 200


def test_killed_supervisor_leaves_nothing(run_dir: Path) -> None:
    with running(an_environment(run_dir)) as (process, _):
        assert len(processes_of(run_dir)) >= len(PROGRAMS) + 1
        process.kill()
        until(lambda: processes_of(run_dir) == [], "the end of every program")


def test_policy_that_cannot_be_used_is_told_with_file_and_line(run_dir: Path) -> None:
    policies = run_dir / "policies"
    policies.mkdir()
    (policies / "bad.yaml").write_text("backends:\n  - id: a\n    uri: http://127.0.0.1:1\n    nonsense: 1\n")
    process = router_up(an_environment(run_dir, POLICY_DIR=str(policies)))
    _, said = process.communicate(timeout=START_S)
    assert process.returncode == 1
    assert "before it was ready" in said
    assert "bad.yaml:4" in said
    assert processes_of(run_dir) == []


def test_taken_port_is_told_before_anything_starts(run_dir: Path) -> None:
    environment = an_environment(run_dir)
    with socket.create_server(("127.0.0.1", int(environment["ENVOY_ADMIN_PORT"]))):
        process = router_up(environment)
        _, said = process.communicate(timeout=START_S)
    assert process.returncode == 2
    assert f"ENVOY_ADMIN_PORT: port {environment['ENVOY_ADMIN_PORT']} on 127.0.0.1: address already in use" in said
    assert not (run_dir / "log").exists()
