"""A ledger's sign of life, on a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from gateway.telemetry import get_logger
from limits.heartbeat import KEY, SILENT_S, LedgerWatch, beat
from limits.valkey import ValkeyLimits, open_limits
from tests.harness.valkey import Server, a_server

OFTEN_S = 0.01


@pytest.fixture
def server() -> Iterator[Server]:
    with a_server() as running:
        yield running


@asynccontextmanager
async def watched(server: Server, changes: list[bool]) -> AsyncIterator[tuple[ValkeyLimits, LedgerWatch]]:
    """A store and a watch that listens often."""
    log = get_logger()
    async with open_limits(f"unix://{server.socket}", log=log, deadline_s=5) as store:
        watch = LedgerWatch(store.connection, log=log, on_change=changes.append)
        listening = asyncio.create_task(watch.run(interval_s=OFTEN_S))
        try:
            yield store, watch
        finally:
            listening.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nobody could set an event
            await asyncio.sleep(OFTEN_S)


async def test_silence_is_noticed_and_so_is_the_ledger(server: Server) -> None:
    changes: list[bool] = []
    async with watched(server, changes) as (store, watch):
        assert watch.is_here
        await until(lambda: changes == [False])
        beating = asyncio.create_task(beat(store.connection, interval_s=OFTEN_S))
        await until(lambda: changes == [False, True])
        assert watch.is_here
        assert 0 < server.client.ttl(KEY) <= SILENT_S
        beating.cancel()


async def test_what_was_known_holds_while_the_store_is_down(server: Server) -> None:
    changes: list[bool] = []
    async with watched(server, changes) as (store, watch):
        await until(lambda: changes == [False])
        server.kill()
        await until(lambda: not store.connection.is_up)
        assert not watch.is_here
        server.start()
        beating = asyncio.create_task(beat(store.connection, interval_s=OFTEN_S))
        await until(lambda: watch.is_here)
        beating.cancel()
