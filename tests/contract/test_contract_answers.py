"""Answers that are no errors: every endpoint, plain and streamed, as docs/openapi.yaml has them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.conftest import World
from tests.contract.document import events
from tests.harness.calls import inference
from tests.harness.process import eventually

pytestmark = pytest.mark.integration

CHAT = {"messages": [{"role": "user", "content": "hi there"}]}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "inference text": ("/v1/inference", inference(payload="hi there")),
    "inference completion": (
        "/v1/inference",
        inference(payload=json.dumps({"prompt": "hi"}), content_type="application/json"),
    ),
    "inference chat": ("/v1/inference", inference(payload=json.dumps(CHAT), content_type="application/json")),
    "inference with all fields": (
        "/v1/inference",
        inference(parameters={"max_tokens": 3}, metadata={"team": "é"}, content_type="text/plain"),
    ),
    "chat": ("/v1/chat/completions", CHAT),
    "chat stream": ("/v1/chat/completions", CHAT | {"stream": True}),
    "chat stream with usage": (
        "/v1/chat/completions",
        CHAT | {"stream": True, "stream_options": {"include_usage": True}},
    ),
    "completion": ("/v1/completions", {"prompt": "hi"}),
    "completion stream": ("/v1/completions", {"prompt": "hi", "stream": True}),
    "embeddings": ("/v1/embeddings", {"input": ["hi", "there"]}),
    "response": ("/v1/responses", {"input": "hi"}),
    "response stream": ("/v1/responses", {"input": "hi", "stream": True}),
}


def send(client: httpx.Client, name: str, model: str = "gpt-4o") -> httpx.Response:
    path, body = CALLS[name]
    own = {"request_id": str(uuid.uuid4())} if "request_id" in body else {}
    return client.post(path, json=body | {"model": model} | own)


@pytest.fixture
def client(world: World) -> Iterator[httpx.Client]:
    with world.client() as client:
        yield client


@pytest.mark.parametrize("name", CALLS)
def test_answer_is_as_documented(world: World, client: httpx.Client, name: str) -> None:
    response = send(client, name)
    assert response.status_code == 200, response.text
    streamed = "stream" in CALLS[name][1]
    assert response.headers["content-type"].startswith("text/event-stream" if streamed else "application/json")
    world.check(response)


@pytest.mark.parametrize("name", CALLS)
def test_request_is_as_documented(world: World, name: str) -> None:
    path, body = CALLS[name]
    pointer = f"/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    world.document.validator(pointer).validate(body | {"model": "gpt-4o"})


@pytest.mark.parametrize("name", [name for name in CALLS if "stream" in name])
def test_stream_has_the_usage_event_only_where_it_was_asked_for(client: httpx.Client, name: str) -> None:
    found = list(events(send(client, name).text))
    usage = [event for event in found if event.get("choices") == [] and event.get("usage")]
    assert len(usage) == (1 if "usage" in name else 0)


def test_inference_counts_tokens_and_their_price(world: World, client: httpx.Client) -> None:
    usage = send(client, "inference text", model="solo").json()["usage"]
    assert (usage["tokens_input"], usage["tokens_output"]) == (2, 6)
    assert usage["cost_usd"] == pytest.approx((2 * 0.005 + 6 * 0.015) / 1000)


def test_inference_takes_a_backend_that_answers_text(world: World, client: httpx.Client) -> None:
    world.a.completions_format("text")
    response = send(client, "inference text", model="solo")
    world.check(response)
    assert response.json()["output"]["tokens_used"] == 8
    assert response.json()["usage"]["tokens_output"] == 8
    world.check(send(client, "completion", model="solo"))


@pytest.mark.parametrize("name", ["inference text", "chat", "chat stream"])
def test_failover_shows_in_the_decision(world: World, client: httpx.Client, name: str) -> None:
    world.a.fail("status", status=500)
    response = send(client, name, model="first-a")
    assert response.status_code == 200
    assert (response.headers["x-routing-decision"], response.headers["x-routing-backend"]) == ("FAILOVER", "b")
    world.check(response)


@pytest.mark.parametrize("name", ["inference text", "chat"])
def test_avoided_degraded_backend_is_a_warning(world: World, client: httpx.Client, name: str) -> None:
    response = send(client, name, model="degraded")
    assert "b" in response.headers["warning"]
    assert (response.headers["x-routing-decision"], response.headers["x-routing-backend"]) == ("OVERRIDE", "a")
    world.check(response)


@pytest.mark.parametrize("name", ["chat stream", "completion stream"])
def test_stream_that_stops_early_ends_with_an_error_event(world: World, client: httpx.Client, name: str) -> None:
    world.a.fail("stream_clean_cut", events=2)
    response = send(client, name, model="solo")
    world.check(response)
    assert list(events(response.text))[-1]["error"]["code"] == "backend_error"
    assert "[DONE]" not in response.text


def test_models_are_listed_and_described(world: World, client: httpx.Client) -> None:
    listed = client.get("/v1/models")
    world.check(listed)
    ids = [model["id"] for model in listed.json()["data"]]
    assert ids == sorted(ids)
    assert "private" not in ids
    one = client.get("/v1/models/solo")
    world.check(one)
    assert one.json() in listed.json()["data"]


def test_key_for_one_model_is_shown_that_one(world: World) -> None:
    with world.client(world.keys.other_model.key) as client:
        assert client.get("/v1/models").json()["data"] == []


@pytest.mark.parametrize("path", ["/v1/status/healthz", "/v1/status/readyz"])
def test_status_needs_no_key(world: World, path: str) -> None:
    with world.client("") as client:
        response = client.get(path)
    assert response.status_code == 200
    world.check(response)


def test_readiness_without_a_backend_is_503(world: World) -> None:
    try:
        world.apply(killed=("a", "b", "c", "sick", "hasty"))
        with world.client("") as client:
            # A report is used again for half a second.
            eventually(lambda: client.get("/v1/status/readyz").status_code == 503, "readiness says so")
            response = client.get("/v1/status/readyz")
        assert response.json()["status"] == "not_ready"
        world.check(response)
    finally:
        world.apply()
        with world.client() as client:
            eventually(lambda: client.get("/v1/status/readyz").status_code == 200, "readiness is back")


def test_request_id_is_a_new_one_each_time(client: httpx.Client) -> None:
    mine = {"x-request-id": "11111111-1111-1111-1111-111111111111"}
    ids = {client.get("/v1/models", headers=mine).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert mine["x-request-id"] not in ids
