"""The cache before slow stores, and the order in which stores are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from extproc.keys.cache import LOOKUPS_MAX, Cached
from extproc.keys.chain import Chain, Outages
from extproc.keys.record import KeyRecord, PresentedKey, digest
from extproc.keys.store import ASK, Ask
from gateway.errors import StoreUnavailable
from gateway.telemetry import get_logger
from policies.model import KeyId, OrganizationId

ALICE = PresentedKey("rk-alice")


def a_record(key: str = "rk-alice", **changes: Any) -> KeyRecord:
    fields = {"id": KeyId(key), "organization_id": OrganizationId("acme"), "digest": digest(key)}
    return KeyRecord(**(fields | changes))


class Clock:
    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


class SlowKeys:
    """A store that must be asked, counts how often it was, and answers when it is let."""

    def __init__(self, *records: KeyRecord, name: str = "slow") -> None:
        self.name = name
        self.records = {record.digest: record for record in records}
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    def peek(self, key: PresentedKey) -> Ask:
        return ASK

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        self.asked.append(key.secret)
        found, error = self.records.get(key.digest), self.error
        await self.open.wait()
        if error:
            raise error
        return found


Build = Callable[..., Cached]


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def wall() -> Clock:
    return Clock(1_800_000_000.0)


@pytest.fixture
def build(clock: Clock, wall: Clock) -> Build:
    def build(store: SlowKeys, *, size: int = 100, ttl_s: float = 60, negative_ttl_s: float = 5) -> Cached:
        return Cached(store, ttl_s=ttl_s, negative_ttl_s=negative_ttl_s, size=size, clock=clock, wall=wall)

    return build


async def let_tasks_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("records", "ttl_s"),
    [
        ([a_record()], 60.0),
        ([], 5.0),
        ([a_record(status="revoked")], 5.0),
        ([a_record(expires_at=1_800_000_010.0)], 10.0),
        ([a_record(expires_at=1_700_000_000.0)], 5.0),
    ],
    ids=["found", "missing", "revoked", "expires before the cache", "expired"],
)
async def test_answer_is_kept_for_its_time(build: Build, clock: Clock, records: list[KeyRecord], ttl_s: float) -> None:
    store = SlowKeys(*records)
    keys = build(store)
    answer = await keys.find(ALICE)
    assert answer == (records[0] if records else None)
    clock.at += ttl_s - 0.001
    assert keys.peek(ALICE) == answer
    assert await keys.find(ALICE) == answer
    assert len(store.asked) == 1
    clock.at += 0.001
    assert keys.peek(ALICE) is ASK
    await keys.find(ALICE)
    assert len(store.asked) == 2


async def test_burst_of_one_key_makes_one_call(build: Build) -> None:
    store = SlowKeys()
    store.open.clear()
    keys = build(store)
    waiters = [asyncio.create_task(keys.find(ALICE)) for _ in range(500)]
    await let_tasks_run()
    store.open.set()
    assert await asyncio.gather(*waiters) == [None] * 500
    assert len(store.asked) == 1


async def test_cancelled_waiter_does_not_cancel_the_shared_call(build: Build) -> None:
    store = SlowKeys(a_record())
    store.open.clear()
    keys = build(store)
    first, second = (asyncio.create_task(keys.find(ALICE)) for _ in range(2))
    await let_tasks_run()
    first.cancel()
    await let_tasks_run()
    assert first.cancelled()
    store.open.set()
    assert await second == a_record()
    assert len(store.asked) == 1


async def test_call_that_everyone_left_still_fills_the_cache(build: Build) -> None:
    store = SlowKeys(a_record())
    store.open.clear()
    keys = build(store)
    waiter = asyncio.create_task(keys.find(ALICE))
    await let_tasks_run()
    waiter.cancel()
    store.open.set()
    await let_tasks_run()
    assert keys.peek(ALICE) == a_record()


async def test_outage_reaches_every_waiter_and_is_not_cached(build: Build) -> None:
    store = SlowKeys()
    store.error = StoreUnavailable("slow: down")
    store.open.clear()
    keys = build(store)
    waiters = [asyncio.create_task(keys.find(ALICE)) for _ in range(10)]
    await let_tasks_run()
    store.open.set()
    answers = await asyncio.gather(*waiters, return_exceptions=True)
    assert all(isinstance(answer, StoreUnavailable) for answer in answers)
    assert keys.peek(ALICE) is ASK
    store.error, store.records = None, {ALICE.digest: a_record()}
    assert await keys.find(ALICE) == a_record()


async def test_cached_keys_work_while_the_store_is_down(build: Build, clock: Clock) -> None:
    store = SlowKeys(a_record())
    keys = build(store)
    await keys.find(ALICE)
    store.error = StoreUnavailable("slow: down")
    clock.at += 59
    assert await keys.find(ALICE) == a_record()
    clock.at += 1
    with pytest.raises(StoreUnavailable):
        await keys.find(ALICE)


async def test_least_recently_used_key_goes_first(build: Build) -> None:
    store = SlowKeys(*(a_record(key) for key in "abc"))
    keys = build(store, size=2)
    for key in "abac":
        await keys.find(PresentedKey(key))
    assert keys.peek(PresentedKey("a")) is not ASK
    assert keys.peek(PresentedKey("b")) is ASK
    assert len(keys) == 2


async def test_made_up_keys_do_not_push_out_real_ones(build: Build) -> None:
    keys = build(SlowKeys(a_record()), size=10)
    await keys.find(ALICE)
    for index in range(100):
        await keys.find(PresentedKey(f"made-up-{index}"))
    assert keys.peek(ALICE) == a_record()
    assert len(keys) == 11


@pytest.mark.parametrize("everything", [False, True], ids=["one key", "every key"])
async def test_invalid_key_is_asked_for_again(build: Build, everything: bool) -> None:
    store = SlowKeys(a_record())
    keys = build(store)
    await keys.find(ALICE)
    keys.invalidate(None if everything else ALICE.digest)
    store.records = {ALICE.digest: a_record(status="revoked")}
    assert await keys.find(ALICE) == a_record(status="revoked")


@pytest.mark.parametrize("everything", [False, True], ids=["one key", "every key"])
async def test_lookup_that_began_before_a_revocation_is_not_cached(build: Build, everything: bool) -> None:
    store = SlowKeys(a_record())
    store.open.clear()
    keys = build(store)
    early = asyncio.create_task(keys.find(ALICE))
    await let_tasks_run()
    store.records = {ALICE.digest: a_record(status="revoked")}
    keys.invalidate(None if everything else ALICE.digest)
    late = asyncio.create_task(keys.find(ALICE))
    await let_tasks_run()
    store.open.set()
    await early
    assert await late == a_record(status="revoked")
    assert keys.peek(ALICE) == a_record(status="revoked")


async def test_lookups_under_way_are_bounded(build: Build) -> None:
    store = SlowKeys()
    store.open.clear()
    keys = build(store)
    waiters = [asyncio.create_task(keys.find(PresentedKey(str(index)))) for index in range(LOOKUPS_MAX)]
    await let_tasks_run()
    with pytest.raises(StoreUnavailable, match="already running"):
        await keys.find(ALICE)
    store.open.set()
    await asyncio.gather(*waiters)
    assert await keys.find(ALICE) is None


async def test_closing_tells_waiters_that_the_store_is_unavailable(build: Build) -> None:
    store = SlowKeys()
    store.open.clear()
    keys = build(store)
    waiter = asyncio.create_task(keys.find(ALICE))
    await let_tasks_run()
    await keys.close()
    with pytest.raises(StoreUnavailable, match="closing"):
        await waiter


async def test_no_ttl_means_no_cache(build: Build) -> None:
    store = SlowKeys(a_record())
    keys = build(store, ttl_s=0, negative_ttl_s=0)
    await keys.find(ALICE)
    assert keys.peek(ALICE) is ASK


# --- The chain.


def down(name: str = "slow") -> SlowKeys:
    store = SlowKeys(name=name)
    store.error = StoreUnavailable(f"{name}: down")
    return store


async def test_first_store_with_the_key_wins() -> None:
    first, second = SlowKeys(a_record(principal_id="1")), SlowKeys(a_record(principal_id="2"))
    found = await Chain([SlowKeys(), first, second]).find(ALICE)
    assert found is not None
    assert found.principal_id == "1"
    assert second.asked == []


async def test_key_that_no_store_has_is_unknown() -> None:
    assert await Chain([SlowKeys(), SlowKeys()]).find(ALICE) is None
    assert await Chain([]).find(ALICE) is None
    assert Chain([]).peek(ALICE) is None


@pytest.mark.parametrize("stores", [lambda: [down(), SlowKeys()], lambda: [SlowKeys(), down()]], ids=["first", "last"])
async def test_key_is_not_unknown_while_a_store_is_down(stores: Callable[[], list[SlowKeys]]) -> None:
    with pytest.raises(StoreUnavailable):
        await Chain(stores()).find(ALICE)


async def test_store_that_is_down_is_passed_over() -> None:
    assert await Chain([down(), SlowKeys(a_record())]).find(ALICE) == a_record()


async def test_chain_knows_at_once_what_its_first_stores_know(build: Build) -> None:
    cached = build(SlowKeys(a_record()))
    chain = Chain([cached, SlowKeys()])
    assert chain.peek(ALICE) is ASK
    await chain.find(ALICE)
    assert chain.peek(ALICE) == a_record()


async def test_outage_is_logged_when_it_begins_and_when_it_ends() -> None:
    outages = Outages(get_logger())
    store = down("redis")
    chain = Chain([store, SlowKeys(a_record())], outages=outages)
    with capture_logs() as logs:
        await chain.find(ALICE)
        await chain.find(ALICE)
        assert outages.failing == {"redis": "redis: down"}
        store.error = None
        await chain.find(ALICE)
        await chain.find(ALICE)
    assert [(entry["event"], entry["store"]) for entry in logs] == [
        ("key_store_down", "redis"),
        ("key_store_up", "redis"),
    ]
    assert outages.failing == {}
