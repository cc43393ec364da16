"""What a client says of itself in headers decides nothing: the key does."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from mocks.control import Received
from tests.harness.calls import CHAT, INFERENCE, call, chat
from tests.harness.raw import exchange
from tests.harness.stack import Stack, model_of, policy_of, running_stack

pytestmark = pytest.mark.integration

ALICE, GLOBEX = "dev-acme-alice", "dev-globex-bob"
SPOOFS = {
    "model": {"x-router-model": "globex-only"},
    "scope": {"x-router-model": "-"},
    "organisation": {"x-router-org": "globex"},
    "variant": {"x-router-variant": "b"},
    "backend": {"x-router-backend": "b"},
    "model span": {"x-router-model-span": "0:5"},
    "fault": {"x-router-fault": "no_backend"},
    "upper case": {"X-Router-Org": "globex", "X-ROUTER-VARIANT": "b"},
    "unknown": {"x-router-anything": "b"},
    "overhead": {"x-router-overhead-us": "1"},
    "original path": {"x-envoy-original-path": "/v1/embeddings"},
    "retries": {"x-envoy-retry-on": "5xx", "x-envoy-max-retries": "9", "x-envoy-upstream-rq-timeout-ms": "1"},
    "upstream": {"x-envoy-decorator-operation": "x", "x-envoy-force-trace": "1", "x-envoy-upstream-alt-stat-name": "x"},
    "host": {"host": "backends"},
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(workers=1) as running:
        models = [
            # A key of acme goes to a; to b go an organisation of its own, and a key that a list names.
            model_of({"a": 1, "b": 1}, lists={"b": {"allow_list": ["nobody"]}}),
            model_of({"b": 1}, organization_id="globex"),
            model_of({"b": 1}, model="globex-only", organization_id="globex"),
        ]
        running.apply(policy_of(running.uris, models=models, backend_of={"a": {"model_variant": "the-backends-own"}}))
        yield running


@pytest.fixture(autouse=True)
def _fresh(stack: Stack) -> None:
    stack.reset()


def send(stack: Stack, key: str, path: str = CHAT, **headers: str) -> httpx.Response:
    with stack.client(key, verify=False) as client:
        client.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
        return call(client, path)


def received(stack: Stack, backend: str) -> Received:
    [request] = stack.mocks[backend].requests()
    return request


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
@pytest.mark.parametrize("headers", SPOOFS.values(), ids=SPOOFS)
def test_spoofed_header_has_no_effect(stack: Stack, path: str, headers: dict[str, str]) -> None:
    with stack.client(ALICE, verify=False) as client:
        client.headers.update(headers)
        response = call(client, path)
    assert response.status_code == 200, response.text
    assert response.headers["x-routing-backend"] == "a"
    assert stack.mocks["b"].count() == 0
    got = received(stack, "a")
    assert got.json()["model"] == "the-backends-own"
    assert got.host == stack.uris["a"].removeprefix("http://")
    assert [name for name, _ in got.headers if name.lower().startswith(("x-router-", "x-envoy-"))] == []


def test_own_organisation_is_what_the_routes_decide_by(stack: Stack) -> None:
    """Otherwise the test above proves nothing."""
    assert send(stack, GLOBEX).headers["x-routing-backend"] == "b"


@pytest.mark.parametrize("status", [500, 404])
def test_clients_retry_headers_do_not_retry(stack: Stack, status: int) -> None:
    stack.mocks["a"].fail("status", status=status)
    send(stack, ALICE, **{"x-envoy-retry-on": "5xx,retriable-4xx", "x-envoy-max-retries": "5"})
    assert stack.contacted() == 1


def test_clients_request_id_is_not_taken_over(stack: Stack) -> None:
    mine = "11111111-1111-4111-8111-111111111111"
    response = send(stack, ALICE, x_request_id=mine)
    assert response.headers["x-request-id"] != mine
    assert mine not in str(response.headers)
    assert received(stack, "a").header("x-request-id") == response.headers["x-request-id"]


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
def test_backend_sees_neither_key_nor_signature(stack: Stack, path: str) -> None:
    send(stack, ALICE, path, x_api_key=ALICE, x_hmac_signature="ab" * 32, cookie=f"key={ALICE}")
    got = received(stack, "a")
    assert ALICE not in f"{got.headers}{got.body!r}"
    assert {name.lower() for name, _ in got.headers}.isdisjoint(
        {"authorization", "x-api-key", "x-hmac-signature", "cookie", "x-forwarded-for"}
    )


@pytest.mark.parametrize("name", ["authorization", "x-router-org", "x_router_org"])
def test_header_named_hop_by_hop_does_not_change_who_calls(stack: Stack, name: str) -> None:
    body = b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}'
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: router\r\nauthorization: Bearer {ALICE}\r\nx-router-org: globex\r\n"
        f"x_router_org: globex\r\nconnection: {name}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    exchange(stack.http_port, head.encode() + body, method="POST", path=CHAT)
    assert stack.mocks["b"].count() == 0


def test_path_in_another_spelling_is_not_a_way_around(stack: Stack) -> None:
    with stack.client(None, verify=False) as client:
        for path in (
            "/v1//chat/completions",
            "/v1/./chat/completions",
            "/v1/x/../chat/completions",
            "/v1/chat/completions/",
        ):
            response = client.post(path, json=chat())
            assert response.status_code in {401, 404}, path
        assert client.post("/v1%2Fchat%2Fcompletions", json=chat()).status_code in {400, 401, 404}
    assert stack.contacted() == 0
