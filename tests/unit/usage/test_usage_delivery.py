"""From the spool to whoever bills: in order, at least once, and no stream holds up another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry import get_logger
from tests.unit.usage.usage_builders import START_S, a_spool, an_entry, an_event, metrics, until, value
from usage.archive import Archive
from usage.delivery import EVENTS_TOPIC, RECORDS_TOPIC, Delivery, count_mark
from usage.metrics import LedgerMetrics
from usage.outlet import BATCH_MAX, Message, Refused
from usage.spool import ALLOWED_MARK, EVENTS_MARK, RECORDS_MARK, Changes, Entry, Spool
from usage.writer import Writer


class FakeOutlet:
    """Takes messages, as many as it is allowed to, and refuses those it is told to."""

    def __init__(self) -> None:
        self.taken: list[Message] = []
        self.room = 10**9
        """Messages it still takes before it is down."""
        self.refused: set[str] = set()
        self.topic_is_refused = False
        self.sizes: list[int] = []

    async def deliver(self, messages: Sequence[Message], /) -> int:
        await asyncio.sleep(0)
        self.sizes.append(len(messages))
        for safe, message in enumerate(messages):
            if self.topic_is_refused or message.id in self.refused:
                raise Refused(message, safe=safe, reason="NO", of_topic=self.topic_is_refused)
            if not self.room:
                return safe
            self.room -= 1
            self.taken.append(message)
        return len(messages)

    async def close(self) -> None:
        """Nothing to close."""

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self.taken]


class Ledger:
    """A delivery, and an outlet for each of its streams."""

    def __init__(self, spool: Spool, outlets: dict[str, FakeOutlet], counted: LedgerMetrics) -> None:
        self.spool = spool
        self.archive = Archive(spool.path)
        self.writer = Writer(spool, written=lambda _: None, metrics=counted, log=get_logger(), retry_s=0.001, group_s=0)
        self.delivery = Delivery(
            self.archive,
            self.writer,
            outlets,
            metrics=counted,
            log=get_logger(),
            clock_s=lambda: START_S + 100.0,
            retry_s=0.001,
            pause_s=0,
        )

    async def write(self, changes: Changes) -> None:
        await self.writer.write(changes)
        self.delivery.wake()

    async def mark(self, name: str) -> int:
        await self.writer.write(Changes())
        return int(await self.archive.mark(name, 0))

    async def prune(self, **places: int) -> int:
        """Remove what may be removed, once streams are marked as handed on up to these places; how much."""
        async with asyncio.timeout(20):
            for name, place in places.items():
                while await self.mark(name) < place:  # noqa: ASYNC110 - nobody tells of it
                    await asyncio.sleep(0)
        return await self.writer.call(lambda: self.spool.prune(before_us=2**60))


@pytest.fixture
def outlets() -> dict[str, FakeOutlet]:
    return {mark: FakeOutlet() for mark in (RECORDS_MARK, ALLOWED_MARK, EVENTS_MARK)}


@pytest.fixture
def counted() -> LedgerMetrics:
    return metrics()


@asynccontextmanager
async def running(directory: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics) -> AsyncIterator[Ledger]:
    ledger = Ledger(a_spool(directory), outlets, counted)
    tasks = [asyncio.create_task(ledger.writer.run()), asyncio.create_task(ledger.delivery.run())]
    try:
        yield ledger
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        ledger.archive.close()
        ledger.writer.close()
        ledger.spool.close()


def a_record(number: int, **changes: Any) -> Entry:
    revision = changes.get("revision", 1)
    record = {"record_id": f"id-{number}", "revision": revision, "api_key_id": "k-1"}
    record |= {"model": "gpt-4o", "cost_micro_usd": 5}
    return an_entry(f"r-{number}", **{"record": json.dumps(record), **changes})


def records(*numbers: int) -> Changes:
    return Changes(entries=[a_record(number) for number in numbers])


def ids(*numbers: int) -> list[str]:
    return [f"id-{number}/1" for number in numbers]


# --- What is handed on.


async def test_record_is_handed_on_as_it_was_written(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    entry = a_record(1)
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(Changes(entries=[entry]))
        await until(lambda: outlets[RECORDS_MARK].taken)
    [message] = outlets[RECORDS_MARK].taken
    assert entry.record is not None
    assert message == Message(id="id-1/1", topic=RECORDS_TOPIC, key="acme", value=entry.record.encode())
    assert value(counted.delivered, RECORDS_TOPIC) == 1


async def test_request_that_was_let_through_is_an_audit_event_too(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(
            Changes(entries=[a_record(1), a_record(2, kind="limited"), an_entry("r-3", kind="refused", record=None)])
        )
        await until(lambda: len(outlets[RECORDS_MARK].taken) == 2 and outlets[ALLOWED_MARK].taken)
        assert await ledger.mark(ALLOWED_MARK) <= 3
    [message] = outlets[ALLOWED_MARK].taken
    assert (message.id, message.topic, message.key) == ("r-1:allowed", EVENTS_TOPIC, "acme")
    event = json.loads(message.value)
    assert (event["action"], event["actor"]) == ("REQUEST_ALLOWED", "k-1")
    assert event["created_at"] == "2027-01-15T08:00:00.000000Z"
    assert event["metadata"] == {"model": "gpt-4o", "cost_micro_usd": 5}


async def test_audit_event_is_handed_on_as_the_contract_has_it(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(Changes(events=[an_event(metadata={"param": "é\n\ud800"})]))
        await until(lambda: outlets[EVENTS_MARK].taken)
    [message] = outlets[EVENTS_MARK].taken
    assert (message.id, message.topic, message.key) == ("e-1", EVENTS_TOPIC, "acme")
    assert set(json.loads(message.value)) == {
        *("event_id", "request_id", "organization_id", "actor", "action", "created_at", "metadata")
    }
    assert json.loads(message.value)["metadata"] == {"param": "é\n\ufffd"}


async def test_estimate_and_what_takes_its_place_are_both_handed_on_in_order(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(Changes(entries=[a_record(1, revision=0)]))
        await until(lambda: outlets[RECORDS_MARK].taken)
        await ledger.write(records(2, 1))
        await until(lambda: [len(outlets[mark].taken) for mark in (RECORDS_MARK, ALLOWED_MARK)] == [3, 3])
    assert outlets[RECORDS_MARK].ids == ["id-1/0", "id-2/1", "id-1/1"]
    assert outlets[ALLOWED_MARK].ids == ["r-1:allowed:estimated", "r-2:allowed", "r-1:allowed"]


# --- In order, once, over restarts.


async def test_order_is_kept_over_batches_and_restarts(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    everything = range(3 * BATCH_MAX // 2)
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(records(*everything[:10]))
        await until(lambda: len(outlets[RECORDS_MARK].taken) == 10)
        assert await ledger.mark(RECORDS_MARK) == 10
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(records(*everything[10:]))
        await until(lambda: len(outlets[RECORDS_MARK].taken) == len(everything))
    assert outlets[RECORDS_MARK].ids == ids(*everything)
    assert max(outlets[RECORDS_MARK].sizes) <= BATCH_MAX


async def test_outlet_that_is_down_is_offered_the_rest_again_in_order(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    outlet = outlets[RECORDS_MARK]
    outlet.room = 3
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(records(*range(10)))
        await until(lambda: len(outlet.sizes) > 3)
        assert await ledger.mark(RECORDS_MARK) == 3
        assert outlet.ids == ids(0, 1, 2)
        await until(lambda: ledger.delivery.waiting == value(counted.undelivered) == 7)
        assert ledger.delivery.oldest_s == value(counted.oldest_undelivered_s) == 100
        outlet.room = 10**9
        await until(lambda: ledger.delivery.waiting == 0)
        assert ledger.delivery.oldest_s == 0
        assert outlet.ids == ids(*range(10))
        assert await ledger.mark(RECORDS_MARK) == 10


async def test_mark_never_goes_back(tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics) -> None:
    outlet, marks = outlets[RECORDS_MARK], []
    outlet.room = 0
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(records(*range(40)))
        while outlet.ids != ids(*range(40)):
            outlet.room += 3
            await until(lambda: outlet.room == 0 or len(outlet.taken) == 40)
            marks.append(await ledger.mark(RECORDS_MARK))
    assert marks == sorted(marks)


# --- What is refused.


async def test_message_that_is_refused_is_set_aside_and_the_others_go_on(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    outlet = outlets[RECORDS_MARK]
    outlet.refused = set(ids(0, 3, 4, 9))
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(records(*range(10)))
        await until(lambda: ledger.delivery.waiting == 0 and len(outlet.taken) == 6)
        assert await ledger.mark(RECORDS_MARK) == 10
        await ledger.write(records(10))
        await until(lambda: outlet.ids == ids(1, 2, 5, 6, 7, 8, 10))
    assert value(counted.undeliverable) == 4
    assert value(counted.delivered, RECORDS_TOPIC) == 7


async def test_topic_that_is_refused_keeps_its_messages_and_does_not_hold_up_others(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    outlet = outlets[RECORDS_MARK]
    outlet.topic_is_refused = True
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(Changes(entries=records(1, 2).entries, events=[an_event()]))
        await until(lambda: len(outlets[ALLOWED_MARK].taken) == 2 and outlets[EVENTS_MARK].taken)
        await until(lambda: len(outlet.sizes) > 3)
        assert await ledger.mark(RECORDS_MARK) == 0
        assert await ledger.mark(EVENTS_MARK) == 1
        assert value(counted.undeliverable) == 0
        outlet.topic_is_refused = False
        await until(lambda: outlet.ids == ids(1, 2))


async def test_what_was_refused_is_offered_again_after_a_start_and_until_then_kept(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    outlet = outlets[RECORDS_MARK]
    outlet.refused = set(ids(0, 3, 4))
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(records(*range(6)))
        await until(lambda: ledger.delivery.refused == value(counted.refused) == 3)
        assert await ledger.prune(**{RECORDS_MARK: 6, ALLOWED_MARK: 6}) == 0  # not settled
        await ledger.write(Changes(settled=records(*range(6)).entries))
        assert await ledger.prune() == 3
    outlet.refused = set(ids(4))
    async with running(tmp_path, outlets, counted) as ledger:
        await until(lambda: outlet.ids == ids(1, 2, 5, 0, 3) and ledger.delivery.refused == 1)
        assert await ledger.mark(count_mark(RECORDS_MARK)) == 5
        await ledger.write(records(7))
        await until(lambda: outlet.ids == ids(1, 2, 5, 0, 3, 7))
        assert await ledger.prune(**{RECORDS_MARK: 7}) == 2  # waits: what is not marked is handed on again
    outlet.refused = set()
    async with running(tmp_path, outlets, counted) as ledger:
        await until(lambda: outlet.ids == ids(1, 2, 5, 0, 3, 7, 4) and ledger.delivery.refused == 0)
        assert await ledger.mark(count_mark(RECORDS_MARK)) == 7
        assert await ledger.mark(RECORDS_MARK) == 7


async def test_what_was_refused_waits_for_an_outlet_that_is_down(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    outlet = outlets[RECORDS_MARK]
    outlet.refused = set(ids(0, 1))
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(records(0, 1))
        await until(lambda: ledger.delivery.refused == 2)
    outlet.refused, outlet.room = set(), 1
    async with running(tmp_path, outlets, counted) as ledger:
        await until(lambda: outlet.ids == ids(0) and ledger.delivery.refused == 1)
        outlet.room = 10
        await until(lambda: outlet.ids == ids(0, 1) and ledger.delivery.refused == 0)


async def test_estimate_that_was_refused_is_forgotten_once_another_has_its_place(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    outlet = outlets[RECORDS_MARK]
    outlet.refused = {"id-1/0"}
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(Changes(entries=[a_record(1, revision=0)]))
        await until(lambda: ledger.delivery.refused == 1)
        outlet.refused = set()
        await ledger.write(records(1))
        await until(lambda: outlet.ids == ids(1) and ledger.delivery.refused == 0)


async def test_event_that_was_refused_is_kept_and_offered_again(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    outlet = outlets[EVENTS_MARK]
    outlet.refused = {"e-1"}
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(Changes(events=[an_event()]))
        await until(lambda: value(counted.undeliverable) == 1)
        assert await ledger.prune(**{EVENTS_MARK: 1}) == 0
    outlet.refused = set()
    async with running(tmp_path, outlets, counted) as ledger:
        await until(lambda: outlet.ids == ["e-1"])
        async with asyncio.timeout(20):
            while await ledger.archive.refused(EVENTS_MARK):  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0)
        assert await ledger.prune() == 1


# --- What cannot be read.


async def test_record_that_is_none_any_more_does_not_hold_up_the_others(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics
) -> None:
    """A damaged spool may give back a text that nobody has written."""
    entries = [a_record(1), a_record(2, record='{"record_id": "id-'), a_record(3, record="[]"), a_record(4)]
    async with running(tmp_path, outlets, counted) as ledger:
        await ledger.write(Changes(entries=entries))
        await until(lambda: outlets[RECORDS_MARK].ids == ids(1, 4))
        await until(lambda: outlets[ALLOWED_MARK].ids == ["r-1:allowed", "r-4:allowed"])
        assert await ledger.mark(RECORDS_MARK) == 4
        assert [await ledger.archive.refusal(RECORDS_MARK, place) for place in (1, 2, 3)] == [
            *(None, "UNREADABLE", "UNREADABLE")
        ]
    assert value(counted.undeliverable) == 4


@pytest.mark.parametrize("steps", range(8))
async def test_it_ends_when_it_is_told_to_whatever_happens_at_that_moment(
    tmp_path: Path, outlets: dict[str, FakeOutlet], counted: LedgerMetrics, steps: int
) -> None:
    """Something new may have been written so many steps of the event loop before."""
    ledger = Ledger(a_spool(tmp_path), outlets, counted)
    delivering = asyncio.create_task(ledger.delivery.run())
    await until(lambda: all(stream.written._waiters for stream in ledger.delivery._streams))  # type: ignore[attr-defined]
    ledger.delivery.wake()
    for _ in range(steps):
        await asyncio.sleep(0)
    delivering.cancel()
    done, _ = await asyncio.wait([delivering], timeout=5)
    assert done
    ledger.archive.close()
    ledger.writer.close()
    ledger.spool.close()
