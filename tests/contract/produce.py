"""Ways to make the router refuse a request: for each reason, endpoints and what to send them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from gateway.endpoints import AUDIT_PATH
from gateway.errors import Reason
from tests.contract.conftest import LEAK, World
from tests.harness.calls import call
from tests.harness.raw import exchange

INFERENCE, CHAT, MODELS = "/v1/inference", "/v1/chat/completions", "/v1/models"
EVENTS, RECEIPT = AUDIT_PATH, f"{AUDIT_PATH}/{uuid.UUID(int=7)}"
READ = (MODELS, EVENTS, RECEIPT)
BOTH = (INFERENCE, CHAT)
JSON = {"content-type": "application/json"}

Produce = Callable[[World, str], httpx.Response]
Ways = dict[Reason, list[tuple[tuple[str, ...], Produce]]]


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
            return client.get(path) if path in READ else post(client, path)

    return produce


def asked(**parameters: str) -> Produce:
    """A question with such parameters."""

    def produce(world: World, path: str) -> httpx.Response:
        with world.client() as client:
            return client.get(path, params=parameters)

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
SCOPED = (*SERVED, MODELS)
KEYED = (*SERVED, *READ)

PRODUCERS: Ways = {
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
        ((EVENTS,), asked(limit="0")),
    ],
    Reason.CONFLICTING_KEYS: [(KEYED, keyed(lambda world: world.keys.good.key, **{"x-api-key": "rk-another"}))],
    Reason.KEY_MISSING: [(KEYED, keyed(lambda _: ""))],
    Reason.KEY_UNKNOWN: [(KEYED, keyed(lambda _: "rk-unknown")), (BOTH, keyed(lambda _: "x" * 600))],
    Reason.KEY_EXPIRED: [(KEYED, keyed(lambda world: world.keys.expired))],
    Reason.KEY_REVOKED: [(KEYED, keyed(lambda world: world.keys.revoked.key))],
    Reason.SIGNATURE_MISSING: [(SERVED, signed(None))],
    Reason.SIGNATURE_WRONG: [(SERVED, signed("ab" * 32)), (BOTH, signed("not hex"))],
    Reason.MODEL_FORBIDDEN: [(BOTH, keyed(lambda world: world.keys.other_model.key))],
    Reason.SCOPE_MISSING: [
        (SCOPED, keyed(lambda world: world.keys.audit_only.key)),
        ((EVENTS, RECEIPT), keyed(lambda world: world.keys.models_only.key)),
    ],
    Reason.BACKENDS_FORBIDDEN: [(BOTH, called("private"))],
    Reason.PATH_UNKNOWN: [((*KEYED, "/", "/nope", "/v1/status/healthz", "/v2/chat/completions"), another_method)],
    Reason.MODEL_UNKNOWN: [(SCOPED, another_model)],
    Reason.REQUEST_UNKNOWN: [((RECEIPT,), keyed(lambda world: world.keys.good.key))],
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
            for status in (401, 402, 403, 429, 500, 503, 529)
        ),
        ((INFERENCE,), called("solo", fault={"kind": "bad_json"})),
        ((INFERENCE,), called("solo", fault={"kind": "status", "status": 204, "body": ""})),
    ],
    Reason.BACKEND_TIMEOUT: [(BOTH, called("hasty", fault={"kind": "hang"}))],
    Reason.KEY_STORE_DOWN: [(KEYED, key_store_down)],
}
