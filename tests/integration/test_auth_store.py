"""Keys in a shared Valkey, in production: made and revoked while the router runs."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.harness.calls import CHAT, INFERENCE, call, error_code
from tests.harness.keys import KeyStoreCommands
from tests.harness.process import eventually
from tests.harness.stack import Stack, model_of, running_stack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    environ = {"ENVIRONMENT": "production"}
    with running_stack(mocks=("a",), environ=environ, valkey=True, models=[model_of({"a": 1})]) as running:
        yield running


@pytest.fixture(scope="module")
def store(stack: Stack) -> KeyStoreCommands:
    return KeyStoreCommands("--redis", stack.environ["REDIS_ADDR"])


@pytest.fixture(autouse=True)
def _fresh(stack: Stack) -> None:
    stack.reset()


def send(stack: Stack, key: str, path: str = CHAT) -> httpx.Response:
    with stack.client(key, verify=False) as client:
        return call(client, path)


def test_created_key_is_let_in_by_every_worker(stack: Stack, store: KeyStoreCommands) -> None:
    key = store.create()
    assert {send(stack, key.key).status_code for _ in range(20)} == {200}


def test_key_refused_before_it_was_created_is_let_in_after(stack: Stack, store: KeyStoreCommands) -> None:
    key = store.create("--expires-in", "1h")
    store.revoke(key)
    other = store.create()
    assert {send(stack, key.key).status_code for _ in range(8)} == {401}
    assert {send(stack, other.key).status_code for _ in range(8)} == {200}


def test_revoked_key_is_refused_at_once_by_every_worker(stack: Stack, store: KeyStoreCommands) -> None:
    key = store.create()
    assert {send(stack, key.key).status_code for _ in range(20)} == {200}  # now every worker has it in its cache
    store.revoke(key)
    eventually(lambda: send(stack, key.key).status_code == 401, "the key is refused", within_s=1)
    eventually(lambda: {send(stack, key.key).status_code for _ in range(10)} == {401}, "by every worker", within_s=1)
    stack.reset()
    assert {send(stack, key.key).status_code for _ in range(10)} == {401}
    assert stack.contacted() == 0


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
@pytest.mark.parametrize(
    "key",
    ["dev-acme-alice", "dev-key", "test-abc", "dev-00000000-0000-0000-0000-000000000001-alice", "dev-acme-admin"],
)
def test_keys_of_development_are_refused_in_production(stack: Stack, path: str, key: str) -> None:
    response = send(stack, key, path)
    assert response.status_code == 401
    assert error_code(response) == ("AUTH_INVALID" if path == INFERENCE else "INVALID_API_KEY")
    assert stack.contacted() == 0


def test_store_that_is_down_is_503_for_unknown_keys_and_none_for_known_ones(
    stack: Stack, store: KeyStoreCommands
) -> None:
    assert stack.valkey is not None
    known, unknown = store.create(), store.create()
    assert {send(stack, known.key).status_code for _ in range(20)} == {200}
    stack.valkey.stop()
    try:
        response = send(stack, unknown.key)
        assert (response.status_code, error_code(response)) == (503, "SERVICE_UNAVAILABLE")
        assert stack.contacted() == 20
    finally:
        stack.valkey.start()
    eventually(lambda: _creates(store), "the store is back")
    again = store.create()
    eventually(lambda: send(stack, again.key).status_code == 200, "new keys are let in again", within_s=10)


def _creates(store: KeyStoreCommands) -> bool:
    try:
        store.create()
    except AssertionError:
        return False
    return True
