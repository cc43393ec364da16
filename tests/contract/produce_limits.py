"""Ways to run into a limit, or into an idempotency key that is taken."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import httpx

from gateway.errors import Reason
from tests.contract.conftest import KEPT_MAX_BYTES, World
from tests.contract.organizations import UNASKED, key_of
from tests.contract.produce import BOTH, CHAT, INFERENCE, SERVED, Produce, Ways, post
from tests.harness.process import eventually

TRIES_MAX = 50
"""More requests than any of the limits lets pass, on however slow a machine."""


def ask(client: httpx.Client, path: str, token: str, model: str = "solo", **fields: Any) -> httpx.Response:
    """A call with an idempotency key, which the client keeps."""
    if path == INFERENCE:
        return post(client, path, model, request_id=token, **fields)
    client.headers["idempotency-key"] = token
    return post(client, path, model, **fields)


def first_refusal(client: httpx.Client, path: str) -> httpx.Response:
    """The answer to the first of many requests that is none of the backend's, which has a price."""
    for _ in range(TRIES_MAX):
        response = post(client, path, "solo")
        if response.status_code != 200:
            break
    return response


def of(organization: str) -> Produce:
    """The refusal of an organisation's request."""

    def produce(world: World, path: str) -> httpx.Response:
        with world.client(key_of(organization)) as client:
            return first_refusal(client, path)

    return produce


def own_budget(world: World, path: str) -> httpx.Response:
    with world.client(world.keys.frugal.key) as client:
        return first_refusal(client, path)


@contextlib.contextmanager
def running(world: World, client: httpx.Client, path: str, token: str) -> Iterator[list[httpx.Response]]:
    """A request that is with its backend all through the block; its answer is there at the end."""
    answers: list[httpx.Response] = []

    def send() -> None:
        # The place of a request that has just ended is taken until the ledger has heard of it.
        while not answers or answers[-1].status_code == 429:
            answers.append(ask(client, path, token))

    world.a.fail("hold", events=0)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        eventually(lambda: world.a.counts().held == 1, "the request is with its backend")
        yield answers
    finally:
        world.a.heal()
        world.a.release()
        sender.join()


def crowded(world: World, path: str) -> httpx.Response:
    key, token = key_of("crowded"), str(uuid.uuid4())
    with world.client(key) as client, world.client(key) as other, running(world, client, path, token):
        return post(other, path, "solo")


def in_progress(world: World, path: str) -> httpx.Response:
    token = str(uuid.uuid4())
    with world.client() as client, world.client() as other, running(world, client, path, token):
        return ask(other, path, token)


def not_kept(world: World, path: str) -> httpx.Response:
    token = str(uuid.uuid4())
    world.a.fail("huge", bytes=KEPT_MAX_BYTES + 2000)
    with world.client() as client:
        assert ask(client, path, token).status_code == 200
        return ask(client, path, token)


def another_body(world: World, path: str) -> httpx.Response:
    token = str(uuid.uuid4())
    with world.client() as client:
        assert ask(client, path, token, "solo").status_code == 200
        return ask(client, path, token, "first-a")


def keyed_with(token: str) -> Produce:
    """A request whose idempotency key is none."""

    def produce(world: World, path: str) -> httpx.Response:
        with world.client() as client:
            return ask(client, path, token)

    return produce


OPENAI = tuple(path for path in SERVED if path != INFERENCE)
RATES: Ways = {
    Reason.REQUEST_RATE: [(BOTH, of("hurried"))],
    Reason.TOKEN_RATE: [(BOTH, of("wordy"))],
    Reason.PARALLEL_REQUESTS: [(BOTH, crowded)],
}
PRODUCERS: Ways = {
    **RATES,
    Reason.BUDGET_SPENT: [(SERVED, of("broke")), (BOTH, of("barred"))],
    Reason.QUOTA_SPENT: [(BOTH, of("rationed")), (BOTH, own_budget), (BOTH, of("barred_by_tokens"))],
    Reason.IN_PROGRESS: [(SERVED, in_progress)],
    Reason.ANSWER_NOT_KEPT: [(SERVED, not_kept)],
    Reason.IDEMPOTENCY_MISMATCH: [(SERVED, another_body)],
    Reason.INVALID_FIELD: [(OPENAI, keyed_with("")), ((CHAT,), keyed_with("k" * 256))],
    Reason.LIMIT_STORE_DOWN: [(BOTH, of(UNASKED))],
}
