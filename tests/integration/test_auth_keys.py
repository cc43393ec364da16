"""Callers without a good key reach no backend, in an environment that is not development."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.calls import call, chat, error_code, inference
from tests.harness.keys import KeyStoreCommands, MadeKey, UserOrg, add_expired
from tests.harness.process import eventually
from tests.harness.raw import connected, read_response
from tests.harness.stack import Stack, model_of, running_stack

pytestmark = pytest.mark.integration

CHAT, INFERENCE, MODELS = "/v1/chat/completions", "/v1/inference", "/v1/models"
EXPIRED = "rk-expired"
MODELS_OF_POLICY = [
    model_of({"a": 1}),
    model_of({"a": 1}, model="other"),
    model_of({"a": 1}, model="of-globex", organization_id="globex"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    good: MadeKey
    revoked: MadeKey
    limited: MadeKey
    models_only: MadeKey
    audit_only: MadeKey
    admin: MadeKey
    signing: MadeKey
    signed: MadeKey
    globex: MadeKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A router of staging, its keys and the user-org-service behind it."""

    stack: Stack
    keys: Keys
    store: KeyStoreCommands
    user_org: UserOrg

    def send(self, key: str | None, path: str = CHAT, model: str = "gpt-4o", **headers: str) -> httpx.Response:
        with self.stack.client(key, verify=False) as client:
            client.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
            return client.get(path) if path == MODELS else call(client, path, model)

    def post(self, key: str, path: str, content: bytes, **headers: str) -> httpx.Response:
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
        with self.stack.client(key, verify=False) as client:
            return client.post(path, content=content, headers=sent)

    def assert_refused(self, response: httpx.Response, status: int, code: str) -> None:
        openai = {"AUTH_INVALID": "INVALID_API_KEY"}
        path = response.request.url.path
        assert (response.status_code, error_code(response)) == (
            status,
            code if path == INFERENCE else openai.get(code, code),
        )
        assert self.stack.contacted() == 0


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    path: Path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    store = KeyStoreCommands("--file", str(path))
    keys = Keys(
        good=store.create(),
        revoked=store.create(),
        limited=store.create("--model", "other"),
        models_only=store.create("--scope", "models"),
        audit_only=store.create("--scope", "audit"),
        admin=store.create("--scope", "admin"),
        signing=store.create("--signing"),
        signed=store.create("--require-signature"),
        globex=store.create(org="globex"),
    )
    store.revoke(keys.revoked)
    add_expired(path, EXPIRED)
    with UserOrg().running() as user_org:
        environ = {
            "ENVIRONMENT": "staging",
            "KEY_FILE": str(path),
            "USER_ORG_SERVICE_URL": user_org.url,
            "USER_ORG_TIMEOUT_S": "4",
        }
        # One worker: the cache of answers is each worker's own.
        with running_stack(mocks=("a",), workers=1, environ=environ, models=MODELS_OF_POLICY) as stack:
            yield Door(stack=stack, keys=keys, store=store, user_org=user_org)


@pytest.fixture(autouse=True)
def _fresh(door: Door) -> None:
    door.stack.reset()


# --- Keys.


@pytest.mark.parametrize("path", [CHAT, INFERENCE, MODELS])
def test_good_key_is_let_in(door: Door, path: str) -> None:
    assert door.send(door.keys.good.key, path).status_code == 200


def test_either_header_will_do_and_both_if_they_agree(door: Door) -> None:
    key = door.keys.good.key
    assert door.send(None, x_api_key=key).status_code == 200
    assert door.send(key, x_api_key=key).status_code == 200
    assert door.send(None, authorization=f"bearer  {key}").status_code == 200


BAD_KEYS: dict[str, tuple[Callable[[Door], str | None], dict[str, str], int, str]] = {
    "no key": (lambda _: None, {}, 401, "AUTH_INVALID"),
    "an empty key": (lambda _: None, {"authorization": "Bearer"}, 401, "AUTH_INVALID"),
    "an unknown key": (lambda _: "rk-unknown", {}, 401, "AUTH_INVALID"),
    "part of a key": (lambda door: door.keys.good.key[:-1], {}, 401, "AUTH_INVALID"),
    "a longer key": (lambda door: door.keys.good.key + "A", {}, 401, "AUTH_INVALID"),
    "a key in other letters": (lambda door: door.keys.good.key.swapcase(), {}, 401, "AUTH_INVALID"),
    "a digest instead of a key": (
        lambda door: hashlib.sha256(door.keys.good.key.encode()).hexdigest(),
        {},
        401,
        "AUTH_INVALID",
    ),
    "a revoked key": (lambda door: door.keys.revoked.key, {}, 401, "AUTH_INVALID"),
    "an expired key": (lambda _: EXPIRED, {}, 401, "AUTH_INVALID"),
    "a key of development": (lambda _: "dev-acme-alice", {}, 401, "AUTH_INVALID"),
    "a key of tests": (lambda _: "test-abc", {}, 401, "AUTH_INVALID"),
    "another scheme": (lambda _: None, {"authorization": "Basic cms6cms="}, 401, "AUTH_INVALID"),
    "a huge key": (lambda _: "x" * 5000, {}, 401, "AUTH_INVALID"),
    "two keys": (lambda door: door.keys.good.key, {"x_api_key": "rk-other"}, 400, "INVALID_REQUEST"),
    "a list of keys": (lambda door: f"{door.keys.good.key},{door.keys.good.key}", {}, 401, "AUTH_INVALID"),
}


