"""Limits in a stack: what a policy says of them, what the store holds of them, many requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import redis

from tests.harness.calls import CHAT, chat
from tests.harness.process import eventually
from tests.harness.stack import Stack, policy_of
from tests.harness.valkey import UNPACK, USE

PRICE = {"input_usd_per_1k": 0.005, "output_usd_per_1k": 0.015}


def limited_policy(stack_uris: Mapping[str, str], *, max_output_tokens: int = 100, **limits: Any) -> dict[str, Any]:
    """A policy whose model answers with so many tokens at most, whose backends have a price, and these limits."""
    even = [{"backend_id": backend_id, "weight": 50} for backend_id in stack_uris]
    model = {"model": "gpt-4o", "organization_id": "*", "backends": even, "max_output_tokens": max_output_tokens}
    return policy_of(stack_uris, models=[model], backend={"price": PRICE, "timeout": "60s"}, limits=limits)


def of_organization(organization_id: str, **limits: Any) -> dict[str, Any]:
    """The ``limits`` section for one organisation."""
    return {"organizations": {organization_id: limits}}


class StoreView:
    """What the limit store of a stack holds, read behind the router's back."""

    def __init__(self, stack: Stack) -> None:
        self._address = stack.environ["REDIS_ADDR"]
        self._client: Any = redis.Redis.from_url(self._address, decode_responses=True)

    def spend(self, organization_id: str, subject: str = "org", period: str = "MONTHLY") -> dict[str, int]:
        """What the running period holds; nothing where there is none."""
        found: dict[str, int] = {}
        for key in self._client.scan_iter(f"router:{{{organization_id}}}:spend:{subject}:{period}:*"):
            found = dict(zip(USE, self._client.eval(UNPACK, 1, key), strict=True))
        return found

    def spent_micro_usd(self, organization_id: str) -> int:
        """What the organisation has spent this month."""
        return self.spend(organization_id).get("spent_micro_usd", 0)

    def open(self, organization_id: str) -> int:
        """Ledger entries that are open."""
        return int(self._client.zcard(f"router:{{{organization_id}}}:open"))

    def settled(self, organization_id: str) -> None:
        """Wait until no entry is open."""
        eventually(lambda: self.open(organization_id) == 0, f"every request of {organization_id} is settled")

    def audit_events(self) -> list[dict[str, str]]:
        """The audit stream, oldest first."""
        return [fields for _, fields in self._client.xrange("router:audit")]

    def clear(self) -> None:
        """Wait until nothing is open, then forget everything that was counted."""
        eventually(lambda: not any(self._client.scan_iter("router:{*}:open")), "every request is settled")
        # The ledger's sign of life stays: without it the workers would count no parallel requests for a moment.
        keys = [key for key in self._client.scan_iter() if key != "router:ledger"]
        if keys:
            self._client.delete(*keys)

    def save(self, organization_id: str) -> dict[bytes, bytes]:
        """All that the store knows of an organisation."""
        with redis.Redis.from_url(self._address) as client:
            keys = list(client.scan_iter(f"router:{{{organization_id}}}:*"))
            return {key: dump for key in keys if (dump := client.dump(key)) is not None}

    def lose_since(self, organization_id: str, saved: Mapping[bytes, bytes]) -> None:
        """Make the store know again what it knew then, as a replica does that was behind."""
        with redis.Redis.from_url(self._address) as client, client.pipeline(transaction=True) as pipe:
            for key in client.scan_iter(f"router:{{{organization_id}}}:*"):
                pipe.delete(key)
            for key, dump in saved.items():
                pipe.restore(key, 0, dump)
            pipe.execute()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def at_once(
    stack: Stack,
    count: int,
    *,
    key: str,
    path: str = CHAT,
    body: Mapping[str, Any] | None = None,
    headers: Sequence[Mapping[str, str]] | None = None,
    connections: int = 250,
    meanwhile: Any = None,
) -> list[httpx.Response]:
    """Answers to so many requests that are all on their way at the same time.

    ``meanwhile`` is called in a thread with the number of answers so far, again and again until all are there.
    """

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        done: list[httpx.Response] = []
        async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=60, limits=limits) as client:

            async def one(index: int) -> None:
                extra = dict(headers[index]) if headers else {}
                sent = {"authorization": f"Bearer {key}", **extra}
                done.append(await client.post(path, json=body or chat(), headers=sent))

            async def watch() -> None:
                while True:
                    await asyncio.to_thread(meanwhile, len(done))
                    await asyncio.sleep(0.02)

            watching = asyncio.create_task(watch()) if meanwhile else None
            await asyncio.gather(*(one(index) for index in range(count)))
            if watching:
                watching.cancel()
        return done

    return asyncio.run(send())
