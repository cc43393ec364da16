"""Requests that nobody tells the end of: found, written down as what was reserved, and never before it is time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import StoreUnavailable
from gateway.telemetry import get_logger
from limits.about import About
from limits.model import Opened
from policies.model import KeyId, OrganizationId
from tests.harness.usage import problems_of
from tests.unit.usage.usage_builders import PRICES, REQUEST_ID, START_S, a_spool, an_entry, metrics, until, value
from usage.metrics import LedgerMetrics
from usage.spool import EXPIRE, Changes, Entry
from usage.sweep import CALLS_MAX, sweep, sweep_every
from usage.writer import Writer


class OpenEntries:
    """Open entries of organisations; those that ended meanwhile are overdue, but no longer open."""

    def __init__(self) -> None:
        self.overdue_ids: dict[str, list[str]] = {}
        self.ended: set[str] = set()
        self.down = False
        self.unavailable: set[str] = set()
        self.at_once = 0
        self.most_at_once = 0

    async def organizations(self) -> tuple[OrganizationId, ...]:
        if self.down:
            raise StoreUnavailable("down")
        return tuple(map(OrganizationId, self.overdue_ids))

    async def overdue(self, organization_id: OrganizationId, /, *, most: int) -> tuple[str, ...]:
        await self._call()
        if organization_id in self.unavailable:
            raise StoreUnavailable("that shard is down")
        return tuple(self.overdue_ids[organization_id][:most])

    async def opened(self, organization_id: OrganizationId, request_id: str, /) -> Opened | None:
        await self._call()
        if request_id in self.ended:
            return None
        return Opened(
            request_id=request_id,
            organization_id=organization_id,
            key_id=KeyId("k-1"),
            admitted_ms=START_S * 1000,
            tokens_input=10,
            tokens_output=90,
            micro_usd=1400,
            about=About(model="gpt-4o", endpoint="chat", prices=PRICES).written(),
        )

    async def _call(self) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1


class Ledger:
    """A writer, and what it has written."""

    def __init__(self, directory: Path) -> None:
        self.spool = a_spool(directory)
        self.written: list[Entry] = []
        self.writer = Writer(self.spool, written=self.written.extend, metrics=metrics(), log=get_logger(), group_s=0)


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Ledger]:
    ledger = Ledger(directory)
    task = asyncio.create_task(ledger.writer.run())
    try:
        yield ledger
    finally:
        task.cancel()
        await asyncio.wait([task])
        ledger.writer.close()
        ledger.spool.close()


@pytest.fixture
def store() -> OpenEntries:
    return OpenEntries()


@pytest.fixture
def counted() -> LedgerMetrics:
    return metrics()


async def test_overdue_request_is_written_down_as_what_was_reserved(
    tmp_path: Path, store: OpenEntries, counted: LedgerMetrics
) -> None:
    store.overdue_ids = {"acme": [REQUEST_ID], "other": []}
    async with running(tmp_path) as ledger:
        assert await sweep(store, ledger.writer, metrics=counted) == 1
        await until(lambda: ledger.written)
    [entry] = ledger.written
    assert (entry.request_id, entry.settlement, entry.revision) == (REQUEST_ID, EXPIRE, 0)
    assert entry.record is not None
    record = json.loads(entry.record)
    assert problems_of(record) == []
    assert (record["cost_micro_usd"], record["usage_source"]) == (1400, "estimated")
    assert value(counted.swept) == 1


async def test_request_that_has_been_told_of_meanwhile_is_left_as_it_is(
    tmp_path: Path, store: OpenEntries, counted: LedgerMetrics
) -> None:
    store.overdue_ids = {"acme": ["told", "ended", "open"]}
    store.ended = {"ended"}
    async with running(tmp_path) as ledger:
        await ledger.writer.write(Changes(entries=[an_entry("told", record="what was told")]))
        assert await sweep(store, ledger.writer, metrics=counted) == 2
        await until(lambda: len(ledger.written) == 2)
        kept = await ledger.writer.call(lambda: ledger.spool.unsettled(most=9))
    assert [entry.request_id for entry in ledger.written] == ["told", "open"]
    assert [(entry.request_id, entry.revision) for entry in kept] == [("told", 1), ("open", 0)]


async def test_store_is_not_asked_for_everything_at_once(
    tmp_path: Path, store: OpenEntries, counted: LedgerMetrics
) -> None:
    store.overdue_ids = {f"org-{org}": [f"{org}-{number}" for number in range(org)] for org in range(120)}
    async with running(tmp_path) as ledger:
        everything = sum(map(len, store.overdue_ids.values()))
        assert await sweep(store, ledger.writer, metrics=counted) == everything
        assert await ledger.writer.drain(10) == 0
        assert {entry.request_id for entry in ledger.written} == {i for ids in store.overdue_ids.values() for i in ids}
    assert store.most_at_once <= CALLS_MAX


async def test_nothing_is_swept_before_everything_that_was_told_has_been_read(
    tmp_path: Path, store: OpenEntries, counted: LedgerMetrics
) -> None:
    store.overdue_ids = {"acme": ["r-1"]}
    looks: list[bool] = []
    caught_up = False

    def has_caught_up() -> bool:
        looks.append(caught_up)
        return caught_up

    told_to_settle: list[bool] = []
    arguments: dict[str, Any] = {"may": has_caught_up, "settle": lambda: told_to_settle.append(True)}
    arguments |= {"metrics": counted, "log": get_logger()}
    async with running(tmp_path) as ledger:
        sweeping = asyncio.create_task(sweep_every(0.001, store, ledger.writer, **arguments))
        await until(lambda: len(looks) > 5)
        assert ledger.written == []
        store.down = caught_up = True
        await until(lambda: True in looks)
        store.down = False
        await until(lambda: ledger.written)
        await until(lambda: told_to_settle)
        sweeping.cancel()
    assert [entry.request_id for entry in ledger.written] == ["r-1"]


async def test_what_was_settled_and_is_open_again_is_settled_again(
    tmp_path: Path, store: OpenEntries, counted: LedgerMetrics
) -> None:
    """The store has lost what it had acknowledged."""
    store.overdue_ids = {"acme": ["told", "estimated"]}
    told, estimated = an_entry("told"), an_entry("estimated", revision=0)
    async with running(tmp_path) as ledger:
        await ledger.writer.write(Changes(entries=[told, estimated], settled=[told, estimated]))
        assert await ledger.writer.call(lambda: ledger.spool.unsettled(most=9)) == []
        assert await sweep(store, ledger.writer, metrics=counted) == 2
        kept = await ledger.writer.call(lambda: ledger.spool.unsettled(most=9))
    assert [(entry.request_id, entry.revision) for entry in kept] == [("told", 1), ("estimated", 0)]


async def test_part_of_the_store_that_is_down_does_not_keep_the_others_from_being_swept(
    tmp_path: Path, store: OpenEntries, counted: LedgerMetrics
) -> None:
    store.overdue_ids = {"acme": ["r-1"], "down": ["r-2"], "other": ["r-3"]}
    store.unavailable = {"down"}
    async with running(tmp_path) as ledger:
        with pytest.raises(StoreUnavailable):
            await sweep(store, ledger.writer, metrics=counted)
        await until(lambda: len(ledger.written) == 2)
    assert [entry.request_id for entry in ledger.written] == ["r-1", "r-3"]
    assert value(counted.swept) == 2
