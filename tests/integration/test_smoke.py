"""The narrow path, and policy edits, on the real Envoy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.stack import Stack, policy_of, running_stack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(stack: Stack) -> None:
    stack.reset()
    stack.apply(policy_of(stack.uris))


def test_chat_reaches_a_backend_unchanged(stack: Stack) -> None:
    body = b'{"model":"gpt-4o", "messages":[{"role":"user","content":"hi"}], "seed": 9007199254740993, "x": 0.70}'
    with stack.client() as client:
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    [received] = [request for mock in stack.mocks.values() for request in mock.requests()]
    assert received.body == body


def test_a_policy_edit_is_in_force_within_a_second(stack: Stack) -> None:
    only_b = [{"model": "gpt-4o", "organization_id": "*", "backends": [{"backend_id": "b", "weight": 1}]}]
    stack.apply(policy_of(stack.uris, models=only_b))
    with stack.client() as client:
        for _ in range(20):
            response = client.post("/v1/completions", json={"model": "gpt-4o", "prompt": "hi"})
            assert response.headers["x-routing-backend"] == "b"


def test_a_policy_edit_never_touches_a_listener(stack: Stack) -> None:
    """A changed listener would drain every connection, open streams included."""
    names = ("listener_manager.lds.update_attempt", "listener_manager.listener_modified")
    before = stack.stats("listener_manager")
    stack.apply(policy_of(stack.uris, backend={"timeout": "9s"}, default_policy={"failover_threshold": 5}))
    after = stack.stats("listener_manager")
    assert [after[name] for name in names] == [before[name] for name in names]


def test_backend_endpoints_override_the_policys_uris() -> None:
    """The policy's own address leads nowhere; the setting's leads to the backend."""
    nowhere = {"a": "http://127.0.0.1:1"}
    with running_stack(mocks=("a",), workers=1, policy=policy_of(nowhere), override_endpoints=True) as running:
        with running.client() as client:
            response = client.post("/v1/completions", json={"model": "gpt-4o", "prompt": "hi"})
        assert response.headers["x-routing-backend"] == "a"


def test_a_model_with_a_slash_in_its_name(stack: Stack) -> None:
    name = "meta-llama/Llama-3.1-8B"
    models = [{"model": name, "organization_id": "*", "backends": [{"backend_id": "a", "weight": 1}]}]
    stack.apply(policy_of(stack.uris, models=models))
    with stack.client() as client:
        assert client.post("/v1/completions", json={"model": name, "prompt": "hi"}).status_code == 200
        for path in ("meta-llama/Llama-3.1-8B", "meta-llama%2FLlama-3.1-8B"):
            assert client.get(f"/v1/models/{path}").json()["id"] == name
