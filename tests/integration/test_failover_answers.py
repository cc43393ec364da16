"""What a backend's answer becomes: errors that pass through, errors that do not, streams that break, large bodies."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness.calls import CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE, call, chat, error_code, inference
from tests.harness.stack import KEY, Stack, model_of, policy_of, running_stack

pytestmark = pytest.mark.integration

BODY_MAX_BYTES = 8 * 1024 * 1024
ANSWER_MAX_BYTES = 16 * 1024 * 1024
PAYLOAD_MAX_BYTES = 64 * 1024
JSON = {"content-type": "application/json"}
both_formats = pytest.mark.parametrize("path", [CHAT, INFERENCE])


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """``gpt-4o`` prefers a and falls back to b, which has its own name for it."""
    with running_stack(workers=1) as running:
        split = [model_of({"a": 100, "b": 0})]
        running.apply(
            policy_of(
                running.uris, models=split, backend={"timeout": "20s"}, backend_of={"b": {"model_variant": "b/m"}}
            )
        )
        yield running


@pytest.fixture(autouse=True)
def _fresh(stack: Stack) -> None:
    stack.reset()


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as client:
        yield client


# --- Errors


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_the_requests_own_fault_passes_through_untouched(
    stack: Stack, client: httpx.Client, endpoint: str, status: int
) -> None:
    said = '{ "error": {"message": "n must be 1", "code":null, "n": 0.70}}\n'
    headers = {"content-type": "application/json; charset=utf-8", "x-should-retry": "false"}
    stack.mocks["a"].fail("status", status=status, body=said, headers=headers)
    response = call(client, endpoint)
    assert response.status_code == status
    assert response.text == said
    assert {name: response.headers[name] for name in headers} == headers
    assert response.headers["x-routing-backend"] == "a"
    assert response.headers["x-routing-decision"] == "PRIMARY"
    assert stack.contacted() == 1


@pytest.mark.parametrize("status", [400, 404, 422])
def test_an_inference_call_is_told_of_its_own_fault(stack: Stack, client: httpx.Client, status: int) -> None:
    stack.mocks["a"].fail("status", status=status, body={"error": {"message": "n must be 1", "code": None}})
    response = call(client, INFERENCE)
    assert response.status_code == status
    assert error_code(response) == "INVALID_REQUEST"
    assert response.json()["error"] == "n must be 1"
    assert stack.contacted() == 1


@both_formats
@pytest.mark.parametrize("status", [401, 402, 403])
def test_our_own_bad_credential_or_empty_account_fails_over(
    stack: Stack, client: httpx.Client, status: int, path: str
) -> None:
    stack.mocks["a"].fail("status", status=status)
    response = call(client, path)
    assert response.status_code == 200
    assert response.headers["x-routing-backend"] == "b"
    assert response.headers["x-routing-decision"] == "FAILOVER"


@both_formats
@pytest.mark.parametrize("status", [401, 402, 403])
def test_our_own_bad_credential_or_empty_account_everywhere_is_a_backend_error(
    stack: Stack, client: httpx.Client, status: int, path: str
) -> None:
    said = {"error": {"message": "Incorrect API key provided: sk-ours", "code": "invalid_api_key"}}
    for mock in stack.mocks.values():
        mock.fail("status", status=status, body=said, headers={"www-authenticate": 'Bearer realm="provider"'})
    response = call(client, path)
    assert response.status_code == 502
    assert error_code(response) == "BACKEND_ERROR"
    assert "sk-ours" not in response.text
    assert "Incorrect" not in response.text
    assert "www-authenticate" not in response.headers
    assert [mock.count() for mock in stack.mocks.values()] == [1, 1]


# --- Streams


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_a_stream_cut_in_the_middle_breaks_and_is_not_sent_again(
    stack: Stack, client: httpx.Client, endpoint: str
) -> None:
    stack.mocks["a"].fail("stream_cut", events=2)
    received: list[bytes] = []
    with client.stream("POST", endpoint, json=chat(stream=True, prompt="hi")) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            received.extend(response.iter_raw())
    text = b"".join(received)
    assert text.count(b"data: ") == 2
    assert b"[DONE]" not in text
    assert stack.mocks["a"].count() == 1
    assert stack.mocks["b"].count() == 0


def test_an_answer_cut_in_the_middle_is_no_success(stack: Stack, client: httpx.Client) -> None:
    for mock in stack.mocks.values():
        mock.fail("stream_cut")
    try:
        response = call(client, CHAT)
    except httpx.RemoteProtocolError:
        return  # visibly broken
    assert response.status_code >= 500
    error_code(response)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("events", [0, 1, 3])
def test_a_stream_that_ends_too_early_ends_with_an_error_event(
    stack: Stack, client: httpx.Client, endpoint: str, events: int
) -> None:
    stack.mocks["a"].fail("stream_clean_cut", events=events)
    response = client.post(endpoint, json=chat(stream=True, prompt="hi"))
    *before, last, end = response.text.split("\n\n")
    assert end == ""
    assert len(before) == events
    assert last.startswith('data: {"error"')
    error = json.loads(last.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "backend_error"
    assert stack.mocks["b"].count() == 0


def test_a_whole_stream_has_no_error_event(stack: Stack, client: httpx.Client) -> None:
    response = client.post(CHAT, json=chat(stream=True))
    assert response.text.endswith("data: [DONE]\n\n")
    assert "error" not in response.text
    assert '"usage":{' not in response.text


def test_a_stream_on_the_second_backend_is_watched_too(stack: Stack, client: httpx.Client) -> None:
    stack.mocks["a"].fail("status", status=500)
    stack.mocks["b"].fail("stream_clean_cut", events=1)
    response = client.post(CHAT, json=chat(stream=True))
    assert response.headers["x-routing-backend"] == "b"
    assert response.text.split("\n\n")[-2].startswith('data: {"error"')


# --- Large bodies


def of_size(size: int, **fields: Any) -> bytes:
    """A chat call of exactly so many bytes, with characters that take more than one."""
    body = json.dumps(chat(**fields) | {"padding": "é"}, ensure_ascii=False).encode()
    return body[:-2] + b"x" * (size - len(body)) + body[-2:]


def in_chunks(body: bytes) -> Iterator[bytes]:
    """The body in pieces, so that it is sent chunked."""
    for start in range(0, len(body), 100_000):
        yield body[start : start + 100_000]


framed = pytest.mark.parametrize("framing", ["content-length", "chunked"])


def post(client: httpx.Client, body: bytes, framing: str) -> httpx.Response:
    return client.post(CHAT, content=body if framing == "content-length" else in_chunks(body), headers=JSON)


@framed
@pytest.mark.parametrize("below", [0, 1000], ids=["at-the-limit", "below-it"])
def test_a_large_body_fails_over(stack: Stack, client: httpx.Client, framing: str, below: int) -> None:
    stack.mocks["a"].fail("status", status=500)
    body = of_size(BODY_MAX_BYTES - below)
    response = post(client, body, framing)
    assert response.status_code == 200, response.text
    assert response.headers["x-routing-decision"] == "FAILOVER"
    [first], [second] = stack.mocks["a"].requests(), stack.mocks["b"].requests()
    assert first.body == body
    assert second.body == body.replace(b'"gpt-4o"', b'"b/m"', 1)


def test_a_large_stream_fails_over_with_what_the_router_adds(stack: Stack, client: httpx.Client) -> None:
    stack.mocks["a"].fail("reset")
    body = of_size(BODY_MAX_BYTES, stream=True)
    response = post(client, body, "content-length")
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    [received] = stack.mocks["b"].requests()
    added = b'{"stream_options":{"include_usage":true},'
    assert received.body == added + body[1:].replace(b'"gpt-4o"', b'"b/m"', 1)


@framed
def test_a_body_over_the_limit_is_refused(stack: Stack, client: httpx.Client, framing: str) -> None:
    response = post(client, of_size(BODY_MAX_BYTES + 1), framing)
    assert response.status_code == 413
    assert error_code(response) == "PAYLOAD_TOO_LARGE"
    assert stack.contacted() == 0


@pytest.mark.parametrize(
    ("path", "framing"),
    [
        (CHAT, "content-length"),
        (CHAT, "chunked"),
        (INFERENCE, "content-length"),
        (INFERENCE, "chunked"),
    ],
)
def test_a_body_far_over_the_limit_is_refused_before_it_is_sent(stack: Stack, path: str, framing: str) -> None:
    """The answer comes while the client still waits with the rest of its body, however much that is."""
    length = 64 * BODY_MAX_BYTES
    head = [f"POST {path} HTTP/1.1", "host: router", f"authorization: Bearer {KEY}", "content-type: application/json"]
    head += [f"content-length: {length}" if framing == "content-length" else "transfer-encoding: chunked", "", ""]
    piece = b"x" * 65_536
    with socket.create_connection((urlsplit(stack.url).hostname, urlsplit(stack.url).port or 0), timeout=30) as client:
        client.sendall("\r\n".join(head).encode())
        if framing == "chunked":
            # A few pieces more than the router buffers, and then silence.
            for _ in range((ANSWER_MAX_BYTES + 256 * 1024) // len(piece)):
                client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        answer = b""
        while b"}" not in answer:
            got = client.recv(65_536)
            assert got, answer
            answer += got
    assert answer.startswith(b"HTTP/1.1 413 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert (error if path == INFERENCE else error["error"])["code"].upper() == "PAYLOAD_TOO_LARGE"
    assert stack.contacted() == 0


@pytest.mark.parametrize("character", ["x", "é", "🙂"], ids=["1-byte", "2-bytes", "4-bytes"])
def test_the_payload_limit_is_exact(stack: Stack, client: httpx.Client, character: str) -> None:
    largest = character * (PAYLOAD_MAX_BYTES // len(character.encode()))
    assert client.post(INFERENCE, json=inference(payload=largest)).status_code == 200
    assert stack.contacted() == 1
    response = client.post(INFERENCE, json=inference(payload=f"{largest}x"))
    assert response.status_code == 413
    assert error_code(response) == "PAYLOAD_TOO_LARGE"
    assert stack.contacted() == 1


def test_the_largest_payload_fails_over(stack: Stack, client: httpx.Client) -> None:
    stack.mocks["a"].fail("status", status=500)
    payload = "é" * (PAYLOAD_MAX_BYTES // 2)
    response = client.post(INFERENCE, json=inference(payload=payload))
    assert response.headers["x-routing-decision"] == "FAILOVER"
    [received] = stack.mocks["b"].requests()
    assert received.json() == {"model": "b/m", "prompt": payload}


def test_a_large_body_over_http2_fails_over(stack: Stack) -> None:
    stack.mocks["a"].fail("status", status=500)
    body = of_size(BODY_MAX_BYTES)
    with stack.client(http1=False, http2=True) as client:
        response = client.post(CHAT, content=body, headers=JSON)
    assert response.http_version == "HTTP/2"
    assert response.status_code == 200, response.text
    assert response.headers["x-routing-decision"] == "FAILOVER"
    [received] = stack.mocks["b"].requests()
    assert received.body == body.replace(b'"gpt-4o"', b'"b/m"', 1)


@both_formats
@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_a_large_answer_arrives_whole(stack: Stack, path: str, http2: bool) -> None:
    size = ANSWER_MAX_BYTES - 1024 * 1024
    stack.mocks["a"].fail("huge", bytes=size)
    with stack.client(http1=not http2, http2=http2) as client:
        response = call(client, path)
    assert response.status_code == 200, response.text
    assert response.headers["x-routing-backend"] == "a"
    answer = response.json()
    assert len(json.dumps(answer if path == CHAT else answer["output"])) == size


@both_formats
def test_an_answer_larger_than_the_router_holds_is_an_error_of_the_backend(
    stack: Stack, client: httpx.Client, path: str
) -> None:
    for mock in stack.mocks.values():
        mock.fail("huge", bytes=ANSWER_MAX_BYTES + 1024 * 1024)
    response = call(client, path)
    assert response.status_code == 502
    assert error_code(response) == "BACKEND_ERROR"
