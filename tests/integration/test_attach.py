"""Envoy's files: the bootstrap is valid, and an Envoy that runs already can take the router in."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness.process import Process, eventually, free_ports
from tests.harness.stack import ENVOY, KEY, ROOT, Stack, model_of, policy_of

pytestmark = pytest.mark.integration

CALL = {"model": "gpt-4o", "prompt": "hi"}


@pytest.mark.parametrize("name", ["bootstrap.yaml", "attach.example.yaml"])
def test_envoy_accepts_the_file(name: str, tmp_path: Path) -> None:
    command = [str(ENVOY), "--mode", "validate", "-c", str(ROOT / "envoy" / name)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert checked.returncode == 0, checked.stderr


class AttachedStack(Stack):
    """A router whose Envoy was started with the example of an Envoy that was there before."""

    def __init__(self) -> None:
        super().__init__(mocks=("a",), workers=1, environ={}, valkey=False)
        [self.own_port] = free_ports(1)
        text = (ROOT / "envoy" / "attach.example.yaml").read_text()
        for theirs, ours in (("9901", self.envoy_admin_port), ("10000", self.own_port), ("8080", self.http_port)):
            text = text.replace(f"port_value: {theirs}", f"port_value: {ours}")
        text = text.replace("/run/api-router/xds.sock", str(self.directory / "xds.sock"))
        elsewhere = self.directory / "elsewhere"
        elsewhere.mkdir()
        config = elsewhere / "envoy.yaml"
        config.write_text(text)
        command = [str(ENVOY), "-c", str(config), "--disable-hot-restart", "--log-level", "warning"]
        self.envoy = Process("envoy", command, directory=elsewhere, environ={})


@pytest.fixture(scope="module")
def stack() -> Iterator[AttachedStack]:
    running = AttachedStack()
    running.write_policy(policy_of(running.uris))
    try:
        running.start()
        yield running
    finally:
        running.stop()


def test_both_what_was_there_and_the_router_answer(stack: AttachedStack) -> None:
    stack.apply(policy_of(stack.uris))
    own = f"http://127.0.0.1:{stack.own_port}"
    with httpx.Client(base_url=own, trust_env=False, headers={"authorization": f"Bearer {KEY}"}) as client:
        assert client.get("/hello").text == "yours\n"
        answer = client.post("/v1/completions", json=CALL)
    assert answer.status_code == 200
    assert answer.headers["x-routing-backend"] == "a"


def test_a_policy_edit_leaves_what_was_there_alone(stack: AttachedStack) -> None:
    stack.apply(policy_of(stack.uris, models=[model_of({"a": 1}, model="other")]))
    with stack.client() as client:
        eventually(lambda: client.post("/v1/completions", json=CALL).status_code == 404, "the model is gone")
    own = httpx.get(f"http://127.0.0.1:{stack.own_port}/hello", trust_env=False)
    assert own.text == "yours\n"
