"""What user-org-service answers, and what that means for a key."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from extproc.http_service import ANSWER_MAX_BYTES
from extproc.keys.record import KeyRecord, PresentedKey, digest
from extproc.keys.user_org import UserOrgKeys
from gateway.errors import StoreUnavailable
from policies.model import KeyId, OrganizationId

ALICE = PresentedKey("rk-alice")
VALID: dict[str, Any] = {
    "valid": True,
    "apiKeyId": "k-1",
    "organizationId": "acme",
    "principalId": "u-1",
    "principalType": "user",
    "scopes": ["inference:write"],
    "status": "active",
    "message": "",
}
RECORD = KeyRecord(
    id=KeyId("k-1"),
    organization_id=OrganizationId("acme"),
    digest=digest("rk-alice"),
    principal_id="u-1",
    principal_type="user",
    scopes=frozenset({"inference:write"}),
)

Handler = Callable[[httpx.Request], httpx.Response]


async def ask(handler: Handler) -> KeyRecord | None:
    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
        return await UserOrgKeys(client, url="http://user-org/base/", timeout_s=1).find(ALICE)


def answering(body: Any, status: int = 200) -> Handler:
    return lambda _: httpx.Response(status, content=body if isinstance(body, bytes) else json.dumps(body).encode())


async def test_key_is_asked_for_as_the_service_expects() -> None:
    asked: list[tuple[str, str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, str(request.url), json.loads(request.content)))
        return httpx.Response(200, json=VALID)

    assert await ask(handler) == RECORD
    assert asked == [("POST", "http://user-org/base/v1/auth/validate-api-key", {"apiKeySecret": "rk-alice"})]


@pytest.mark.parametrize(
    ("changes", "status", "found"),
    [
        ({}, 200, "active"),
        ({"status": "ACTIVE", "more": {"of": "theirs"}}, 200, "active"),
        ({"status": None, "principalId": None, "scopes": None, "principalType": None}, 200, "active"),
        ({"valid": False, "status": "revoked"}, 200, "revoked"),
        ({"valid": False, "status": "EXPIRED"}, 401, "expired"),
        ({"valid": True, "status": "revoked"}, 200, "revoked"),
        ({"valid": True, "status": "Suspended"}, 200, "revoked"),
        ({"valid": False, "status": "active"}, 200, None),
        ({"valid": False, "status": "revoked", "apiKeyId": ""}, 200, None),
        ({"valid": False, "apiKeyId": None, "organizationId": "", "status": ""}, 401, None),
    ],
)
async def test_answer_decides_the_keys_status(changes: dict[str, Any], status: int, found: str | None) -> None:
    record = await ask(answering(VALID | changes, status))
    assert (record and record.status) == found


@pytest.mark.parametrize(
    "handler",
    [
        answering(VALID, 500),
        answering({"valid": False}, 503),
        answering({"valid": False}, 429),
        answering({"valid": False}, 302),
        answering(VALID, 401),
        answering(b"", 404),
        answering(b"<html>not found</html>", 404),
        answering(b"nonsense"),
        answering(b"\xff"),
        answering([]),
        answering({}),
        answering({"valid": "true"} | {"apiKeyId": "k", "organizationId": "o"}),
        answering(VALID | {"apiKeyId": ""}),
        answering(VALID | {"organizationId": None}),
        answering(VALID | {"organizationId": "*"}),
        answering(VALID | {"organizationId": "acme\r\nx: y"}),
        answering(VALID | {"apiKeyId": 7}),
        answering(VALID | {"scopes": "inference"}),
        answering(VALID | {"scopes": [1]}),
        answering(b" " * (ANSWER_MAX_BYTES + 1) + json.dumps(VALID).encode()),
    ],
)
async def test_what_is_no_answer_is_an_outage_and_not_a_refusal(handler: Handler) -> None:
    with pytest.raises(StoreUnavailable) as outage:
        await ask(handler)
    assert "rk-alice" not in str(outage.value)


async def test_connection_that_the_service_closed_meanwhile_is_tried_once_more() -> None:
    calls = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise httpx.RemoteProtocolError("closed", request=request)
        return httpx.Response(200, json=VALID)

    assert await ask(handler) == RECORD
    assert calls == 2


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadError, httpx.ConnectTimeout, httpx.TooManyRedirects])
async def test_failing_transport_is_an_outage(error: type[httpx.HTTPError]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error("no")

    with pytest.raises(StoreUnavailable, match=error.__name__):
        await ask(handler)


def test_address_must_be_http() -> None:
    with pytest.raises(ValueError, match="USER_ORG_SERVICE_URL"):
        UserOrgKeys(httpx.AsyncClient(), url="user-org:8080", timeout_s=1)
