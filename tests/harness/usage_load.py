"""Mixed requests of several organisations under way while things die, and what their clients saw of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tests.harness.calls import CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE, chat, inference
from tests.harness.stack import Stack

AT_ONCE: Final = 24
RETRY_S: Final = 0.05
Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request whose answer its client has read to the end. ``tokens``: input and output, as far as told."""

    request_id: str
    organization_id: str
    status: int
    tokens: tuple[int, int] | None


@dataclass(slots=True)
class Load:
    """What has come of the requests so far."""

    completed: list[Seen] = field(default_factory=list)
    broken: int = 0


def _requests(random_: random.Random) -> tuple[str, Body, dict[str, str]]:
    """One of the mix: path, body, further headers."""
    words = "hi " * random_.randint(1, 40)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    path, body = random_.choice(
        [
            (CHAT, chat(messages=[{"role": "user", "content": words}])),
            (CHAT, chat(messages=[{"role": "user", "content": words}], **streamed)),
            (COMPLETIONS, {"model": "gpt-4o", "prompt": words}),
            (COMPLETIONS, {"model": "gpt-4o", "prompt": words, **streamed}),
            (EMBEDDINGS, {"model": "gpt-4o", "input": words}),
            (INFERENCE, inference(payload=words)),
            (CHAT, chat(model="nonsense")),
        ]
    )
    fault = random_.choices([None, "status=500", "stream_cut=2"], [20, 1, 1])[0]
    return path, body, {"x-mock-fault": fault} if fault else {}


def _tokens(text: str) -> tuple[int, int] | None:
    """What a whole answer says was used."""
    answers = [line[6:] for line in text.splitlines() if line.startswith("data: {")] or [text]
    found = [answer["usage"] for answer in map(json.loads, answers) if answer.get("usage")]
    if not found:
        return None
    used = found[-1]
    if "tokens_input" in used:
        return used["tokens_input"], used["tokens_output"]
    return used["prompt_tokens"], used.get("completion_tokens", 0)


async def _one(client: httpx.AsyncClient, organization: str, random_: random.Random, load: Load) -> None:
    path, body, headers = _requests(random_)
    headers["authorization"] = f"Bearer dev-{organization}-x"
    leaves = "stream" in body and random_.random() < 0.1
    try:
        async with client.stream("POST", path, json=body, headers=headers) as response:
            if leaves:
                async for _ in response.aiter_raw():
                    break
                return
            text = (await response.aread()).decode()
    except httpx.HTTPError:
        load.broken += 1
        await asyncio.sleep(RETRY_S)
        return
    load.completed.append(
        Seen(
            request_id=response.headers["x-request-id"],
            organization_id=organization,
            status=response.status_code,
            tokens=_tokens(text) if response.status_code == 200 else None,
        )
    )


async def mixed_load(
    stack: Stack, count: int, *, organizations: tuple[str, ...], random_: random.Random, progress: Callable[[int], None]
) -> Load:
    """Send until so many requests have been answered; ``progress`` is told how many have been."""
    load = Load()
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=30, limits=limits) as client:

        async def send() -> None:
            while len(load.completed) < count:
                await _one(client, random_.choice(organizations), random_, load)
                progress(len(load.completed))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(send())
    return load
