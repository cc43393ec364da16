"""What docker-compose.yml, the Dockerfile and their health checks promise; no engine needed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.settings import CommonSettings, ExtprocSettings, UsageSettings, XdsSettings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = ("extproc", "xds", "usage", "mock-backend-1", "mock-backend-2")
LATER = {"KAFKA_BROKERS", "BUDGET_SERVICE_ENDPOINT"}
"""Told to the programs for what they do not have yet."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def in_force(value: str) -> str:
    """A value where nothing is set in the environment."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def environment(name: str) -> dict[str, Any]:
    """Variables of a service: None is passed through from the environment if set there."""
    found: dict[str, Any] = SERVICES[name].get("environment", {})
    return found


def test_the_services_are_those_of_the_router() -> None:
    assert set(SERVICES) == {"envoy", "redis", "kafka", *OURS}


@each_service
def test_no_service_can_do_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "userns_mode", "devices"}
    assert "docker.sock" not in yaml.safe_dump(service)


@each_service
def test_every_service_has_a_health_check_without_a_shell(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


@each_service
def test_every_image_is_built_here_or_pinned(name: str) -> None:
    service = SERVICES[name]
    assert ("build" in service) == (name in OURS)
    if name not in OURS:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"])


@each_service
def test_no_service_is_given_a_secret(name: str) -> None:
    given = {variable: value for variable, value in environment(name).items() if SECRET.search(variable)}
    assert all(value is None or in_force(str(value)) == "" for value in given.values()), given
    assert "env_file" not in SERVICES[name]


@each_service
def test_ports_are_published_on_loopback_only_and_can_be_moved(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+_PORT:-(\d+)\}:\1", port)


def test_what_is_published_is_the_listener_the_admin_api_and_the_mocks() -> None:
    published = {int(in_force(p).split(":")[1]) for s in SERVICES.values() for p in s.get("ports", [])}
    assert published == {8080, 8081, 8001, 8002}


@each_service
def test_a_service_waits_until_what_it_needs_is_healthy(name: str) -> None:
    needs = SERVICES[name].get("depends_on", {})
    assert all(needed in SERVICES and how == {"condition": "service_healthy"} for needed, how in needs.items())
    assert "kafka" not in needs  # the router serves without the broker


def test_programs_that_share_sockets_are_one_user() -> None:
    sharing = {name: s["user"] for name, s in SERVICES.items() if "run:/run/router" in s.get("volumes", [])}
    assert sharing == dict.fromkeys(("envoy", "extproc", "xds", "usage"), "10001:10001")
    assert "uid=10001,gid=10001,mode=0770" in COMPOSE["volumes"]["run"]["driver_opts"]["o"]
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)


def test_xds_and_extproc_agree_on_the_number_of_workers() -> None:
    assert environment("xds")["EXTPROC_WORKERS"] == environment("extproc")["EXTPROC_WORKERS"]


def test_usage_settles_in_the_store_that_extproc_admits_with() -> None:
    assert environment("usage")["REDIS_ADDR"] == environment("extproc")["REDIS_ADDR"]


@pytest.mark.parametrize(
    ("name", "settings"), [("extproc", ExtprocSettings), ("xds", XdsSettings), ("usage", UsageSettings)]
)
def test_every_variable_is_a_setting(name: str, settings: type[CommonSettings]) -> None:
    known = {field.upper() for field in settings.model_fields} | LATER
    assert {variable for variable, value in environment(name).items() if value is not None} <= known


def test_the_backends_of_the_sample_policy_are_the_mock_services() -> None:
    policy = yaml.safe_load((ROOT / "policies" / "router.yaml").read_text())
    endpoints = in_force(environment("xds")["BACKEND_ENDPOINTS"]).split(",")
    expected = [f"mock-backend-{n}:http://mock-backend-{n}:800{n}" for n in (1, 2)]
    assert endpoints == expected
    assert [backend["id"] for backend in policy["backends"]] == [each.split(":")[0] for each in expected]


def test_the_image_starts_the_program_itself_and_not_as_root() -> None:
    runtime = DOCKERFILE.split(" AS runtime\n")[1]
    assert 'ENTRYPOINT ["python", "-m"]' in runtime
    assert "PYTHONDONTWRITEBYTECODE=1" in runtime
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${PYTHON_IMAGE}"] * 2
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+-slim$", DOCKERFILE, re.MULTILINE)
    assert not re.search(r"\[(dev|embedded)\]|index-url", DOCKERFILE)


def test_only_named_files_reach_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {f"!{package.split('.')[0]}" for package in project["tool"]["setuptools"]["packages"]} <= set(lines)


def test_every_package_and_data_file_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    directories = {ROOT / package.replace(".", "/"): package for package in setuptools["packages"]}
    tops = {ROOT / package.split(".")[0] for package in setuptools["packages"]}
    assert {init.parent for top in tops for init in top.rglob("__init__.py")} == set(directories)
    for file in (f for top in tops for f in top.rglob("*") if f.is_file() and "__pycache__" not in f.parts):
        if file.suffix == ".py" or (file.parent.name == "policies" and file.suffix == ".yaml"):
            continue
        owner = next(parent for parent in file.parents if parent in directories)
        globs = setuptools["package-data"].get(directories[owner], [])
        assert any(fnmatch(str(file.relative_to(owner)), glob) for glob in globs), file


def compose_command() -> list[str]:
    """The compose CLI, or a skip that says why there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version"], capture_output=True, text=True, check=False)
            if found.returncode == 0 and not re.search(r"version v?1\.", found.stdout):
                return command
    pytest.skip("no compose CLI (neither docker compose v2 nor docker-compose v2 on PATH)")


