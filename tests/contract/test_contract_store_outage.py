"""What clients are told while the limit store is away."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract.conftest import World
from tests.contract.organizations import key_of
from tests.contract.produce import BOTH, CHAT, post
from tests.contract.produce_limits import ask
from tests.contract.produce_limits import of as refused
from tests.harness.process import eventually

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def outage(world: World) -> Iterator[World]:
    valkey = world.stack.valkey
    assert valkey is not None
    valkey.stop()
    try:
        yield world
    finally:
        valkey.start()
        eventually(lambda: store(world) == "up", "the store is back")
        with world.client(key_of("strict")) as client:
            eventually(lambda: post(client, CHAT).status_code == 200, "budgets are checked again")


def store(world: World) -> Any:
    """The store's state, as readiness has it."""
    response = world.stack.readyz()
    assert response is not None
    return response.json()["components"]["store"]["status"]


@pytest.mark.parametrize("path", BOTH)
def test_budget_that_cannot_be_checked_is_a_503(outage: World, path: str) -> None:
    with outage.client(key_of("strict")) as client:
        response = post(client, path)
    assert response.status_code == 503
    outage.check(response)
    openai = path == CHAT
    outage.check_error(response, openai=openai, code="service_unavailable" if openai else "SERVICE_UNAVAILABLE")
    assert outage.stack.contacted() == 0


@pytest.mark.parametrize("path", BOTH)
def test_rate_is_refused_as_ever(outage: World, path: str) -> None:
    response = refused("hurried")(outage, path)
    assert response.status_code == 429
    outage.check(response)


@pytest.mark.parametrize("path", BOTH)
def test_one_without_limits_is_served_as_ever(outage: World, path: str) -> None:
    with outage.client() as client:
        response = post(client, path)
    assert response.status_code == 200
    outage.check(response)


@pytest.mark.parametrize("path", BOTH)
def test_no_answer_is_repeated(outage: World, path: str) -> None:
    token = str(uuid.uuid4())
    with outage.client() as client:
        for _ in range(2):
            response = ask(client, path, token)
            assert response.status_code == 200
            outage.check(response)
            assert "x-idempotent-replay" not in response.headers
    assert outage.a.count() == 2


def test_readiness_says_that_the_store_is_down(outage: World) -> None:
    # A report is used again for half a second.
    eventually(lambda: store(outage) == "down", "readiness knows")
    with outage.client("") as client:
        response = client.get("/v1/status/readyz")
    assert (response.status_code, response.json()["status"]) == (200, "degraded")
    outage.check(response)
