"""The programs of one stack on one machine: their commands, environment, needs and readiness."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cli.preflight import PortUse, find_envoy, find_valkey
from cli.readiness import http_ok, sockets_accept, valkey_answers
from cli.supervise import Program
from cli.up_settings import UpSettings
from gateway import names
from gateway.endpoints import READYZ_PATH
from gateway.settings import USAGE_SOCKET, VALKEY_SOCKET, XDS_SOCKET, SettingsError

LOOPBACK: Final = "127.0.0.1"
JOURNAL_DELAY_MS: Final = "500"
"""Until Envoy writes down a request that has ended; what it has not written dies with it."""
ANY_HOSTS: Final = frozenset({"", "0.0.0.0", "::"})
BOOTSTRAP: Final = Path(__file__).parent.parent / "envoy" / "bootstrap.yaml"
ENVOY_LOG_FORMAT: Final = '{"timestamp":"%Y-%m-%dT%T.%fZ","level":"%l","program":"envoy","logger":"%n","event":"%j"}'
MOCK_BACKENDS: Final = ("mock-backend-1", "mock-backend-2")


def reachable(host: str) -> str:
    """Where to connect to reach a listener on ``host`` from this machine."""
    return LOOPBACK if host in ANY_HOSTS else host


def port_uses(settings: UpSettings) -> tuple[PortUse, ...]:
    """Every port that the stack will listen on."""
    mocks = (
        PortUse(variable="MOCK_BACKEND_1_PORT", host=LOOPBACK, port=settings.mock_backend_1_port),
        PortUse(variable="MOCK_BACKEND_2_PORT", host=LOOPBACK, port=settings.mock_backend_2_port),
    )
    return (
        PortUse(variable="HTTP_PORT", host=settings.http_host, port=settings.http_port),
        PortUse(variable="ADMIN_PORT", host=settings.admin_host, port=settings.admin_port),
        PortUse(variable="ENVOY_ADMIN_PORT", host=LOOPBACK, port=settings.envoy_admin_port),
        PortUse(variable="EXTPROC_METRICS_PORT", host=LOOPBACK, port=settings.extproc_metrics_port),
        PortUse(variable="USAGE_METRICS_PORT", host=LOOPBACK, port=settings.usage_metrics_port),
        *(mocks if settings.mocks else ()),
    )


def environment(settings: UpSettings, run_dir: Path) -> Mapping[str, str]:
    """What every program is told; the rest of the environment is inherited."""
    values = {
        "ENVIRONMENT": settings.environment,
        "RUN_DIR": str(run_dir),
        "POLICY_DIR": str(settings.policy_dir.absolute()),
        "HTTP_HOST": settings.http_host,
        "HTTP_PORT": str(settings.http_port),
        "ADMIN_HOST": settings.admin_host,
        "ADMIN_PORT": str(settings.admin_port),
        "ENVOY_ADMIN_ADDRESS": f"{LOOPBACK}:{settings.envoy_admin_port}",
        "EXTPROC_METRICS_PORT": str(settings.extproc_metrics_port),
        "USAGE_METRICS_PORT": str(settings.usage_metrics_port),
        "EXTPROC_WORKERS": str(settings.extproc_workers),
        "REDIS_ADDR": settings.redis_addr or f"unix://{run_dir / VALKEY_SOCKET}",
        "BACKEND_ENDPOINTS": _backend_endpoints(settings),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.key_file:
        values["KEY_FILE"] = str(settings.key_file.absolute())
    return values


def _backend_endpoints(settings: UpSettings) -> str:
    """The endpoints given, and those of mock backends that are not where the sample policy has them."""
    defaults = (
        UpSettings.model_fields["mock_backend_1_port"].default,
        UpSettings.model_fields["mock_backend_2_port"].default,
    )
    ports = (settings.mock_backend_1_port, settings.mock_backend_2_port)
    moved = [
        f"{name}:http://{LOOPBACK}:{port}"
        for name, port, default in zip(MOCK_BACKENDS, ports, defaults, strict=True)
        if settings.mocks and port != default and f"{name}:" not in settings.backend_endpoints
    ]
    return ",".join([*([settings.backend_endpoints] if settings.backend_endpoints else []), *moved])


def programs(settings: UpSettings, run_dir: Path) -> tuple[Program, ...]:
    """The programs of the stack; each starts as soon as what it needs is ready.

    Raises:
        SettingsError: Envoy, its bootstrap or Valkey is not on this machine.
    """
    shared = environment(settings, run_dir)
    valkey = () if settings.redis_addr else (_valkey(run_dir),)
    mocks: tuple[Program, ...] = ()
    if settings.mocks:
        ports = (settings.mock_backend_1_port, settings.mock_backend_2_port)
        mocks = tuple(_mock(run_dir, name, port) for name, port in zip(MOCK_BACKENDS, ports, strict=True))
    return (
        *valkey,
        *mocks,
        _xds(settings, run_dir, shared),
        _extproc(settings, run_dir, shared),
        _usage(settings, run_dir, shared),
        _envoy(settings, run_dir),
    )


def _log(run_dir: Path, name: str) -> Path:
    return run_dir / "log" / f"{name}.log"


def _valkey(run_dir: Path) -> Program:
    """On a unix socket only; keys and counters survive a restart."""
    data = run_dir / "valkey"
    data.mkdir(exist_ok=True)
    path = run_dir / VALKEY_SOCKET
    keep = ("--dir", str(data), "--save", "", "--appendonly", "yes")
    return Program(
        name="valkey",
        command=(find_valkey(), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700", *keep),
        log=_log(run_dir, "valkey"),
        probe=valkey_answers(path),
        address=str(path),
    )


def _mock(run_dir: Path, name: str, port: int) -> Program:
    return Program(
        name=name,
        command=(sys.executable, "-m", "mocks.backend", "--host", LOOPBACK, "--port", str(port), "--id", name),
        log=_log(run_dir, name),
        probe=http_ok(LOOPBACK, port, "/health"),
        address=f"http://{LOOPBACK}:{port}",
    )


def _xds(settings: UpSettings, run_dir: Path, shared: Mapping[str, str]) -> Program:
    return Program(
        name="xds",
        command=(sys.executable, "-m", "xds"),
        log=_log(run_dir, "xds"),
        probe=sockets_accept(run_dir / XDS_SOCKET),
        address=f"http://{reachable(settings.admin_host)}:{settings.admin_port}",
        environment=shared,
    )


def _extproc(settings: UpSettings, run_dir: Path, shared: Mapping[str, str]) -> Program:
    sockets = tuple(run_dir / settings.worker_socket(worker) for worker in range(settings.extproc_workers))
    return Program(
        name="extproc",
        command=(sys.executable, "-m", "extproc"),
        log=_log(run_dir, "extproc"),
        probe=sockets_accept(*sockets),
        needs=("valkey",),
        address=f"{run_dir}/extproc-*.sock ({settings.extproc_workers} workers)",
        environment=shared,
        orphan_signal=signal.SIGTERM,  # it ends its own workers
    )


def _usage(settings: UpSettings, run_dir: Path, shared: Mapping[str, str]) -> Program:
    return Program(
        name="usage",
        command=(sys.executable, "-m", "usage"),
        log=_log(run_dir, "usage"),
        probe=sockets_accept(run_dir / USAGE_SOCKET),
        needs=("valkey",),
        address=str(run_dir / USAGE_SOCKET),
        environment=shared,
    )


def _envoy(settings: UpSettings, run_dir: Path) -> Program:
    """Ready when the whole way of a request is."""
    bootstrap = Path(settings.envoy_bootstrap).absolute() if settings.envoy_bootstrap else BOOTSTRAP
    if not bootstrap.is_file():
        raise SettingsError(f"ENVOY_BOOTSTRAP: {bootstrap} is not a file")
    admin = {"socket_address": {"address": LOOPBACK, "port_value": settings.envoy_admin_port}}
    host = reachable(settings.http_host)
    return Program(
        name="envoy",
        command=(
            find_envoy(settings.envoy_binary),
            *("-c", str(bootstrap)),
            *("--config-yaml", json.dumps({"admin": {"address": admin}})),
            *("--service-node", names.NODE_ID, "--service-cluster", names.NODE_ID),
            *("--concurrency", str(settings.envoy_concurrency)),
            *("--log-level", settings.envoy_log_level, "--log-format", ENVOY_LOG_FORMAT),
            *("--component-log-level", "misc:error"),  # a warning for each extension that is still new
            "--disable-hot-restart",
            *("--file-flush-interval-msec", JOURNAL_DELAY_MS),
        ),
        log=_log(run_dir, "envoy"),
        probe=http_ok(host, settings.http_port, READYZ_PATH),
        needs=("xds", "extproc", "usage", *MOCK_BACKENDS),
        address=f"http://{host}:{settings.http_port}",
        directory=run_dir,
    )