def compose_config(*arguments: str, **variables: str) -> str:
    """What ``docker compose config`` prints, with nothing but these variables set."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_CONFIG") if name in os.environ}
    command = [*compose_command(), "-f", "docker-compose.yml", "config", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr  # no warning, such as of a variable that is not set
    return ran.stdout


def test_compose_accepts_the_file() -> None:
    compose_config("-q")


def test_every_published_port_follows_its_variable() -> None:
    moved = {"HTTP_PORT": "1", "ADMIN_PORT": "2", "MOCK_BACKEND_1_PORT": "3", "MOCK_BACKEND_2_PORT": "4"}
    services = json.loads(compose_config("--format", "json", **moved))["services"]
    ports = {port["target"]: port["published"] for s in services.values() for port in s.get("ports", [])}
    assert ports == {8080: "1", 8081: "2", 8001: "3", 8002: "4"}


def test_provider_keys_come_from_the_environment_and_reach_xds_only() -> None:
    unset = json.loads(compose_config("--format", "json"))["services"]["xds"]["environment"]
    assert unset.get("PROVIDER_KEY") is None
    services = json.loads(compose_config("--format", "json", PROVIDER_KEY="given"))["services"]
    assert [name for name, s in services.items() if "given" in (s.get("environment") or {}).values()] == ["xds"]


class _Ready(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Ready) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening
        listening.shutdown()


def exit_code(command: list[str], variables: Mapping[str, str] | None = None) -> int:
    """Of a health check run as its container would."""
    return subprocess.run(command, env={**os.environ, **(variables or {})}, capture_output=True, check=False).returncode


def check(*arguments: str, **variables: str) -> int:
    return exit_code([sys.executable, str(ROOT / "deploy" / "healthcheck.py"), *arguments], variables)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_http_check_follows_the_status(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    monkeypatch.setattr(_Ready, "status", status)
    assert check("http", f"http://127.0.0.1:{server.server_port}/x", http_proxy="http://127.0.0.1:1") == code


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_envoys_check_follows_the_status(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    if not shutil.which("perl"):
        pytest.skip("no perl")
    monkeypatch.setattr(_Ready, "status", status)
    script = str(ROOT / "deploy" / "envoy-healthcheck.pl")
    assert (exit_code(["perl", script, str(server.server_port)]) != 0) == bool(code)


def test_the_check_of_extproc_wants_every_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    settings = {"RUN_DIR": ".", "EXTPROC_WORKERS": "2"}
    listening = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for each, name in zip(listening, ("extproc-0.sock", "extproc-1.sock", "extproc-status.sock"), strict=True):
        assert check("workers", **settings) == 1
        each.bind(name)
        each.listen()
    assert check("workers", **settings) == 0
    for each in listening:
        each.close()
    assert check("workers", **settings) == 1


def test_every_command_of_a_health_check_is_in_its_image_or_mounted() -> None:
    mounted = {line.split(":")[1] for line in SERVICES["envoy"]["volumes"]}
    assert SERVICES["envoy"]["healthcheck"]["test"][2] in mounted
    copied = {shlex.split(line)[2] for line in DOCKERFILE.splitlines() if line.startswith("COPY deploy/")}
    assert all(SERVICES[name]["healthcheck"]["test"][2] in copied for name in OURS)
