"""Open streams: unharmed by policy edits, without delay for any event, closed when the client leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from tests.harness.process import eventually
from tests.harness.stack import KEY, Stack, policy_of, running_stack

pytestmark = pytest.mark.integration

STREAMS = 100
CHAT = {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(stack: Stack) -> None:
    stack.reset()
    stack.apply(policy_of(stack.uris))


def _client(stack: Stack) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=STREAMS + 10)
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(base_url=stack.url, headers=headers, trust_env=False, timeout=60, limits=limits)


async def _events(lines: AsyncIterator[str]) -> list[str]:
    return [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]


async def _wait_for_streams(stack: Stack, count: int) -> None:
    def held() -> int:
        return sum(mock.counts().held for mock in stack.mocks.values())

    await asyncio.to_thread(eventually, lambda: held() == count, f"{count} streams are held")


async def test_policy_edits_break_none_of_a_hundred_open_streams(stack: Stack) -> None:
    for mock in stack.mocks.values():
        mock.fail("hold", events=1)
    async with _client(stack) as client, AsyncExitStack() as streams:
        opened = await asyncio.gather(
            *(
                streams.enter_async_context(client.stream("POST", "/v1/chat/completions", json=CHAT))
                for _ in range(STREAMS)
            )
        )
        await _wait_for_streams(stack, STREAMS)
        only_a = [{"model": "gpt-4o", "organization_id": "*", "backends": [{"backend_id": "a", "weight": 1}]}]
        edits = (
            policy_of(stack.uris, models=only_a),
            policy_of(stack.uris, kill_switches=[{"backend_id": "b", "enabled": True}]),
            policy_of(stack.uris, backend={"timeout": "7s"}, default_policy={"failover_threshold": 7}),
        )
        for edit in edits:
            await asyncio.to_thread(stack.apply, edit)
        await _wait_for_streams(stack, STREAMS)
        for mock in stack.mocks.values():
            mock.release()
        endings = await asyncio.gather(*(_events(response.aiter_lines()) for response in opened))
    assert [events[-1] for events in endings] == ["[DONE]"] * STREAMS
    assert not any("error" in event for events in endings for event in events)


async def test_a_removed_backend_finishes_its_streams(stack: Stack) -> None:
    for mock in stack.mocks.values():
        mock.fail("hold", events=1)
    async with _client(stack) as client, client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
        await _wait_for_streams(stack, 1)
        [holder] = [name for name, mock in stack.mocks.items() if mock.counts().held]
        rest = {name: uri for name, uri in stack.uris.items() if name != holder}
        await asyncio.to_thread(stack.apply, policy_of(rest))
        stack.mocks[holder].release()
        events = await _events(response.aiter_lines())
    assert events[-1] == "[DONE]"


async def test_every_event_comes_as_soon_as_the_backend_sent_it(stack: Stack) -> None:
    """The backend waits 0.2 s before each event; an event held until the next one came would be seen 0.2 s late."""
    pause_s = 0.2
    for mock in stack.mocks.values():
        mock.fail("slow", delay_s=0.0, event_delay_s=pause_s)
    arrivals: list[float] = []
    async with _client(stack) as client:
        started_s = time.monotonic()
        async with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    arrivals.append(time.monotonic() - started_s)
    late = [arrival - index * pause_s for index, arrival in enumerate(arrivals)]
    # The first event has waited for nothing but the router; every other one is as late as it was.
    assert max(late[:-1]) - late[0] < pause_s / 2, arrivals


async def test_the_usage_event_is_there_for_who_asked_and_for_nobody_else(stack: Stack) -> None:
    async with _client(stack) as client:
        plain = await client.post("/v1/chat/completions", json=CHAT)
        asked = await client.post("/v1/chat/completions", json={**CHAT, "stream_options": {"include_usage": True}})
    assert '"choices":[]' not in plain.text
    assert '"choices":[]' in asked.text
    for mock in stack.mocks.values():
        for received in mock.requests():
            assert received.json()["stream_options"] == {"include_usage": True}


async def test_the_usage_that_was_stripped_is_in_the_access_log(stack: Stack) -> None:
    async with _client(stack) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    request_id = response.headers["x-request-id"]
    await asyncio.to_thread(eventually, lambda: request_id in stack.envoy.log(), "the request is logged")
    [line] = [json.loads(line) for line in stack.envoy.log().splitlines() if request_id in line]
    assert line["tokens_input"] == 3
    assert line["tokens_output"] > 0


async def test_a_client_that_leaves_is_noticed_by_the_backend(stack: Stack) -> None:
    for mock in stack.mocks.values():
        mock.fail("hold", events=1)
    async with _client(stack) as client, client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
        lines = response.aiter_lines()  # held: an iterator that is given up closes its response
        assert (await anext(lines)).startswith("data: ")
        await _wait_for_streams(stack, 1)

    def left() -> bool:
        return any(received.disconnected for mock in stack.mocks.values() for received in mock.requests())

    await asyncio.to_thread(eventually, left, "the backend sees the client leave")
    assert _answers(stack)


def _answers(stack: Stack) -> bool:
    stack.reset()
    with stack.client() as client:
        call: dict[str, Any] = {"model": "gpt-4o", "prompt": "hi"}
        return client.post("/v1/completions", json=call).status_code == 200
