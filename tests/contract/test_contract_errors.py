"""Every reason for an error, produced for real, in both formats, as docs/openapi.yaml has it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from gateway import names
from gateway.endpoints import OPENAI_PREFIXES
from gateway.errors import REFUSALS, Reason
from tests.contract.conftest import LEAK, World
from tests.contract.document import document
from tests.contract.produce import BOTH, CHAT, INFERENCE, Produce, called
from tests.contract.produce import PRODUCERS as OF_REQUESTS
from tests.contract.produce_limits import PRODUCERS as OF_LIMITS
from tests.harness.calls import chat, inference
from tests.harness.raw import exchange
from xds.resources.local_replies import internal_replies, public_replies

pytestmark = pytest.mark.integration

PRODUCERS = {
    reason: [*OF_REQUESTS.get(reason, []), *OF_LIMITS.get(reason, [])] for reason in {**OF_REQUESTS, **OF_LIMITS}
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


@pytest.mark.parametrize(
    ("status", "said"),
    [(400, "context_length_exceeded"), (404, "model_not_found"), (409, "conflict"), (422, None)],
)
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


FEIGNED = dict.fromkeys((*names.RATE_LIMIT_HEADERS, names.HEADER_WARNING, names.HEADER_IDEMPOTENT_REPLAY), "7")
ADVISED = {"retry-after": "9", "retry-after-ms": "9000", "x-should-retry": "true"}


@pytest.mark.parametrize("status", [400, 409, 422])
@pytest.mark.parametrize("path", BOTH)
def test_backend_advises_on_its_own_refusal_and_says_nothing_in_the_routers_name(
    world: World, path: str, status: int
) -> None:
    body = {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}}
    fault = {"kind": "status", "status": status, "body": body, "headers": FEIGNED | ADVISED}
    response = called("solo", fault=fault)(world, path)
    assert response.status_code == status
    world.check(response)
    assert ADVISED.items() <= dict(response.headers).items()
    assert FEIGNED.keys().isdisjoint(response.headers)


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
