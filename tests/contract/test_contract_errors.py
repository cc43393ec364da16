"""Every reason for an error, produced for real, in both formats, as docs/openapi.yaml has it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest

from gateway.endpoints import OPENAI_PREFIXES
from gateway.errors import REFUSALS, Reason
from tests.contract.conftest import LEAK, World
from tests.contract.document import document
from tests.harness.calls import call, chat, inference
from tests.harness.raw import exchange
from xds.resources.local_replies import internal_replies, public_replies

pytestmark = pytest.mark.integration

INFERENCE, CHAT, MODELS = "/v1/inference", "/v1/chat/completions", "/v1/models"
BOTH = (INFERENCE, CHAT)
JSON = {"content-type": "application/json"}

Produce = Callable[[World, str], httpx.Response]


def post(client: httpx.Client, path: str, model: str = "gpt-4o", **fields: Any) -> httpx.Response:
    """A call of any POST endpoint."""
    if path == "/v1/responses":
        return client.post(path, json={"model": model, "input": "hi", **fields})
    return call(client, path, model, **fields)


def keyed(key: Callable[[World], str | None], **headers: str) -> Produce:
    """A good call with a key that is not."""

    def produce(world: World, path: str) -> httpx.Response:
        with world.client(key(world)) as client:
            client.headers.update(headers)
            return client.get(path) if path.startswith(MODELS) else post(client, path)

    return produce


def called(model: str = "gpt-4o", *, fault: Mapping[str, Any] | None = None, **fields: Any) -> Produce:
    """A call of a model, maybe while its backend fails."""

    def produce(world: World, path: str) -> httpx.Response:
        if fault:
            world.a.fail(**fault)
        with world.client() as client:
            return post(client, path, model, **fields)

    return produce


def sent(content: bytes | Callable[[], Iterator[bytes]], **headers: str) -> Produce:
    """A body as it stands."""

    def produce(world: World, path: str) -> httpx.Response:
        body = content if isinstance(content, bytes) else content()
        with world.client() as client:
            return client.post(path, content=body, headers=JSON | {n.replace("_", "-"): v for n, v in headers.items()})

    return produce


def upgrade(world: World, path: str) -> httpx.Response:
    head = f"POST {path} HTTP/1.1\r\nhost: router\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    return exchange(world.stack.http_port, head.encode(), method="POST", path=path)


def announced(world: World, path: str) -> httpx.Response:
    head = f"POST {path} HTTP/1.1\r\nhost: router\r\nx-api-key: {world.keys.good.key}\r\n"
    head += "content-type: application/json\r\ncontent-length: 9000000\r\n\r\n"
    return exchange(world.stack.http_port, head.encode(), method="POST", path=path)


def key_store_down(world: World, path: str) -> httpx.Response:
    with world.user_org.failing():
        return keyed(lambda _: f"rk-nobody-knows-{uuid.uuid4()}")(world, path)


def another_method(world: World, path: str) -> httpx.Response:
    with world.client() as client:
        return client.put(path)


def another_model(world: World, path: str) -> httpx.Response:
    with world.client() as client:
        return client.get(f"{MODELS}/nope") if path == MODELS else post(client, path, "nope")


def megabytes(count: int) -> Iterator[bytes]:
    yield b'{"model": "gpt-4o", "x": "'
    for _ in range(16 * count):
        yield b"x" * 65_536


def signed(signature: str | None) -> Produce:
    headers = {"x-hmac-signature": signature} if signature else {}
    return keyed(lambda world: world.keys.signed.key, **headers)


SERVED = ("/v1/inference", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
KEYED = (*SERVED, MODELS)

PRODUCERS: dict[Reason, list[tuple[tuple[str, ...], Produce]]] = {
    Reason.MALFORMED_REQUEST: [(BOTH, upgrade)],
    Reason.MALFORMED_BODY: [
        (SERVED, sent(b"{")),
        (BOTH, sent(b"")),
        (BOTH, sent(b'{"model": "\xff"}')),
        (BOTH, sent(b'{"model": "a", "model": "a"}')),
        (BOTH, sent(b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}")),
        (BOTH, sent(b'{"a": NaN}')),
        (BOTH, sent(b'{"a": 1e999}')),
        ((INFERENCE,), called(payload="{", content_type="application/json")),
    ],
    Reason.MISSING_FIELD: [(SERVED, sent(b'{"payload": "hi", "messages": []}'))],
    Reason.INVALID_FIELD: [
        ((CHAT,), called(messages=[])),
        ((CHAT,), called(stream="yes")),
        ((INFERENCE,), called(request_id="7")),
        ((INFERENCE,), called(metadata={"a": 1})),
        (SERVED, called(max_tokens=0, parameters={"max_tokens": 0})),
    ],
    Reason.CONFLICTING_KEYS: [(KEYED, keyed(lambda world: world.keys.good.key, **{"x-api-key": "rk-another"}))],
    Reason.KEY_MISSING: [(KEYED, keyed(lambda _: ""))],
    Reason.KEY_UNKNOWN: [(KEYED, keyed(lambda _: "rk-unknown")), (BOTH, keyed(lambda _: "x" * 600))],
    Reason.KEY_EXPIRED: [(KEYED, keyed(lambda world: world.keys.expired))],
    Reason.KEY_REVOKED: [(KEYED, keyed(lambda world: world.keys.revoked.key))],
    Reason.SIGNATURE_MISSING: [(SERVED, signed(None))],
    Reason.SIGNATURE_WRONG: [(SERVED, signed("ab" * 32)), (BOTH, signed("not hex"))],
    Reason.MODEL_FORBIDDEN: [(BOTH, keyed(lambda world: world.keys.other_model.key))],
    Reason.SCOPE_MISSING: [(KEYED, keyed(lambda world: world.keys.audit_only.key))],
    Reason.BACKENDS_FORBIDDEN: [(BOTH, called("private"))],
    Reason.PATH_UNKNOWN: [((*KEYED, "/", "/nope", "/v1/status/healthz", "/v2/chat/completions"), another_method)],
    Reason.MODEL_UNKNOWN: [(KEYED, another_model)],
    Reason.BODY_TOO_LARGE: [
        (BOTH, announced),
        (BOTH, sent(lambda: megabytes(9))),
    ],
    Reason.PAYLOAD_TOO_LARGE: [((INFERENCE,), called(payload="é" * 32_769))],
    Reason.MEDIA_TYPE: [
        (BOTH, sent(b"{}", content_type="text/plain")),
        (BOTH, sent(b"{}", content_type="application/json; charset=latin-1")),
        (BOTH, sent(b"{}", content_encoding="gzip")),
    ],
    Reason.BACKENDS_KILLED: [(SERVED, called("killed"))],
    Reason.NO_BACKEND: [(BOTH, called("sick"))],
    Reason.BACKEND_ERROR: [
        (BOTH, called("solo", fault={"kind": "reset"})),
        (BOTH, called("solo", fault={"kind": "close"})),
        *(
            (BOTH, called("solo", fault={"kind": "status", "status": status, "body": LEAK}))
            for status in (401, 403, 429, 500, 503, 529)
        ),
        ((INFERENCE,), called("solo", fault={"kind": "bad_json"})),
        ((INFERENCE,), called("solo", fault={"kind": "status", "status": 204, "body": ""})),
    ],
    Reason.BACKEND_TIMEOUT: [(BOTH, called("hasty", fault={"kind": "hang"}))],
    Reason.KEY_STORE_DOWN: [(KEYED, key_store_down)],
}
ELSEWHERE: dict[Reason, str] = {
    Reason.SERVICE_DOWN: "test_contract_outage.py, which takes ext_proc away",
    Reason.REQUEST_TIMEOUT: "test_request_that_never_ends_is_a_408, and Envoy's configuration for the rest",
    Reason.BACKEND_BUSY: "Envoy's configuration: no breaker is set that a test could trip",
    Reason.BUG: "tests/unit/extproc/test_pipeline.py: no request is known that meets one",
}


def cases() -> Iterator[Any]:
    for reason, ways in PRODUCERS.items():
        for number, way in enumerate(ways):
            paths, produce = way
            for path in paths:
                yield pytest.param(reason, path, produce, id=f"{reason.value}-{number}-{path}")


def is_openai(path: str) -> bool:
    return path.startswith(OPENAI_PREFIXES)


def test_every_reason_is_produced() -> None:
    assert {*PRODUCERS, *ELSEWHERE} == set(Reason)
    assert PRODUCERS.keys().isdisjoint(ELSEWHERE)


@pytest.mark.parametrize(("reason", "path", "produce"), list(cases()))
def test_error_is_as_documented(world: World, reason: Reason, path: str, produce: Produce) -> None:
    response = produce(world, path)
    refusal, openai = REFUSALS[reason], is_openai(path)
    assert response.status_code == refusal.status, response.text
    world.check_error(response, openai=openai, code=(refusal.openai_code if openai else refusal.code) or "")
    if reason is not Reason.PATH_UNKNOWN:
        world.document.check(response)


@pytest.mark.parametrize("reason", [Reason.BACKEND_ERROR, Reason.BACKEND_TIMEOUT])
@pytest.mark.parametrize("path", BOTH)
def test_error_of_the_last_backend_tells_which_it_was(world: World, reason: Reason, path: str) -> None:
    _, produce = PRODUCERS[reason][0]
    headers = produce(world, path).headers
    assert headers["x-routing-backend"] in {"a", "hasty"}
    assert float(headers["x-router-overhead-ms"]) > 0


@pytest.mark.parametrize(("status", "said"), [(400, "context_length_exceeded"), (404, "model_not_found"), (422, None)])
@pytest.mark.parametrize("path", BOTH)
def test_backends_own_refusal_is_heard(world: World, path: str, status: int, said: str | None) -> None:
    body = {"error": {"message": "Too many tokens.", "type": "invalid_request_error", "param": "x", "code": said}}
    response = called("solo", fault={"kind": "status", "status": status, "body": body})(world, path)
    assert response.status_code == status
    world.check(response)
    assert response.headers["x-routing-backend"] == "a"
    if path == CHAT:
        assert response.json() == body
    else:
        assert response.json()["error"] == "Too many tokens."


def test_request_that_never_ends_is_a_408(world: World) -> None:
    response = world.slow.response()
    assert response.status_code == 408
    assert response.json()["code"] == "REQUEST_TIMEOUT"


MALFORMED = {
    "no HTTP": b"\x00\x01\r\n\r\n",
    "a version that is none": b"GET / HTTP/9\r\n\r\n",
    "a header without a colon": b"GET / HTTP/1.1\r\nhost: router\r\nbad header\r\n\r\n",
    "two framings": b"POST / HTTP/1.1\r\nhost: router\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    "a length that is none": b"POST / HTTP/1.1\r\nhost: router\r\ncontent-length: x\r\n\r\n",
    "a huge header": b"GET / HTTP/1.1\r\nhost: router\r\nx: " + b"x" * 70_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("sent_bytes", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_http_gets_a_json_400(world: World, sent_bytes: bytes) -> None:
    response = exchange(world.stack.http_port, sent_bytes)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
    assert response.json()["code"] == "INVALID_REQUEST"
    world.check_secrecy(response)


@pytest.mark.parametrize("sent_bytes", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_http_gets_a_request_id(world: World, sent_bytes: bytes) -> None:
    response = exchange(world.stack.http_port, sent_bytes)
    assert response.headers.get("x-request-id")
    world.document.validator("/components/schemas/RouterError400").validate(response.json())


UNSUITABLE = {
    "redirect": {"kind": "status", "status": 302, "body": "", "headers": {"location": "http://10.1.2.3:8000/v1"}},
    "page": {"kind": "status", "status": 404, "body": f"<html>{LEAK}</html>", "headers": {"content-type": "text/html"}},
}


@pytest.mark.parametrize("fault", UNSUITABLE.values(), ids=UNSUITABLE)
def test_backends_redirects_and_pages_are_replaced(world: World, fault: dict[str, Any]) -> None:
    response = called("solo", fault=fault)(world, CHAT)
    assert response.headers["content-type"] == "application/json"
    assert "10.1.2.3" not in f"{response.headers}{response.text}"


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        pytest.param(CHAT, {"kind": "huge", "bytes": 20_000_000}, id="chat-huge"),
        pytest.param(INFERENCE, {"kind": "huge", "bytes": 20_000_000}, id="inference-huge"),
        *(pytest.param(path, {"kind": "stream_cut"}, id=f"{path}-cut") for path in BOTH),
    ],
)
def test_answer_that_breaks_off_is_the_backends_fault(world: World, path: str, fault: dict[str, Any]) -> None:
    response = called("solo", fault=fault)(world, path)
    assert response.status_code == 502
    world.check_error(response, openai=path == CHAT, code="backend_error" if path == CHAT else "BACKEND_ERROR")


def test_connect_is_no_way_in(world: World) -> None:
    head = f"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\nx-api-key: {world.keys.good.key}\r\n\r\n"
    assert exchange(world.stack.http_port, head.encode()).status_code == 404


def mapped() -> Iterator[Any]:
    for name, config in (("public", public_replies()), ("internal", internal_replies())):
        for number, mapper in enumerate(config.mappers):
            yield pytest.param(mapper, id=f"{name}-{number}")


@pytest.mark.parametrize("mapper", list(mapped()))
def test_every_reply_that_envoy_is_given_is_documented(mapper: Any) -> None:
    said = mapper.body_format_override.text_format_source.inline_string
    said = re.sub(r"%(REQ|RESP)\(x-request-id\)%", str(uuid.uuid4()), said)
    body = json.loads(said)
    form = "OpenAI" if isinstance(body["error"], dict) else "Router"
    document().validator(f"/components/schemas/{form}Error{mapper.status_code}").validate(body)


BAD_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no model": (CHAT, {"messages": [{"role": "user"}]}),
    "model is a number": (CHAT, chat() | {"model": 5}),
    "no messages": (CHAT, {"model": "gpt-4o"}),
    "messages are empty": (CHAT, chat(messages=[])),
    "message is text": (CHAT, chat(messages=["hi"])),
    "role is missing": (CHAT, chat(messages=[{"content": "hi"}])),
    "content is a number": (CHAT, chat(messages=[{"role": "user", "content": 1}])),
    "stream is text": (CHAT, chat(stream="yes")),
    "include_usage is text": (CHAT, chat(stream_options={"include_usage": "yes"})),
    "max_tokens is 0": (CHAT, chat(max_tokens=0)),
    "temperature is text": (CHAT, chat(temperature="hot")),
    "prompt is empty": ("/v1/completions", {"model": "gpt-4o", "prompt": ""}),
    "input is an object": ("/v1/embeddings", {"model": "gpt-4o", "input": {}}),
    "no input": ("/v1/responses", {"model": "gpt-4o"}),
    "request_id is no UUID": (INFERENCE, inference(request_id="7")),
    "no payload": (INFERENCE, {"request_id": str(uuid.uuid4()), "model": "gpt-4o"}),
    "content_type is unknown": (INFERENCE, inference(content_type="text/html")),
    "metadata is not text": (INFERENCE, inference(metadata={"a": 1})),
    "parameters name the model": (INFERENCE, inference(parameters={"model": "x"})),
    "parameters stream": (INFERENCE, inference(parameters={"stream": True})),
}


@pytest.mark.parametrize(("path", "body"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_router_and_document_refuse_the_same_requests(world: World, path: str, body: dict[str, Any]) -> None:
    with world.client() as client:
        response = client.post(path, json=body)
    assert response.status_code == 400
    world.check(response)
    assert (response.json()["error"] if is_openai(path) else response.json())["param"]
    pointer = f"/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    assert not world.document.validator(pointer).is_valid(body)
