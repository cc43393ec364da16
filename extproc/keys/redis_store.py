"""Keys in Redis or Valkey, and the news of changes to them.

``router:key:<digest>`` holds a record as JSON, ``router:key-id:<id>`` its digest. Whoever changes a record publishes
the digest on ``router:keys:changed`` after the write; a message that is no digest stands for every key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from extproc.keys.deadline import within
from extproc.keys.record import DIGEST_LENGTH, KeyRecord, PresentedKey, RecordInvalid, from_json
from extproc.keys.store import ASK, Ask
from gateway.errors import StoreUnavailable
from gateway.redis_url import redis_url
from gateway.telemetry import Logger

CHANNEL: Final = "router:keys:changed"
DEADLINE_S: Final = 0.5
SUBSCRIBE_DEADLINE_S: Final = 2.0
CONNECTIONS_MAX: Final = 32
PING_INTERVAL_S: Final = 5.0
BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 5.0

Invalidate = Callable[[str | None], None]


def record_name(digest: str) -> str:
    """Redis key of a record."""
    return f"router:key:{digest}"


def index_name(key_id: str) -> str:
    """Redis key that leads from a key's id to its digest."""
    return f"router:key-id:{key_id}"


def redis_client(address: str) -> Redis:
    """Client whose calls the store bounds by its own deadline.

    Raises:
        ValueError: the address has another form.
    """
    pool = BlockingConnectionPool.from_url(
        redis_url(address),
        max_connections=CONNECTIONS_MAX,
        timeout=DEADLINE_S,
        socket_connect_timeout=DEADLINE_S * 2,
        # With a socket timeout redis-py sends through asyncio.wait_for, which on Python 3.11 loses a cancellation that
        # arrives as the sending ends: every call here has a deadline of its own instead.
        socket_timeout=None,
        retry=Retry(NoBackoff(), 1),
    )
    return Redis.from_pool(pool)


class RedisKeys:
    """Looks keys up in Redis. Owns neither the client nor a cache: see ``watch`` for keeping one true."""

    name = "redis"

    def __init__(
        self,
        client: Redis,
        *,
        log: Logger,
        deadline_s: float = DEADLINE_S,
        ping_interval_s: float = PING_INTERVAL_S,
    ) -> None:
        self._client = client
        self._log = log
        self._deadline_s = deadline_s
        self._ping_interval_s = ping_interval_s

    def peek(self, key: PresentedKey) -> Ask:
        """Always ASK: Redis must be asked."""
        return ASK

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        """The record, within the deadline.

        Raises:
            StoreUnavailable: no answer in time, or a record that cannot be read.
        """
        try:
            text = await within(self._deadline_s, self._get(record_name(key.digest)))
        except TimeoutError as error:
            raise StoreUnavailable(f"redis: no answer within {self._deadline_s:g} s") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"redis: {type(error).__name__}") from error
        if text is None:
            return None
        try:
            record = from_json(text)
        except RecordInvalid as error:
            raise StoreUnavailable(f"redis: {record_name(key.digest)}: {error}") from None
        if record.digest != key.digest:
            raise StoreUnavailable(f"redis: {record_name(key.digest)} holds the record of another key")
        return record

    async def _get(self, name: str) -> Any:
        return await self._client.get(name)

    async def watch(self, invalidate: Invalidate) -> None:
        """Follow changes until cancelled: ``invalidate(digest)`` for a changed key, ``invalidate(None)`` for all.

        After every (re)subscription everything is invalid, because changes may have been missed.
        """
        backoff_s = BACKOFF_FIRST_S
        while True:
            began = asyncio.get_running_loop().time()
            try:
                async with self._client.pubsub() as subscription:
                    await within(SUBSCRIBE_DEADLINE_S, subscription.subscribe(CHANNEL))
                    await self._follow(subscription, invalidate)
            except (RedisError, OSError) as error:  # TimeoutError is an OSError
                if backoff_s == BACKOFF_FIRST_S:
                    self._log.warning("key_changes_lost", error=type(error).__name__)
            if asyncio.get_running_loop().time() - began > BACKOFF_MAX_S:
                backoff_s = BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    async def _follow(self, subscription: PubSub, invalidate: Invalidate) -> None:
        """Hand on messages of one subscription.

        Raises:
            TimeoutError: two pings in a row went unanswered, as with a connection whose other end has vanished.
        """
        unanswered = 0
        while True:
            # The read has its time; the rest is for the reconnection that it may do before.
            reading = subscription.get_message(timeout=self._ping_interval_s)
            message = await within(self._ping_interval_s + SUBSCRIBE_DEADLINE_S, reading)
            if message is not None:
                unanswered = 0
                self._hand_on(message, invalidate)
                continue
            if unanswered == 2:  # noqa: PLR2004
                raise TimeoutError
            unanswered += 1
            await within(self._ping_interval_s, self._ping(subscription))

    async def _ping(self, subscription: PubSub) -> None:
        await subscription.ping()

    def _hand_on(self, message: dict[str, Any], invalidate: Invalidate) -> None:
        if message["type"] == "subscribe":
            invalidate(None)
            self._log.info("key_changes_followed")
        elif message["type"] == "message":
            text = bytes(message["data"]).decode("ascii", "replace")
            invalidate(text if len(text) == DIGEST_LENGTH else None)
