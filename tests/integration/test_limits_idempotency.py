"""Idempotency keys on the real Envoy: one answer, one backend call, one charge, however often a client asks."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.harness.calls import CHAT, EMBEDDINGS, INFERENCE, call, chat, error_code, inference
from tests.harness.limits import StoreView, at_once, limited_policy, of_organization
from tests.harness.process import eventually
from tests.harness.stack import Stack, running_stack

pytestmark = pytest.mark.integration

KEY = "dev-acme-alice"
KEPT_MAX_BYTES = 4096


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    environ = {"IDEMPOTENCY_ANSWER_MAX_BYTES": str(KEPT_MAX_BYTES)}
    with running_stack(mocks=("a", "b"), valkey=True, environ=environ) as running:
        budget = [{"period": "MONTHLY", "usd": 100}]
        running.apply(limited_policy(running.uris, **of_organization("acme", budgets=budget)))
        yield running


@pytest.fixture
def store(stack: Stack) -> Iterator[StoreView]:
    stack.reset()
    view = StoreView(stack)
    view.clear()
    yield view
    view.close()


def ask(client: httpx.Client, path: str, token: str, **fields: Any) -> httpx.Response:
    """A request with an idempotency key."""
    if path == INFERENCE:
        return client.post(path, json=inference(**fields) | {"request_id": token})
    body = {"model": "gpt-4o", "input": "hi", **fields} if path == EMBEDDINGS else chat(**fields)
    return client.post(path, json=body, headers={"idempotency-key": token})


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS, INFERENCE])
def test_the_same_request_again_gets_the_same_answer_without_a_backend(
    stack: Stack, store: StoreView, path: str
) -> None:
    token = str(uuid.uuid4())
    with stack.client(KEY) as client:
        first, again = ask(client, path, token), ask(client, path, token)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.content == first.content
    assert "x-idempotent-replay" not in first.headers
    assert again.headers["x-idempotent-replay"] == "true"
    for name in ("content-type", "x-routing-backend", "x-routing-decision"):
        assert again.headers[name] == first.headers[name]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert stack.contacted() == 1


def test_it_is_charged_once(stack: Stack, store: StoreView) -> None:
    token = str(uuid.uuid4())
    with stack.client(KEY) as client:
        ask(client, CHAT, token)
        store.settled("acme")
        spent = store.spend("acme")
        assert spent["spent_micro_usd"] > 0
        for _ in range(3):
            ask(client, CHAT, token)
        assert ask(client, CHAT, str(uuid.uuid4())).status_code == 200
    store.settled("acme")
    assert store.spend("acme")["spent_micro_usd"] == 2 * spent["spent_micro_usd"]


def test_a_stream_is_repeated_event_for_event(stack: Stack, store: StoreView) -> None:
    token = str(uuid.uuid4())
    with stack.client(KEY) as client:
        first, again = (ask(client, CHAT, token, stream=True) for _ in range(2))
    assert first.headers["content-type"].startswith("text/event-stream")
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert first.content.endswith(b"data: [DONE]\n\n")
    assert b'"prompt_tokens"' not in first.content
    assert again.headers["x-idempotent-replay"] == "true"
    assert stack.contacted() == 1


def test_openai_client_reads_a_repeated_stream(stack: Stack, store: StoreView) -> None:
    token = {"Idempotency-Key": str(uuid.uuid4())}
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=KEY) as client:
        texts = [
            "".join(
                chunk.choices[0].delta.content or ""
                for chunk in client.chat.completions.create(**chat(stream=True), extra_headers=token)
            )
            for _ in range(2)
        ]
    assert texts[0] == texts[1] != ""
    assert stack.contacted() == 1


def test_events_are_not_held_back_while_they_are_kept(stack: Stack, store: StoreView) -> None:
    for mock in stack.mocks.values():
        mock.fail("hold", events=1)
    headers = {"idempotency-key": str(uuid.uuid4())}
    with stack.client(KEY) as client, client.stream("POST", CHAT, json=chat(stream=True), headers=headers) as response:
        events = response.iter_bytes()
        assert next(events).startswith(b"data: ")
        for mock in stack.mocks.values():
            mock.heal()
            mock.release()
        assert b"".join(events).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
def test_while_it_runs_the_same_key_is_told_to_come_back(stack: Stack, store: StoreView, path: str) -> None:
    token = str(uuid.uuid4())
    for mock in stack.mocks.values():
        mock.fail("hold")
    with stack.client(KEY) as client:
        answers: list[httpx.Response] = []
        first = threading.Thread(target=lambda: answers.append(ask(client, path, token)))
        first.start()
        eventually(lambda: sum(mock.counts().held for mock in stack.mocks.values()) == 1, "the first request runs")
        running = ask(client, path, token)
        assert running.status_code == 409
        assert error_code(running) == "REQUEST_IN_PROGRESS"
        assert int(running.headers["retry-after-ms"]) > 0
        for mock in stack.mocks.values():
            mock.heal()
            mock.release()
        first.join()
        assert answers[0].status_code == 200
        assert ask(client, path, token).content == answers[0].content


def test_many_at_once_with_one_key_make_one_call(stack: Stack, store: StoreView) -> None:
    token = str(uuid.uuid4())
    answers = at_once(stack, 50, key=KEY, headers=[{"idempotency-key": token}] * 50)
    assert set(Counter(answer.status_code for answer in answers)) <= {200, 409}
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert stack.contacted() == 1


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
def test_another_body_under_the_same_key_is_refused(stack: Stack, store: StoreView, path: str) -> None:
    token = str(uuid.uuid4())
    with stack.client(KEY) as client:
        assert ask(client, path, token).status_code == 200
        changed = {"metadata": {"a": "b"}} if path == INFERENCE else {"seed": 7}
        other = ask(client, path, token, **changed)
    assert other.status_code == 422
    assert error_code(other) == "IDEMPOTENCY_KEY_REUSED"
    assert stack.contacted() == 1


def test_keys_of_two_organisations_have_nothing_to_do_with_each_other(stack: Stack, store: StoreView) -> None:
    token = str(uuid.uuid4())
    with stack.client(KEY) as ours, stack.client("dev-globex-bob") as theirs:
        assert ask(ours, CHAT, token).status_code == 200
        other = ask(theirs, CHAT, token, seed=7)
    assert other.status_code == 200
    assert "x-idempotent-replay" not in other.headers


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
def test_after_a_failure_the_same_key_is_tried_again(stack: Stack, store: StoreView, path: str) -> None:
    token = str(uuid.uuid4())
    for mock in stack.mocks.values():
        mock.fail("status", status=500)
    with stack.client(KEY) as client:
        assert ask(client, path, token).status_code == 502
        for mock in stack.mocks.values():
            mock.heal()
        again = ask(client, path, token)
    assert again.status_code == 200
    assert "x-idempotent-replay" not in again.headers


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_an_answer_too_large_to_keep_is_given_once(stack: Stack, store: StoreView, stream: bool) -> None:
    token = str(uuid.uuid4())
    for mock in stack.mocks.values():
        mock.fail("huge", bytes=KEPT_MAX_BYTES + 2000)
    with stack.client(KEY) as client:
        first = ask(client, CHAT, token, stream=stream)
        assert first.status_code == 200
        assert len(first.content) > KEPT_MAX_BYTES
        again = ask(client, CHAT, token, stream=stream)
    assert again.status_code == 409
    assert error_code(again) == "ANSWER_NOT_KEPT"
    assert "retry-after-ms" not in again.headers
    assert stack.contacted() == 1


def test_a_client_that_left_in_the_middle_may_ask_again(stack: Stack, store: StoreView) -> None:
    headers = {"idempotency-key": str(uuid.uuid4())}
    for mock in stack.mocks.values():
        mock.fail("hold", events=1)
    with stack.client(KEY) as client:
        with client.stream("POST", CHAT, json=chat(stream=True), headers=headers) as response:
            next(response.iter_bytes())
        for mock in stack.mocks.values():
            mock.heal()
            mock.release()

        def answered() -> bool:
            return client.post(CHAT, json=chat(stream=True), headers=headers).status_code == 200

        eventually(answered, "the key is free again")
    assert stack.contacted() == 2


@pytest.mark.parametrize("token", ["", "k" * 256], ids=["empty", "long"])
def test_key_of_a_wrong_length_is_refused(stack: Stack, store: StoreView, token: str) -> None:
    with stack.client(KEY) as client:
        refused = ask(client, CHAT, token)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "idempotency-key"


def test_requests_without_a_key_do_not_pay_for_it(stack: Stack, store: StoreView) -> None:
    """Their answers do not pass through ext_proc, which Envoy counts."""
    name = "http.public.ext_proc.stream_msgs_sent"
    with stack.client(KEY) as client:
        before = stack.stats("ext_proc.stream_msgs_sent")[name]
        assert call(client, CHAT).status_code == 200
        plain = stack.stats("ext_proc.stream_msgs_sent")[name]
        assert ask(client, CHAT, str(uuid.uuid4())).status_code == 200
        keyed = stack.stats("ext_proc.stream_msgs_sent")[name]
    assert plain - before == 2
    assert keyed - plain >= 4


@pytest.mark.parametrize("kind", ["stream_cut", "stream_clean_cut"])
def test_a_stream_that_was_cut_short_is_not_repeated(stack: Stack, store: StoreView, kind: str) -> None:
    token = str(uuid.uuid4())
    for mock in stack.mocks.values():
        mock.fail(kind, events=2)
    with stack.client(KEY) as client:
        with contextlib.suppress(httpx.RemoteProtocolError):
            assert b"[DONE]" not in ask(client, CHAT, token, stream=True).content
        for mock in stack.mocks.values():
            mock.heal()

        def answered_whole() -> bool:
            again = ask(client, CHAT, token, stream=True)
            return again.status_code == 200 and again.content.endswith(b"data: [DONE]\n\n")

        eventually(answered_whole, "the key is free again")
