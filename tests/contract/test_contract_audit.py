"""Receipts and audit events of every kind of request, as docs/openapi.yaml has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.contract.conftest import World
from tests.contract.organizations import key_of
from tests.contract.produce import CHAT, EVENTS, INFERENCE, SERVED, post
from tests.contract.produce_limits import ask
from tests.harness.process import eventually

pytestmark = pytest.mark.integration

Send = Callable[[World, httpx.Client], httpx.Response]


def receipt(world: World, client: httpx.Client, request_id: str, *, state: str = "ENDED") -> dict[str, Any]:
    """The receipt, once it is there; each answer on the way is as documented too."""
    found: dict[str, Any] = {}

    def is_there() -> bool:
        response = client.get(f"{EVENTS}/{request_id}")
        world.check(response)
        found.update(response.json())
        return response.status_code == 200 and found["state"] == state

    eventually(is_there, "the receipt is there")
    return found


def of_model(model: str, *, path: str = CHAT, **fields: Any) -> Send:
    return lambda _, client: post(client, path, model, **fields)


def failing(world: World, client: httpx.Client) -> httpx.Response:
    world.a.fail("status", status=500)
    return post(client, CHAT, "first-a")


def repeated(_: World, client: httpx.Client) -> httpx.Response:
    token = "once-more"
    eventually(lambda: "x-idempotent-replay" in ask(client, CHAT, token).headers, "the answer is repeated")
    return ask(client, CHAT, token)


KINDS: dict[str, tuple[str, Send]] = {
    **{path: ("PRIMARY", of_model("solo", path=path)) for path in SERVED},
    "stream": ("PRIMARY", of_model("solo", stream=True)),
    "labelled": ("PRIMARY", of_model("solo", path=INFERENCE, metadata={"team": "é"})),
    "failover": ("FAILOVER", failing),
    "degraded": ("OVERRIDE", of_model("degraded")),
    "unknown model": ("DENIED", of_model("nope")),
    "killed": ("DENIED", of_model("killed")),
    "no backend": ("ADMITTED", of_model("sick")),
    "repeated": ("REPEATED", repeated),
    "listed": ("LISTED", lambda _, client: client.get("/v1/models")),
    "asked for events": ("LISTED", lambda _, client: client.get(EVENTS)),
}


@pytest.mark.parametrize(("what", "send"), KINDS.values(), ids=KINDS)
def test_receipt_is_as_documented(world: World, what: str, send: Send) -> None:
    with world.client() as client:
        request_id = send(world, client).headers["x-request-id"]
        # Attempts that failed are told of a moment later.
        eventually(lambda: receipt(world, client, request_id)["decision"]["what"] == what, f"it is {what}")


def test_nothing_was_tried_where_no_backend_is_healthy(world: World) -> None:
    with world.client() as client:
        request_id = post(client, CHAT, "sick").headers["x-request-id"]
        eventually(lambda: receipt(world, client, request_id)["attempts"] == [], "nothing was tried")
        assert receipt(world, client, request_id)["decision"]["reason"] == "NO_BACKEND_AVAILABLE"


@pytest.mark.parametrize("organization", ["hurried", "wordy", "broke", "rationed", "barred", "counted", "strict"])
def test_receipt_of_one_with_limits_is_as_documented(world: World, organization: str) -> None:
    with world.client(key_of(organization)) as client:
        for _ in range(2):  # the second is denied where the first was not
            found = receipt(world, client, post(client, CHAT, "solo").headers["x-request-id"])
    assert found["limits"] or organization == "barred"


def test_admin_reads_of_one_whom_nobody_knew(world: World) -> None:
    with world.client("rk-nobody") as nobody, world.client("dev-root-admin") as admin:
        refused = post(nobody, CHAT)
        assert refused.status_code == 401
        found = receipt(world, admin, refused.headers["x-request-id"])
    assert (found["organization_id"], found["decision"]["reason"]) == (None, "AUTH_INVALID")
    assert found["status"] == 401


def test_request_that_runs_is_as_documented(world: World) -> None:
    world.a.fail("hold", events=1)
    with world.client(key_of("strict")) as client:
        stream = {"model": "solo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with client.stream("POST", CHAT, json=stream) as response:
            found = receipt(world, client, response.headers["x-request-id"], state="RUNNING")
            assert found["decision"]["what"] == "ADMITTED"
            world.a.release()
            response.read()


def test_events_of_every_action_are_as_documented(world: World) -> None:
    with world.client() as client, world.client("rk-nobody") as nobody, world.client("dev-root-admin") as admin:
        assert post(client, CHAT, "solo").status_code == 200
        assert post(nobody, CHAT).status_code == 401

        def actions() -> set[str]:
            response = admin.get(EVENTS, params={"limit": 500})
            world.check(response)
            return {event["action"] for event in response.json()["events"]}

        eventually(lambda: actions() >= {"REQUEST_ALLOWED", "REQUEST_DENIED", "POLICY_UPDATE"}, "all are there")