@pytest.mark.parametrize("path", [CHAT, INFERENCE, MODELS])
@pytest.mark.parametrize(("key", "headers", "status", "code"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_bad_key_reaches_no_backend(
    *, door: Door, path: str, key: Callable[[Door], str | None], headers: dict[str, str], status: int, code: str
) -> None:
    response = door.send(key(door), path, **headers)
    door.assert_refused(response, status, code)
    assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert "rk-" not in response.text


def test_refusals_of_401_say_why_but_not_whose(door: Door) -> None:
    said = [door.send(key, INFERENCE).json()["error"] for key in (door.keys.revoked.key, EXPIRED, "rk-unknown")]
    assert said == ["The API key has been revoked.", "The API key has expired.", "The API key is not valid."]


def test_key_revoked_in_the_file_is_refused_soon(door: Door) -> None:
    key = door.store.create()
    eventually(lambda: door.send(key.key, MODELS).status_code == 200, "the new key is known", within_s=5)
    door.store.revoke(key)
    eventually(lambda: door.send(key.key, MODELS).status_code == 401, "the revoked key is refused", within_s=5)
    door.assert_refused(door.send(key.key), 401, "AUTH_INVALID")


# --- What a key may do.


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
def test_key_for_some_models_is_forbidden_the_others(door: Door, path: str) -> None:
    door.assert_refused(door.send(door.keys.limited.key, path), 403, "FORBIDDEN")
    assert door.send(door.keys.limited.key, path, "other").status_code == 200


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
@pytest.mark.parametrize("scope", ["models_only", "audit_only", "admin"])
def test_inference_needs_its_scope(door: Door, path: str, scope: str) -> None:
    response = door.send(getattr(door.keys, scope).key, path)
    if scope == "admin":  # which has every other
        assert response.status_code == 200
    else:
        door.assert_refused(response, 403, "FORBIDDEN")


def test_models_need_their_scope(door: Door) -> None:
    assert door.send(door.keys.models_only.key, MODELS).status_code == 200
    door.assert_refused(door.send(door.keys.audit_only.key, MODELS), 403, "FORBIDDEN")


def test_model_of_another_organisation_does_not_exist(door: Door) -> None:
    door.assert_refused(door.send(door.keys.good.key, CHAT, "of-globex"), 404, "MODEL_NOT_FOUND")
    assert door.send(door.keys.globex.key, CHAT, "of-globex").status_code == 200


# --- Signatures.


def sign(key: MadeKey, message: bytes) -> str:
    return hmac.new(key.signing_secret.encode(), message, "sha256").hexdigest()


BODY = json.dumps(chat()).encode()


@pytest.mark.parametrize("holder", ["signed", "signing"])
def test_signature_over_the_body_is_taken(door: Door, holder: str) -> None:
    key = getattr(door.keys, holder)
    for signature in (sign(key, BODY), sign(key, BODY).upper()):
        assert door.post(key.key, CHAT, BODY, x_hmac_signature=signature).status_code == 200


def test_signature_over_the_payload_is_taken(door: Door) -> None:
    key = door.keys.signed
    body = inference(payload="héllo", hmac_signature=sign(key, "héllo".encode()))
    assert door.post(key.key, INFERENCE, json.dumps(body).encode()).status_code == 200


def test_signature_is_not_asked_of_a_key_that_needs_none(door: Door) -> None:
    assert door.post(door.keys.signing.key, CHAT, BODY).status_code == 200


SIGNATURES: dict[str, Callable[[MadeKey, MadeKey], dict[str, str]]] = {
    "of another body": lambda key, _: {"x_hmac_signature": sign(key, BODY + b" ")},
    "by another key": lambda _, other: {"x_hmac_signature": sign(other, BODY)},
    "cut short": lambda key, _: {"x_hmac_signature": sign(key, BODY)[:-2]},
    "not hex": lambda _, __: {"x_hmac_signature": "z" * 64},
    "empty": lambda _, __: {"x_hmac_signature": ""},
}


@pytest.mark.parametrize("holder", ["signed", "signing"])
@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=SIGNATURES)
def test_wrong_signature_is_refused(
    door: Door, holder: str, signature: Callable[[MadeKey, MadeKey], dict[str, str]]
) -> None:
    key = getattr(door.keys, holder)
    other = door.keys.signing if holder == "signed" else door.keys.signed
    door.assert_refused(door.post(key.key, CHAT, BODY, **signature(key, other)), 401, "AUTH_INVALID")


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
def test_missing_signature_is_refused_where_one_is_required(door: Door, path: str) -> None:
    door.assert_refused(door.send(door.keys.signed.key, path), 401, "AUTH_INVALID")


def test_wrong_signature_in_the_header_is_not_made_good_by_the_body(door: Door) -> None:
    key = door.keys.signed
    body = json.dumps(inference(payload="hi", hmac_signature=sign(key, b"hi"))).encode()
    refused = door.post(key.key, INFERENCE, body, x_hmac_signature="ab" * 32)
    door.assert_refused(refused, 401, "AUTH_INVALID")


# --- user-org-service.


def test_key_that_user_org_service_knows_is_let_in_and_asked_once(door: Door) -> None:
    door.user_org.knows("uo-known", organizationId="globex", scopes=["inference:write"])
    assert {door.send("uo-known", CHAT, "of-globex").status_code for _ in range(3)} == {200}
    assert door.user_org.asked["uo-known"] == 1


def test_key_that_user_org_service_ended_is_refused(door: Door) -> None:
    door.user_org.knows("uo-ended", valid=False, status="revoked")
    door.assert_refused(door.send("uo-ended"), 401, "AUTH_INVALID")


@pytest.mark.parametrize("path", [CHAT, INFERENCE, MODELS])
def test_outage_of_user_org_service_is_503_not_401(door: Door, path: str) -> None:
    with door.user_org.failing():
        door.assert_refused(door.send(f"uo-{path}", path), 503, "SERVICE_UNAVAILABLE")
        assert door.send(door.keys.good.key, path).status_code == 200, "other stores go on"


def test_known_key_outlives_an_outage_of_user_org_service(door: Door) -> None:
    door.user_org.knows("uo-cached")
    assert door.send("uo-cached").status_code == 200
    with door.user_org.failing():
        assert door.send("uo-cached").status_code == 200


def test_burst_of_one_unknown_key_asks_once(door: Door) -> None:
    count = 20
    with ThreadPoolExecutor(count) as pool, door.user_org.held():
        answers = [pool.submit(door.send, "uo-burst") for _ in range(count)]
        active = "http.public.downstream_rq_active"
        eventually(lambda: door.stack.stats(active)[active] == count, "all are waiting", within_s=4)
        eventually(lambda: door.user_org.asked["uo-burst"], "the service is asked", within_s=4)
        door.user_org.release()
        found = [answer.result() for answer in answers]
    assert {response.status_code for response in found} == {401}
    assert door.user_org.asked["uo-burst"] == 1
    assert door.stack.contacted() == 0


# --- Before the body.


@pytest.mark.parametrize("path", [CHAT, INFERENCE])
@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"], ids=["upload", "expect"])
def test_bad_key_is_refused_before_the_body_is_sent(door: Door, path: str, expect: bytes) -> None:
    head = (
        b"POST %s HTTP/1.1\r\nhost: router\r\nauthorization: Bearer rk-unknown\r\n"
        b"content-type: application/json\r\ncontent-length: 4000000\r\n%s\r\n" % (path.encode(), expect)
    )
    with connected(door.stack.http_port) as connection:
        connection.sendall(head)  # and not one byte of the body
        response = read_response(connection, method="POST", path=path)
    door.assert_refused(response, 401, "AUTH_INVALID")


def test_bad_key_is_refused_while_the_upload_goes_on(door: Door) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\nauthorization: Bearer rk-unknown\r\n"
        b'content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{"\r\n'
    )
    with connected(door.stack.http_port) as connection:
        connection.sendall(head)
        response = read_response(connection, method="POST", path=CHAT)
    door.assert_refused(response, 401, "AUTH_INVALID")


# --- What is written down.


def test_no_key_is_logged(door: Door) -> None:
    presented = [door.keys.good, door.keys.revoked, door.keys.signed, door.keys.limited]
    for key in presented:
        door.send(key.key)
    door.send("rk-very-unknown-key")
    logs = "".join(process.log() for process in door.stack.processes)
    assert '"request_refused"' in logs
    secrets: list[Any] = ["rk-very-unknown-key"]
    secrets += [secret for key in presented for secret in (key.key, key.signing_secret) if secret]
    assert [secret for secret in secrets if secret in logs] == []
