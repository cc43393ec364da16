"""The official OpenAI client, unmodified: calls, streams and exceptions, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from mocks.control import MockControl
from tests.harness.keys import KeyStoreCommands
from tests.harness.process import eventually
from tests.harness.stack import KEY, Stack, model_of, policy_of, running_stack

pytestmark = pytest.mark.integration

HI: Any = [{"role": "user", "content": "hi there"}]
MODELS = [
    model_of({"a": 1, "b": 1}),
    model_of({"a": 1}, model="solo"),
    model_of({"a": 1}, model="org/model"),
    model_of({"b": 1}, model="killed"),
]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.yaml"


@pytest.fixture(scope="module")
def limited_key(key_file: Path) -> str:
    return KeyStoreCommands("--file", str(key_file)).create("--model", "solo").key


@pytest.fixture(scope="module")
def stack(key_file: Path, limited_key: str) -> Iterator[Stack]:
    with running_stack(workers=1, environ={"KEY_FILE": str(key_file)}, models=MODELS) as running:
        yield running


@pytest.fixture(autouse=True)
def a(stack: Stack) -> MockControl:
    stack.reset()
    return stack.mocks["a"]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(verify=False, trust_env=False) as http:
        yield http


@pytest.fixture
def client(stack: Stack, http: httpx.Client) -> OpenAI:
    return OpenAI(base_url=f"{stack.url}/v1", api_key=KEY, http_client=http, max_retries=0)


def run_async(stack: Stack, use: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
    """What ``use`` gives with an asynchronous client."""

    async def run() -> Any:
        async with httpx.AsyncClient(verify=False, trust_env=False) as http:
            return await use(AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=KEY, http_client=http, max_retries=0))

    return asyncio.run(run())


# --- Answers.


def test_chat_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="solo", messages=HI)
    assert answer.choices[0].message.content == "a heard 2 tokens: hi there"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2


def test_chat_passes_on_what_the_router_does_not_know(client: OpenAI, a: MockControl) -> None:
    tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    client.chat.completions.create(
        model="solo", messages=parts, tools=[tool], logit_bias={"50256": -100}, extra_body={"their_own": [1, None]}
    )
    [received] = a.requests()
    body = received.json()
    assert (body["tools"], body["messages"], body["their_own"]) == ([tool], parts, [1, None])


def test_completion_answers(client: OpenAI) -> None:
    assert client.completions.create(model="solo", prompt="hi").choices[0].text == "a heard 1 tokens: hi"


def test_embeddings_answer(client: OpenAI) -> None:
    answer = client.embeddings.create(model="solo", input=["hi", "there"])
    assert [item.index for item in answer.data] == [0, 1]
    assert all(isinstance(number, float) for number in answer.data[0].embedding)
    assert answer.usage.prompt_tokens == 2


def test_response_answers(client: OpenAI) -> None:
    answer = client.responses.create(model="solo", input="hi")
    assert answer.output_text == "a heard 1 tokens: hi"
    assert answer.usage is not None


def test_async_client_answers(stack: Stack) -> None:
    async def use(client: AsyncOpenAI) -> tuple[Any, ...]:
        return (
            await client.chat.completions.create(model="solo", messages=HI),
            await client.completions.create(model="solo", prompt="hi"),
            await client.embeddings.create(model="solo", input="hi"),
            await client.responses.create(model="solo", input="hi"),
        )

    chat, completion, embeddings, response = run_async(stack, use)
    assert chat.choices[0].message.content == "a heard 2 tokens: hi there"
    assert completion.choices[0].text == "a heard 1 tokens: hi"
    assert len(embeddings.data) == 1
    assert response.output_text == "a heard 1 tokens: hi"


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["gpt-4o", "killed", "org/model", "solo"]
    assert client.models.retrieve("solo") == listed[-1]


def test_async_models_are_listed_and_retrieved(stack: Stack) -> None:
    async def use(client: AsyncOpenAI) -> list[str]:
        return [model.id async for model in client.models.list()] + [(await client.models.retrieve("solo")).id]

    assert run_async(stack, use) == ["gpt-4o", "killed", "org/model", "solo", "solo"]


def test_model_with_a_slash_in_its_name_is_retrieved(client: OpenAI) -> None:
    assert client.models.retrieve("org/model").id == "org/model"


def test_request_id_is_the_responses_own(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="solo", messages=HI)
    raw = client.chat.completions.with_raw_response.create(model="solo", messages=HI)
    assert answer._request_id
    assert raw.request_id
    assert raw.parse()._request_id == raw.headers["x-request-id"] != answer._request_id


def test_raw_response_has_the_routers_headers(client: OpenAI) -> None:
    headers = client.embeddings.with_raw_response.create(model="solo", input="hi").headers
    assert (headers["x-routing-backend"], headers["x-routing-decision"]) == ("a", "PRIMARY")
    assert float(headers["x-router-overhead-ms"]) > 0


# --- Streams.


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_chat_streams_without_usage_it_did_not_ask_for(client: OpenAI, a: MockControl) -> None:
    chunks = list(client.chat.completions.create(model="solo", messages=HI, stream=True))
    assert text_of(chunks) == "a heard 2 tokens: hi there"
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    [received] = a.requests()
    assert received.json()["stream_options"] == {"include_usage": True}


def test_chat_streams_with_the_usage_it_asked_for(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model="solo", messages=HI, stream=True, stream_options=options)
    assert text_of(chunks) == "a heard 2 tokens: hi there"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 2


def test_refused_usage_stays_refused(client: OpenAI) -> None:
    options: Any = {"include_usage": False}
    chunks = list(client.chat.completions.create(model="solo", messages=HI, stream=True, stream_options=options))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_completion_streams(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="solo", prompt="hi", stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "a heard 1 tokens: hi"
    assert all(chunk.choices for chunk in chunks)


def test_response_streams_to_its_completion(client: OpenAI) -> None:
    *events, last = client.responses.create(model="solo", input="hi", stream=True)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "a heard 1 tokens: hi"
    assert last.type == "response.completed"
    assert last.response.usage is not None


def test_async_client_streams(stack: Stack) -> None:
    async def use(client: AsyncOpenAI) -> tuple[list[Any], list[Any], list[Any]]:
        chat = await client.chat.completions.create(model="solo", messages=HI, stream=True)
        completion = await client.completions.create(model="solo", prompt="hi", stream=True)
        response = await client.responses.create(model="solo", input="hi", stream=True)
        return [c async for c in chat], [c async for c in completion], [e async for e in response]

    chat, completion, response = run_async(stack, use)
    assert text_of(chat) == "a heard 2 tokens: hi there"
    assert "".join(choice.text for chunk in completion for choice in chunk.choices) == "a heard 1 tokens: hi"
    assert response[-1].type == "response.completed"


def test_stream_that_ends_too_early_raises(client: OpenAI, a: MockControl) -> None:
    a.fail("stream_clean_cut", events=2)
    stream = client.chat.completions.create(model="solo", messages=HI, stream=True)
    read = []
    with pytest.raises(openai.APIError) as raised:
        read.extend(stream)
    assert raised.value.code == "backend_error"
    assert text_of(read) == "a heard"


def test_stream_that_ends_too_early_raises_asynchronously(stack: Stack, a: MockControl) -> None:
    a.fail("stream_clean_cut", events=2)

    async def use(client: AsyncOpenAI) -> list[Any]:
        return [c async for c in await client.chat.completions.create(model="solo", messages=HI, stream=True)]

    with pytest.raises(openai.APIError) as raised:
        run_async(stack, use)
    assert raised.value.code == "backend_error"


@pytest.mark.parametrize("call", ["chat", "completion", "response"])
def test_stream_that_breaks_raises(client: OpenAI, a: MockControl, call: str) -> None:
    a.fail("stream_cut", events=2)
    streams: dict[str, Callable[[], Any]] = {
        "chat": lambda: client.chat.completions.create(model="solo", messages=HI, stream=True),
        "completion": lambda: client.completions.create(model="solo", prompt="hi", stream=True),
        "response": lambda: client.responses.create(model="solo", input="hi", stream=True),
    }
    with pytest.raises((httpx.RemoteProtocolError, openai.APIError)):
        list(streams[call]())


def test_stream_left_early_is_ended_at_the_backend(client: OpenAI, a: MockControl) -> None:
    a.fail("hold", events=1)
    with client.chat.completions.create(model="solo", messages=HI, stream=True) as stream:
        next(iter(stream))
        eventually(lambda: a.counts().held == 1, "the backend waits in the middle of its stream")
    eventually(lambda: a.counts().held == 0, "the backend sees that the client has left")


# --- Exceptions.


def chat(client: OpenAI, model: str = "solo", **fields: Any) -> Any:
    return client.chat.completions.create(model=model, messages=HI, extra_body=fields)


FAILURES: dict[str, tuple[Callable[[OpenAI, str], Any], type[openai.APIStatusError], int, str, str | None]] = {
    "unknown key": (
        lambda client, _: chat(client.with_options(api_key="rk-unknown")),
        openai.AuthenticationError,
        401,
        "invalid_api_key",
        None,
    ),
    "wrong type": (
        lambda client, _: chat(client, max_tokens="many"),
        openai.BadRequestError,
        400,
        "validation_error",
        "max_tokens",
    ),
    "no messages": (
        lambda client, _: client.chat.completions.create(model="solo", messages=[]),
        openai.BadRequestError,
        400,
        "validation_error",
        "messages",
    ),
    "unknown model": (
        lambda client, _: chat(client, "nope"),
        openai.NotFoundError,
        404,
        "model_not_found",
        "model",
    ),
    "unknown model retrieved": (
        lambda client, _: client.models.retrieve("nope"),
        openai.NotFoundError,
        404,
        "model_not_found",
        "model",
    ),
    "forbidden model": (
        lambda client, limited: chat(client.with_options(api_key=limited), "gpt-4o"),
        openai.PermissionDeniedError,
        403,
        "forbidden",
        "model",
    ),
    "too large": (
        lambda client, _: chat(client, padding="x" * (8 * 1024 * 1024)),
        openai.APIStatusError,
        413,
        "payload_too_large",
        None,
    ),
    "wrong media type": (
        lambda client, _: client.with_options(default_headers={"content-type": "text/plain"}).completions.create(
            model="solo", prompt="hi"
        ),
        openai.APIStatusError,
        415,
        "unsupported_media_type",
        None,
    ),
}


@pytest.mark.parametrize(("fail", "error", "status", "code", "param"), FAILURES.values(), ids=FAILURES)
def test_error_is_the_clients_own_exception(
    *,
    client: OpenAI,
    limited_key: str,
    fail: Callable[[OpenAI, str], Any],
    error: type[openai.APIStatusError],
    status: int,
    code: str,
    param: str | None,
) -> None:
    with pytest.raises(error) as raised:
        fail(client, limited_key)
    found = raised.value
    assert (found.status_code, found.code, found.param) == (status, code, param)
    assert found.request_id
    assert found.type
    assert "Error code" in str(found)


def test_path_that_the_router_does_not_have_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.post("/audio/speech", cast_to=object)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"kind": "status", "status": 500}, 502, "backend_error"),
        ({"kind": "status", "status": 429}, 502, "backend_error"),
        ({"kind": "reset"}, 502, "backend_error"),
    ],
    ids=["500", "429", "reset"],
)
def test_failing_backend_is_an_internal_server_error(
    client: OpenAI, a: MockControl, fault: dict[str, Any], status: int, code: str
) -> None:
    a.fail(**fault)
    with pytest.raises(openai.InternalServerError) as raised:
        chat(client)
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert a.count() == 1


def test_async_errors_are_the_same(stack: Stack, a: MockControl) -> None:
    async def use(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.create(model="nope", messages=HI)

    with pytest.raises(openai.NotFoundError) as raised:
        run_async(stack, use)
    assert raised.value.code == "model_not_found"
    a.fail("status", status=500)

    async def again(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.create(model="solo", messages=HI, stream=True)

    with pytest.raises(openai.InternalServerError):
        run_async(stack, again)


def test_clients_own_retries_succeed_once_the_backend_does(client: OpenAI, a: MockControl) -> None:
    a.fail("status", status=503, times=2)
    answer = chat(client.with_options(max_retries=2))
    assert answer.choices[0].message.content.startswith("a heard")
    assert a.count() == 3


def test_client_does_not_retry_what_cannot_succeed(client: OpenAI, stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client.with_options(max_retries=2), max_tokens=0)
    assert stack.contacted() == 0


def test_backends_own_refusal_is_heard(client: OpenAI, a: MockControl) -> None:
    said = {
        "message": "Too long.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    a.fail("status", status=400, body={"error": said})
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client)
    assert raised.value.code == "context_length_exceeded"


def test_failover_is_not_seen_by_the_client(client: OpenAI, stack: Stack, a: MockControl) -> None:
    a.fail("status", status=500)
    backends = {
        client.chat.completions.with_raw_response.create(model="gpt-4o", messages=HI).headers["x-routing-backend"]
        for _ in range(8)
    }
    assert backends == {"b"}


def test_switched_off_backend_is_an_internal_server_error(client: OpenAI, stack: Stack) -> None:
    switch = [{"backend_id": "b", "enabled": True, "reason": "test"}]
    try:
        stack.apply(policy_of(stack.uris, models=MODELS, kill_switches=switch))
        with pytest.raises(openai.InternalServerError) as raised:
            chat(client, "killed")
        assert (raised.value.status_code, raised.value.code) == (503, "no_backend_available")
        assert stack.contacted() == 0
    finally:
        stack.apply(policy_of(stack.uris, models=MODELS))
