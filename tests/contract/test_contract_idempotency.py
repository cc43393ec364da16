"""What clients are told when they send an idempotency key again."""

from __future__ import annotations

import uuid

import pytest

from tests.contract.conftest import World
from tests.contract.document import events
from tests.contract.organizations import key_of
from tests.contract.produce import BOTH, CHAT, INFERENCE, SERVED, post
from tests.contract.produce_limits import ask, in_progress, not_kept, running

pytestmark = pytest.mark.integration

STREAMS = tuple(path for path in SERVED if path not in (INFERENCE, "/v1/embeddings"))


def token() -> str:
    return str(uuid.uuid4())


@pytest.mark.parametrize("path", SERVED)
def test_repetition_is_as_documented(world: World, path: str) -> None:
    mine = token()
    with world.client() as client:
        first, again = ask(client, path, mine), ask(client, path, mine)
    for response in (first, again):
        assert response.status_code == 200
        world.check(response)
    assert "x-idempotent-replay" not in first.headers
    assert again.headers["x-idempotent-replay"] == "true"
    assert "x-router-overhead-ms" not in again.headers
    assert again.content == first.content
    assert world.a.count() == 1


@pytest.mark.parametrize("path", STREAMS)
def test_repeated_stream_is_as_documented(world: World, path: str) -> None:
    mine = token()
    with world.client() as client:
        first, again = ask(client, path, mine, stream=True), ask(client, path, mine, stream=True)
    world.check(again)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-idempotent-replay"] == "true"
    assert list(events(again.text)) == list(events(first.text)) != []


@pytest.mark.parametrize("path", SERVED)
def test_request_that_runs_says_when_to_ask_again(world: World, path: str) -> None:
    response = in_progress(world, path)
    assert response.status_code == 409
    world.check(response)
    wait_s, wait_ms = int(response.headers["retry-after"]), int(response.headers["retry-after-ms"])
    assert wait_s - 1 < wait_ms / 1000 <= wait_s
    if path == INFERENCE:
        assert response.json()["retry_after_seconds"] == wait_s


@pytest.mark.parametrize("path", BOTH)
def test_request_that_ran_is_answered_when_it_has_ended(world: World, path: str) -> None:
    mine = token()
    with world.client() as client, world.client() as other:
        with running(world, client, path, mine) as answers:
            assert ask(other, path, mine).status_code == 409
        again = ask(other, path, mine)
    assert again.content == answers[-1].content
    assert again.headers["x-idempotent-replay"] == "true"
    world.check(again)


@pytest.mark.parametrize("path", BOTH)
def test_answer_that_was_not_kept_is_not_to_be_waited_for(world: World, path: str) -> None:
    response = not_kept(world, path)
    assert response.status_code == 409
    world.check(response)
    assert {"retry-after", "retry-after-ms"}.isdisjoint(response.headers)
    assert world.a.count() == 1


@pytest.mark.parametrize("path", BOTH)
def test_refused_request_leaves_its_key_free(world: World, path: str) -> None:
    mine = token()
    world.a.fail("status", status=400)
    with world.client() as client:
        refused = ask(client, path, mine)
        assert refused.status_code == 400
        world.check(refused)
        world.a.heal()
        response = ask(client, path, mine)
    assert response.status_code == 200
    assert "x-idempotent-replay" not in response.headers


@pytest.mark.parametrize("end", ["minLength", "maxLength"])
def test_key_of_any_documented_length_is_taken(world: World, end: str) -> None:
    mine = "k" * world.document.tree["components"]["parameters"]["IdempotencyKey"]["schema"][end]
    with world.client(key_of(uuid.uuid4().hex)) as client:
        responses = [ask(client, CHAT, mine) for _ in range(2)]
    assert [response.headers.get("x-idempotent-replay") for response in responses] == [None, "true"]


@pytest.mark.parametrize("mine", ["", "k" * 256], ids=["empty", "long"])
def test_key_that_is_none_is_named_as_the_field_at_fault(world: World, mine: str) -> None:
    with world.client() as client:
        response = ask(client, CHAT, mine)
    assert response.status_code == 400
    world.check(response)
    assert response.json()["error"]["param"] == "idempotency-key"
    schema = world.document.tree["components"]["parameters"]["IdempotencyKey"]["schema"]
    assert not schema["minLength"] <= len(mine) <= schema["maxLength"]


def test_inference_goes_by_its_request_id_alone(world: World) -> None:
    with world.client() as client:
        client.headers["idempotency-key"] = token()
        responses = [post(client, INFERENCE, "solo") for _ in range(2)]
    assert [response.status_code for response in responses] == [200, 200]
    assert world.a.count() == 2
    for response in responses:
        world.check(response)
        assert "x-idempotent-replay" not in response.headers


@pytest.mark.parametrize("path", BOTH)
def test_key_is_the_organisations(world: World, path: str) -> None:
    mine = token()
    with world.client() as ours, world.client("dev-globex-bob") as theirs:
        assert ask(ours, path, mine).status_code == 200
        response = ask(theirs, path, mine, "first-a")
    assert response.status_code == 200
    assert "x-idempotent-replay" not in response.headers


def test_key_of_one_endpoint_is_refused_at_another(world: World) -> None:
    mine = token()
    with world.client() as client:
        assert ask(client, CHAT, mine).status_code == 200
        response = ask(client, "/v1/completions", mine)
    assert response.status_code == 422
    world.check(response)
