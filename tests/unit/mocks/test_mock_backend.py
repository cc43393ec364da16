"""A mock backend over real sockets: formats, faults, the journal."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from openai import OpenAI

from mocks.control import AsyncMockControl, MockControl
from mocks.faults import FaultInvalid
from mocks.process import MockProcess, mock_backend

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello brave world"}]}
CHAT_PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def process() -> Iterator[MockProcess]:
    with mock_backend("mock-a") as started:
        yield started


@pytest.fixture
def backend(process: MockProcess) -> Iterator[MockControl]:
    process.control.heal()
    process.control.clear()
    yield process.control
    process.control.heal()
    process.control.release()


@pytest.fixture
def client(process: MockProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=process.url, timeout=10, trust_env=False) as opened:
        yield opened


@pytest.fixture
def openai(process: MockProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{process.url}/v1", api_key="k", max_retries=0) as opened:
        yield opened


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition of another process, at most 10 s."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "never became true"
        time.sleep(0.005)


def raw(process: MockProcess, request: bytes) -> bytes:
    """Bytes that answer a raw request until the server closes."""
    url = urlsplit(process.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as sock:
        sock.sendall(request)
        received = b""
        while data := sock.recv(65536):
            received += data
        return received


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


# --- Formats


def test_chat_names_the_backend_and_counts_words(backend: MockControl, openai: OpenAI) -> None:
    answer = openai.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hello brave world"}])
    assert answer.model == "gpt-4o"
    assert answer.choices[0].message.content == "mock-a heard 3 tokens: hello brave world"
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 7)


def test_chat_stream_ends_with_usage_when_asked(backend: MockControl, client: httpx.Client) -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(client.post(CHAT_PATH, json=body).text)
    assert done == "[DONE]"
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"]["completion_tokens"] == 7
    pieces = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == "mock-a heard 3 tokens: hello brave world"


def test_chat_stream_has_no_usage_unasked(backend: MockControl, client: httpx.Client) -> None:
    response = client.post(CHAT_PATH, json=CHAT | {"stream": True})
    assert "usage" not in response.text
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("field", "words"), [({"mock_events": 50}, 50), ({"max_tokens": 2}, 2), ({"max_tokens": 500}, 7)], ids=str
)
def test_number_of_words_follows_the_request(
    backend: MockControl, client: httpx.Client, field: dict[str, int], words: int
) -> None:
    answer = client.post(CHAT_PATH, json=CHAT | field).json()
    assert answer["usage"]["completion_tokens"] == words
    assert answer["choices"][0]["finish_reason"] == ("length" if field == {"max_tokens": 2} else "stop")


def test_completion_stream_gives_the_same_text(backend: MockControl, openai: OpenAI) -> None:
    plain = openai.completions.create(model="m", prompt="one two")
    stream = openai.completions.create(model="m", prompt="one two", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text


def test_completion_in_text_format(backend: MockControl, client: httpx.Client) -> None:
    backend.completions_format("text")
    answer = client.post("/v1/completions", json={"model": "m", "prompt": "one two"}).json()
    backend.completions_format("openai")
    assert (answer["text"], answer["tokens_used"]) == ("mock-a heard 2 tokens: one two", 8)


def test_embeddings_are_the_same_for_the_same_text(backend: MockControl, openai: OpenAI) -> None:
    first = openai.embeddings.create(model="e", input=["a b", "c"])
    second = openai.embeddings.create(model="e", input=["a b", "c"], encoding_format="float")
    assert first.data == second.data
    assert first.usage.prompt_tokens == 3
    assert first.data[0].embedding != first.data[1].embedding


def test_responses_plain_and_streamed_agree(backend: MockControl, openai: OpenAI) -> None:
    plain = openai.responses.create(model="r", input="say it")
    streamed = list(openai.responses.create(model="r", input="say it", stream=True))
    completed = streamed[-1]
    assert completed.type == "response.completed"
    assert completed.response.output_text == plain.output_text == "mock-a heard 2 tokens: say it"
    assert completed.response.usage == plain.usage
    assert [e.sequence_number for e in streamed] == list(range(len(streamed)))


def test_models_and_health(backend: MockControl, client: httpx.Client) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["gpt-4o", "text-embedding-3-small"]
    assert client.get("/health").status_code == 200


def test_any_path_prefix_works_and_is_reported(backend: MockControl, client: httpx.Client) -> None:
    response = client.post(f"/base/x{CHAT_PATH}?a=1", json=CHAT)
    assert response.json()["mock"] == {"backend": "mock-a", "path": f"/base/x{CHAT_PATH}"}
    assert response.headers["x-mock-path"] == f"/base/x{CHAT_PATH}?a=1"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"model": 1}'], ids=str)
def test_bad_body_is_a_400(backend: MockControl, client: httpx.Client, body: bytes) -> None:
    assert client.post(CHAT_PATH, content=body).status_code == 400


def test_unknown_path_is_a_404(backend: MockControl, client: httpx.Client) -> None:
    assert client.get("/v1/nothing").status_code == 404


# --- Faults


def test_status_fault_with_headers_heals_after_its_times(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("status", status=429, headers={"retry-after": "7"}, times=2)
    answers = [client.post(CHAT_PATH, json=CHAT) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["retry-after"] == "7"
    assert answers[0].json()["error"]["type"] == "server_error"


def test_fault_header_concerns_one_request(backend: MockControl, client: httpx.Client) -> None:
    failed = client.post(CHAT_PATH, json=CHAT, headers={"x-mock-fault": "status=503"})
    assert failed.status_code == 503
    assert client.post(CHAT_PATH, json=CHAT).status_code == 200


def test_hang_ends_when_the_client_leaves(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("hang")
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT_PATH, json=CHAT, timeout=httpx.Timeout(10, read=0.05))
    until(lambda: any(request.disconnected for request in backend.requests()))
    assert backend.counts().open == 0


REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}"


def test_reset_is_a_tcp_rst(backend: MockControl, process: MockProcess) -> None:
    backend.fail("reset")
    with pytest.raises(ConnectionResetError):
        raw(process, REQUEST)
    assert not backend.requests()[0].answered


def test_close_is_a_fin_without_a_byte(backend: MockControl, process: MockProcess) -> None:
    backend.fail("close")
    assert raw(process, REQUEST) == b""


def test_slow_waits_before_the_first_byte(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("slow", delay_s=0.2)
    began = time.monotonic()
    assert client.post(CHAT_PATH, json=CHAT).status_code == 200
    assert time.monotonic() - began >= 0.2


def test_events_can_be_spaced(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("slow", event_delay_s=0.05)
    began = time.monotonic()
    client.post(CHAT_PATH, json=CHAT | {"stream": True, "mock_events": 3})
    assert time.monotonic() - began >= 0.2  # three words, the finish, [DONE]: four gaps


def test_stream_cut_breaks_the_body_after_n_events(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("stream_cut", events=2)
    received: list[str] = []
    with (
        client.stream("POST", CHAT_PATH, json=CHAT | {"stream": True}) as response,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        received.extend(response.iter_text())
    assert len(events("".join(received))) == 2


def test_clean_cut_ends_the_body_without_done(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("stream_clean_cut", events=2)
    text = client.post(CHAT_PATH, json=CHAT | {"stream": True}).text
    assert len(events(text)) == 2
    assert "[DONE]" not in text


def test_plain_answer_can_be_cut(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("stream_cut")
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(CHAT_PATH, json=CHAT)


def test_held_streams_go_on_after_the_release(backend: MockControl, process: MockProcess) -> None:
    backend.fail("hold")
    texts: list[str] = []

    def read() -> None:
        texts.append(httpx.post(f"{process.url}{CHAT_PATH}", json=CHAT | {"stream": True}, timeout=30).text)

    readers = [threading.Thread(target=read) for _ in range(10)]
    for reader in readers:
        reader.start()
    until(lambda: backend.counts().held == 10)
    backend.release()
    for reader in readers:
        reader.join()
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    assert len(texts) == 10


def test_held_request_notices_that_its_client_left(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("hold")
    with client.stream("POST", CHAT_PATH, json=CHAT | {"stream": True}) as response:
        assert next(response.iter_text()).startswith("data: ")
    until(lambda: backend.counts().held == 0)
    assert backend.requests()[0].disconnected


def test_huge_answer_has_exactly_the_bytes(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("huge", bytes=3_000_000)
    response = client.post(CHAT_PATH, json=CHAT)
    assert len(response.content) == 3_000_000
    assert response.json()["model"] == "gpt-4o"


def test_bad_json_is_a_200_that_does_not_parse(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("bad_json")
    response = client.post(CHAT_PATH, json=CHAT)
    assert response.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        response.json()


def test_flaky_fails_some_and_answers_some(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("flaky", p=0.5, status=500)
    statuses = {client.post(CHAT_PATH, json=CHAT).status_code for _ in range(60)}
    assert statuses == {200, 500}


def test_health_fails_apart_from_requests(backend: MockControl, client: httpx.Client) -> None:
    backend.fail("health", status=503)
    assert client.get("/health").status_code == 503
    assert client.post(CHAT_PATH, json=CHAT).status_code == 200
    backend.fail("status", status=500)
    backend.heal()
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "fault",
    [{"kind": "nonsense"}, {"kind": "status", "status": "500"}, {"kind": "slow", "x": 1}, {"kind": "slow", "p": -1}],
    ids=str,
)
def test_fault_that_makes_no_sense_is_refused(backend: MockControl, fault: dict[str, object]) -> None:
    with pytest.raises(FaultInvalid):
        backend.fail(**fault)  # type: ignore[arg-type]


# --- The journal


def test_journal_keeps_the_request_as_it_was_sent(backend: MockControl, process: MockProcess) -> None:
    request = (
        b"POST /p/v1/chat/completions?q=1 HTTP/1.1\r\nHost: example.test\r\nX-ODD-case: 1\r\n"
        b"Authorization: Bearer one\r\nauthorization: two\r\nConnection: close\r\nContent-Length: 4\r\n\r\n\x00\xffab"
    )
    raw(process, request)
    (received,) = backend.requests()
    assert received.path == "/p/v1/chat/completions?q=1"
    assert received.host == "example.test"
    assert [name for name, _ in received.headers][:4] == ["Host", "X-ODD-case", "Authorization", "authorization"]
    assert received.all_headers("authorization") == ("Bearer one", "two")
    assert received.body == b"\x00\xffab"


def test_health_and_control_requests_do_not_count(backend: MockControl, client: httpx.Client) -> None:
    client.get("/health")
    client.post(CHAT_PATH, json=CHAT)
    counts = backend.counts()
    assert (counts.total, counts.health, counts.open) == (1, 1, 0)
    backend.clear()
    assert backend.count() == 0


def test_journal_can_be_told_to_keep_no_bodies(backend: MockControl, client: httpx.Client) -> None:
    backend.keep_bodies(False)
    client.post(CHAT_PATH, json=CHAT)
    backend.keep_bodies(True)
    client.post(CHAT_PATH, json=CHAT)
    first, second = backend.requests()
    assert first.body == b""
    assert second.json() == CHAT
    assert backend.requests(last=1) == (second,)


async def test_async_control_does_the_same(backend: MockControl, process: MockProcess) -> None:
    async with AsyncMockControl(process.url) as control, httpx.AsyncClient(base_url=process.url) as client:
        await control.fail("status", status=500)
        await client.post(CHAT_PATH, json=CHAT)
        await control.heal()
        await control.release()
        assert [r.fault for r in await control.requests()] == ["status"]
        assert await control.count() == 1
        await control.clear()
        assert await control.count() == 0


# --- HTTP


def test_pipelined_requests_are_answered_in_order(backend: MockControl, process: MockProcess) -> None:
    first = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"
    last = b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    answer = raw(process, first + last)
    assert answer.index(b'"status"') < answer.index(b'"data"')


def test_expect_continue_is_honoured(backend: MockControl, process: MockProcess) -> None:
    head = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    url = urlsplit(process.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as sock:
        sock.sendall(head.replace(b"Length: 0", b"Length: 1"))
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(b"x")
        assert sock.recv(100).startswith(b"HTTP/1.1 404")


def test_garbage_is_a_400(backend: MockControl, process: MockProcess) -> None:
    assert raw(process, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_unix_socket(tmp_path: object) -> None:
    path = f"{tmp_path}/m.sock"
    with mock_backend("mock-u", "--unix", path) as started:
        assert started.url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            assert client.get("http://u/health").json()["id"] == "mock-u"
