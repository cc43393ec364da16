"""One router for all contract tests, with a model for every way in which a request can end."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import httpx
import pytest

from mocks.control import MockControl
from tests.contract.document import Document, document
from tests.contract.organizations import BARRED, LIMITS, OWN_BUDGET, UNASKED
from tests.harness.budgets import Budgets
from tests.harness.keys import KeyStoreCommands, MadeKey, UserOrg, add_expired
from tests.harness.process import eventually
from tests.harness.raw import connected, read_response
from tests.harness.stack import Stack, model_of, policy_of, running_stack

EXPIRED = "rk-expired-0000000000000000000000000000000000000"
LEAK = "http://10.1.2.3:8000/v1 refused sk-0123456789abcdef\nTraceback (most recent call last):"
"""What a backend's own error may say and a client must not read."""
KEPT_MAX_BYTES = 8192
"""Above every answer of the mock backends', so that only one made huge is not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """One key for each thing that can be said of a key."""

    good: MadeKey
    revoked: MadeKey
    signed: MadeKey
    other_model: MadeKey
    audit_only: MadeKey
    models_only: MadeKey
    frugal: MadeKey
    expired: str = EXPIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A running router and what tests need to make it answer in every way."""

    stack: Stack
    keys: Keys
    user_org: UserOrg
    budgets: Budgets
    document: Document
    slow: SlowRequest

    @property
    def a(self) -> MockControl:
        """The backend of most models."""
        return self.stack.mocks["a"]

    def client(self, key: str | None = None) -> httpx.Client:
        """A client with the good key, or another; an empty one sends none."""
        return self.stack.client(self.keys.good.key if key is None else key, verify=False)

    def apply(self, *, killed: tuple[str, ...] = ("c",)) -> None:
        """Put the policy of these tests in force; ``killed`` backends are switched off."""
        self.stack.apply(policy(self.stack.uris, self.keys, killed=killed))

    def check(self, response: httpx.Response) -> None:
        """Hold a response against the document, and see that no error says too much."""
        self.document.check(response)
        self.check_secrecy(response)

    def check_error(self, response: httpx.Response, *, openai: bool, code: str) -> None:
        """Hold an error of the router's own against the closed set of its status."""
        form = "OpenAI" if openai else "Router"
        pointer = f"/components/schemas/{form}Error{response.status_code}"
        body = response.json()
        problems = [error.message for error in self.document.validator(pointer).iter_errors(body)]
        assert not problems, (pointer, body, problems)
        assert (body["error"]["code"] if openai else body["code"]) == code
        assert response.headers["x-request-id"]
        self.check_secrecy(response)

    def check_secrecy(self, response: httpx.Response) -> None:
        """No error tells of an address, a stack trace or a key."""
        if response.status_code < 400:
            return
        said = f"{response.headers}\n{response.text}"
        keys = [getattr(self.keys, field.name) for field in fields(self.keys)]
        secrets = [key.key if isinstance(key, MadeKey) else key for key in keys]
        secrets += [self.keys.signed.signing_secret, *sent_keys(response.request.headers)]
        urls = (*self.stack.uris.values(), self.budgets.url, self.user_org.url)
        secrets += [url.removeprefix("http://") for url in urls]
        secrets += [*LEAK.split(), str(self.stack.directory), ".py", ".sock", "127.0.0.1"]
        for secret in secrets:
            assert secret not in said, f"{secret!r} in {said}"


def sent_keys(headers: httpx.Headers) -> list[str]:
    """The keys that a request was sent with."""
    sent = (headers.get("authorization", "").removeprefix("Bearer "), headers.get("x-api-key", ""))
    return [key for key in sent if key]


class SlowRequest:
    """A request that never gets past its headers: begun early, because Envoy waits 10 s before it gives up."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._found: list[httpx.Response] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # The router may be stopped before it gives up.
        with contextlib.suppress(OSError), connected(self._port, timeout_s=30) as connection:
            connection.sendall(b"GET /v1/status/healthz HTTP/1.1\r\nhost: router\r\n")
            self._found.append(read_response(connection, path="/v1/status/healthz"))

    def response(self) -> httpx.Response:
        """What it was answered in the end."""
        self._thread.join(30)
        assert self._found, "no answer"
        return self._found[0]


def _keys(path: Path) -> Keys:
    commands = KeyStoreCommands("--file", str(path))
    revoked = commands.create()
    commands.revoke(revoked)
    add_expired(path, EXPIRED)
    return Keys(
        good=commands.create(),
        revoked=revoked,
        signed=commands.create("--require-signature"),
        other_model=commands.create("--model", "other"),
        audit_only=commands.create("--scope", "audit"),
        models_only=commands.create("--scope", "models"),
        frugal=commands.create(),
    )


def policy(uris: Mapping[str, str], keys: Keys, *, killed: tuple[str, ...]) -> dict[str, object]:
    """A model for every way in which backends fail, an organisation for every limit."""
    return policy_of(
        {**uris, "hasty": uris["a"]},
        backend_of={
            "hasty": {"timeout": "200ms"},
            "sick": {"health_check": {"path": "/health", "interval": "1s"}},
            "a": {"price": {"input_usd_per_1k": 0.005, "output_usd_per_1k": 0.015}},
        },
        models=[
            model_of({"a": 1, "b": 1}),
            model_of({"a": 1}, model="solo"),
            model_of({"a": 1, "b": 0}, model="first-a"),
            model_of({"a": 1, "b": 1}, model="degraded", degraded=["b"]),
            model_of({"hasty": 1}, model="hasty"),
            model_of({"c": 1}, model="killed"),
            model_of({"sick": 1}, model="sick"),
            model_of({"a": 1}, model="private", lists={"a": {"allow_list": ["nobody"]}}),
        ],
        kill_switches=[{"backend_id": backend_id, "enabled": True, "reason": "test"} for backend_id in killed],
        limits={"organizations": LIMITS, "keys": {keys.frugal.id: OWN_BUDGET}},
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    key_file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys = _keys(key_file)
    with UserOrg().running() as user_org, Budgets().running() as budgets:
        environ = {
            "KEY_FILE": str(key_file),
            "USER_ORG_SERVICE_URL": user_org.url,
            "KEY_CACHE_NEGATIVE_TTL_S": "0",
            "BUDGET_SERVICE_ENDPOINT": budgets.url,
            "IDEMPOTENCY_ANSWER_MAX_BYTES": str(KEPT_MAX_BYTES),
        }
        for organization, quota_type in BARRED.items():
            budgets.denies(organization, quota_type=quota_type, reason=LEAK)
        budgets.says(UNASKED, {"message": LEAK}, status=500)
        with running_stack(mocks=("a", "b", "c", "sick"), workers=1, environ=environ, valkey=True) as stack:
            stack.mocks["sick"].fail("health", status=503)
            slow = SlowRequest(stack.http_port)
            world = World(stack=stack, keys=keys, user_org=user_org, budgets=budgets, document=document(), slow=slow)
            world.apply()
            eventually(lambda: _is(stack, "sick", "unhealthy"), "the sick backend is seen to be sick")
            yield world


def _is(stack: Stack, backend: str, status: str) -> bool:
    found = json.loads(stack.client().get("/v1/status/readyz").text)
    return {"id": backend, "status": status} in found["backends"]["items"]


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    if "world" in request.fixturenames:
        world: World = request.getfixturevalue("world")
        for name, mock in world.stack.mocks.items():
            if name != "sick":
                mock.heal()
            mock.completions_format("openai")
            mock.clear()
