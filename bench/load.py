"""Load by wrk: one fixed chat completion, over and over, on kept-alive connections."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import machine
from bench.contestants import Contestant

PATH: Final = "/v1/chat/completions"
MODEL: Final = "gpt-4o"
BODY: Final = json.dumps(
    {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a concise assistant for a support team. Answer in one paragraph."},
            {"role": "user", "content": "Our nightly export failed with exit code 137. What does it mean, and where "
                                        "should we look first? The job runs in a container with a limit of 2 GiB."},
        ],
        "temperature": 0.2,
        "max_tokens": 256,
    }
)  # fmt: skip
_SCRIPT: Final = Path(__file__).with_name("chat.lua")
_WAIT_S: Final = 20.0


class LoadFailed(Exception):
    """wrk did not run, or not every request was answered by 200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one run of wrk measured. Processor time is per request, of all workers together.

    ``other_cores`` is how many cores programs that have no part in it used meanwhile: the noise.
    """

    contestant: str
    round: int
    connections: int
    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    envoy_cpu_us: float
    workers_cpu_us: float
    other_cores: float
    not_2xx: int
    socket_errors: int
    timeouts: int


def measure(contestant: Contestant, *, key: str, connections: int, seconds: int, number: int) -> Sample:
    """Load one contestant for ``seconds``; ``number`` is the round's.

    Raises:
        LoadFailed: some request was not answered by 2xx; a figure made of errors is none.
    """
    before = _used_s(contestant)
    said = _wrk(contestant.url, key=key, connections=connections, seconds=seconds)
    envoy_s, workers_s, other_s, elapsed_s = (now - then for now, then in zip(_used_s(contestant), before, strict=True))
    requests = said["requests"]
    if not requests or said["not_2xx"] or said["socket_errors"] or said["timeouts"]:
        raise LoadFailed(f"{contestant.letter} ({contestant.name}) at {connections} connections: {said}")
    return Sample(
        contestant=contestant.letter,
        round=number,
        connections=connections,
        requests=requests,
        requests_per_s=requests / (said["duration_us"] / 1e6),
        p50_ms=said["p50_us"] / 1e3,
        p99_ms=said["p99_us"] / 1e3,
        envoy_cpu_us=envoy_s / requests * 1e6,
        workers_cpu_us=workers_s / requests * 1e6,
        other_cores=max(0.0, other_s / elapsed_s),
        not_2xx=said["not_2xx"],
        socket_errors=said["socket_errors"],
        timeouts=said["timeouts"],
    )


def _used_s(contestant: Contestant) -> tuple[float, float, float, float]:
    """Processor time so far of Envoy, of the workers and of programs that take no part; then the clock."""
    envoy, workers = machine.cpu_s(contestant.envoy_pids()), machine.cpu_s(contestant.worker_pids())
    ours = machine.cpu_s({*contestant.pids().values(), contestant.backend.pid}) + machine.ended_children_s()
    return envoy, workers, machine.busy_s() - ours, time.monotonic()


def _wrk(url: str, *, key: str, connections: int, seconds: int) -> dict[str, int]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "5s", "-s", str(_SCRIPT), url + PATH]
    environ = {**os.environ, "BENCH_BODY": BODY, "BENCH_KEY": key}
    try:
        run = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=seconds + _WAIT_S, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise LoadFailed(f"{error}\n{error.stdout!r} {error.stderr!r}") from error
    said: dict[str, int] = json.loads(run.stdout.strip().splitlines()[-1])
    return said
