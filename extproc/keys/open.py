"""The key stores that the settings name, opened together and closed together."""

from __future__ import annotations

import time
from asyncio import TaskGroup
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from extproc.http_service import service_client
from extproc.keys.cache import Cached
from extproc.keys.chain import Chain, Outages
from extproc.keys.development import DevelopmentKeys
from extproc.keys.file import FileKeys
from extproc.keys.redis_store import RedisKeys, redis_client
from extproc.keys.store import KeyStore
from extproc.keys.user_org import UserOrgKeys
from gateway.settings import ExtprocSettings
from gateway.telemetry import Logger


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """An opened set of stores: ``store`` answers lookups, ``outages`` tells readiness which fail."""

    store: KeyStore
    outages: Outages


@asynccontextmanager
async def open_keys(settings: ExtprocSettings, *, log: Logger) -> AsyncIterator[Keys]:
    """File, then development keys where they are allowed, then, cached: Redis, then user-org-service.

    A store that is down does not fail the start. Enter and leave it in the same task: it runs what follows the
    file's and Redis' changes. An exception from within the ``async with`` comes out in an ExceptionGroup.

    Raises:
        KeyFileInvalid: KEY_FILE cannot be used.
        ValueError: REDIS_ADDR or USER_ORG_SERVICE_URL has no known form.
    """
    outages = Outages(log)
    async with AsyncExitStack() as stack:
        stores: list[KeyStore] = []
        remote: list[KeyStore] = []
        file = FileKeys(settings.key_file, log=log) if settings.key_file else None
        redis = None
        if settings.redis_addr:
            client = redis_client(settings.redis_addr)
            stack.push_async_callback(client.aclose, close_connection_pool=True)
            redis = RedisKeys(client, log=log)
            remote.append(redis)
        if settings.user_org_service_url:
            http = await stack.enter_async_context(service_client())
            url, timeout_s = settings.user_org_service_url, settings.user_org_timeout_s
            remote.append(UserOrgKeys(http, url=url, timeout_s=timeout_s))
        cached = _cached(Chain(remote, outages=outages), settings)
        stack.push_async_callback(cached.close)
        if file:
            stores.append(file)
        if settings.environment == "development":
            stores.append(DevelopmentKeys(environment=settings.environment))
        if remote:
            stores.append(cached)
        if not stores:
            log.warning("key_stores_none", meaning="every key is refused")
        async with TaskGroup() as tasks:
            followers = []
            if file:
                followers.append(tasks.create_task(file.watch()))
            if redis:
                followers.append(tasks.create_task(redis.watch(cached.invalidate)))
            try:
                yield Keys(store=Chain(stores), outages=outages)
            finally:
                for follower in followers:
                    follower.cancel()


def _cached(store: KeyStore, settings: ExtprocSettings) -> Cached:
    return Cached(
        store,
        ttl_s=settings.key_cache_ttl_s,
        negative_ttl_s=settings.key_cache_negative_ttl_s,
        size=settings.key_cache_size,
        clock=time.monotonic,
        wall=time.time,
    )
