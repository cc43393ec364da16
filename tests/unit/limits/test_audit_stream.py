"""The audit stream on a real Valkey that dies, refuses and comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.audit import AuditAction, AuditEvent
from gateway.errors import StoreUnavailable
from limits.audit_reader import PAGE_EVENTS, read_after, read_events
from limits.audit_stream import BATCH_MAX, STREAM, AuditStream, append, open_audit_stream
from limits.connection import Connection
from limits.valkey import ValkeyLimits, open_limits
from policies.limits import CallerLimits, SubjectLimits
from tests.harness.limit_commands import ACME, Log, Server, a_server

EVENTS_MAX = 100_000
QUEUED = 10_000


def an_event(number: int = 0, **changes: Any) -> AuditEvent:
    fields: dict[str, Any] = {
        "event_id": f"event-{number}",
        "request_id": f"request-{number}",
        "organization_id": "acme",
        "actor": "k-1",
        "action": AuditAction.REQUEST_DENIED,
        "metadata": {"reason": "request_rate"},
        "created_at": 1_700_000_000.25,
    }
    return AuditEvent(**(fields | changes))


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with a_server() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """A server that holds nothing."""
    running.client.flushall()
    return running


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A server that the test may kill."""
    with a_server() as server:
        yield server


@pytest.fixture
def log() -> Log:
    return Log()


def opened(address: str, log: Log) -> Any:
    return open_limits(address, log=cast(Any, log), deadline_s=5)


@asynccontextmanager
async def a_stream(
    connection: Connection, log: Log, *, events_max: int = EVENTS_MAX, queue_max: int = 10_000
) -> AsyncIterator[AuditStream]:
    """A stream that is written while the block runs."""
    stream = AuditStream(connection, events_max=events_max, log=cast(Any, log), queue_max=queue_max)
    running = asyncio.create_task(stream.run())
    try:
        yield stream
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def written(stream: AuditStream, *, left: int = 0, within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while stream.queued > left:  # noqa: ASYNC110 - the server makes it true
            await asyncio.sleep(0.005)


def entries(server: Server) -> list[dict[str, str]]:
    """The stream's entries in its order."""
    found = server.client.xrange(STREAM)
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]


def ids(server: Server) -> list[str]:
    """Event ids in the stream's order, each where it came first."""
    return list(dict.fromkeys(entry["event_id"] for entry in entries(server)))


def numbered(*numbers: int) -> list[str]:
    return [f"event-{number}" for number in range(*numbers)]


async def test_an_event_is_an_entry_with_these_fields(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        stream.record(an_event(7, metadata={"limit": {"unit": "usd", "remaining": 0.25}}))
        await written(stream)
    (entry,) = entries(server)
    metadata = json.loads(entry.pop("metadata"))
    assert metadata == {"limit": {"unit": "usd", "remaining": 0.25}}
    assert entry == {
        "event_id": "event-7",
        "request_id": "request-7",
        "organization_id": "acme",
        "actor": "k-1",
        "action": "REQUEST_DENIED",
        "created_at": "1700000000.250",
    }


async def test_many_events_arrive_in_order(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        for number in range(3 * BATCH_MAX + 1):
            stream.record(an_event(number))
        await written(stream)
    assert [entry["event_id"] for entry in entries(server)] == numbered(3 * BATCH_MAX + 1)


async def test_the_oldest_entries_go(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store, a_stream(store.connection, log, events_max=100) as stream:
        for number in range(1000):
            stream.record(an_event(number))
        await written(stream)
    kept = ids(server)
    assert 100 <= len(kept) < 300  # the server cuts whole blocks of 100
    assert kept == numbered(1000 - len(kept), 1000)


async def test_events_wait_for_a_dead_store_and_come_in_order(mortal: Server, log: Log) -> None:
    async with opened(mortal.address, log) as store, a_stream(store.connection, log) as stream:
        for number in range(300):
            stream.record(an_event(number))
        await written(stream)
        mortal.kill()
        for number in range(300, 2300):
            stream.record(an_event(number))
        mortal.start()
        await written(stream)
        for number in range(2300, 2400):
            stream.record(an_event(number))
        await written(stream)
    assert ids(mortal) == numbered(2400)
    assert stream.dropped == 0


async def test_a_store_that_dies_in_the_middle_of_a_batch_loses_nothing(mortal: Server, log: Log) -> None:
    count = 6000
    async with opened(mortal.address, log) as store, a_stream(store.connection, log) as stream:
        for number in range(count):
            stream.record(an_event(number))
        for left in (5000, 3000, 1000):
            await written(stream, left=left)
            mortal.kill()
            assert stream.queued
            await asyncio.to_thread(mortal.start)
        await written(stream)
    assert ids(mortal) == numbered(count)
    assert stream.dropped == 0


async def test_what_does_not_fit_is_counted_and_told_once_for_each_outage(mortal: Server, log: Log) -> None:
    dropped: list[int] = []
    async with opened(mortal.address, log) as store:
        stream = AuditStream(
            store.connection, events_max=EVENTS_MAX, log=cast(Any, log), queue_max=10, on_drop=dropped.append
        )
        writing = asyncio.create_task(stream.run())
        for outage, lost in ((1, 5), (2, 3)):
            mortal.kill()
            async with asyncio.timeout(10):
                while store.connection.is_up:  # noqa: ASYNC110 - another process makes it true
                    await asyncio.sleep(0.005)
            for number in range(10 + lost):
                stream.record(an_event(100 * outage + number))
            assert stream.queued == 10
            assert log.count("audit_events_dropped") == outage
            mortal.start()
            await written(stream)
        writing.cancel()
    assert ids(mortal) == [*numbered(100, 110), *numbered(200, 210)]
    assert (stream.dropped, sum(dropped)) == (8, 8)
    caught_up = [fields["dropped"] for name, fields in log.told if name == "audit_stream_caught_up"]
    assert caught_up == [5, 3]


async def test_recording_does_not_wait_for_a_store_that_never_was(tmp_path: Path, log: Log) -> None:
    connection = Connection(f"unix://{tmp_path}/none", prepare=_nothing, deadline_s=1, log=cast(Any, log))
    stream = AuditStream(connection, events_max=EVENTS_MAX, log=cast(Any, log), queue_max=3)
    for number in range(5):
        stream.record(an_event(number))
    assert (stream.queued, stream.dropped) == (3, 2)


async def _nothing(_: object) -> None:
    """Prepare nothing."""


@pytest.mark.parametrize(
    "metadata",
    [{("a", "b"): 1}, {"figure": float("nan")}, {"text": "x" * 20_000}],
    ids=["key that is no text", "number that JSON has not", "too large"],
)
async def test_an_event_that_cannot_be_written_is_dropped_and_told_once(
    server: Server, log: Log, metadata: dict[Any, Any]
) -> None:
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        for number in range(3):
            stream.record(an_event(number, metadata=metadata))
            stream.record(an_event(10 + number))
            await written(stream)
    assert ids(server) == numbered(10, 13)
    assert stream.dropped == 3
    assert log.count("audit_events_dropped") == 1


async def test_odd_texts_are_kept_readable(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        stream.record(an_event(1, request_id="\udcff", actor="zoë", metadata={"model": "\udcff", "path": Path("/v1")}))
        await written(stream)
        (event,) = (await read_events(store.connection, limit=10)).events
    assert (event.request_id, event.actor) == ("\\udcff", "zoë")
    assert event.metadata == {"model": "\udcff", "path": "/v1"}


async def test_a_server_that_refuses_is_told_once_and_gets_the_events_later(server: Server, log: Log) -> None:
    server.client.set(STREAM, "not a stream")
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        for number in range(3):
            stream.record(an_event(number))
        async with asyncio.timeout(10):
            while not log.count("audit_write_refused"):  # noqa: ASYNC110 - the server makes it true
                await asyncio.sleep(0.005)
        before = server.client.info("commandstats")["cmdstat_xadd"]["calls"]
        async with asyncio.timeout(10):
            while server.client.info("commandstats")["cmdstat_xadd"]["calls"] < before + 6:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert stream.queued == 3
        server.client.delete(STREAM)
        await written(stream)
    assert ids(server) == numbered(3)
    assert log.count("audit_write_refused") == 1
    assert stream.dropped == 0


async def test_a_master_that_became_a_replica_is_left(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        server.client.replicaof("127.0.0.1", 1)
        try:
            stream.record(an_event(1))
            async with asyncio.timeout(10):
                while store.connection.is_up:  # noqa: ASYNC110 - the stream makes it true
                    await asyncio.sleep(0.005)
        finally:
            server.client.replicaof("NO", "ONE")
        await written(stream)
    assert ids(server) == numbered(1, 2)


async def test_the_end_writes_what_is_queued(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store:
        async with open_audit_stream(store.connection, events_max=EVENTS_MAX, log=cast(Any, log)) as stream:
            for number in range(5000):
                stream.record(an_event(number))
        stream.record(an_event(5000))
    assert ids(server) == numbered(5000)
    assert stream.dropped == 1  # what came after the end


async def test_the_end_does_not_wait_for_a_dead_store(tmp_path: Path, log: Log) -> None:
    dropped: list[int] = []
    connection = Connection(f"unix://{tmp_path}/none", prepare=_nothing, deadline_s=1, log=cast(Any, log))
    began = time.monotonic()
    async with open_audit_stream(
        connection, events_max=EVENTS_MAX, log=cast(Any, log), on_drop=dropped.append, drain_s=0.05
    ) as stream:
        for number in range(7):
            stream.record(an_event(number))
    assert time.monotonic() - began < 5
    assert (stream.queued, stream.dropped, dropped) == (0, 7, [7])


async def test_a_full_queue_does_not_keep_admissions_waiting(server: Server, log: Log) -> None:
    limits = CallerLimits(subjects=(SubjectLimits(subject="org", max_parallel=5),))
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        for number in range(QUEUED):
            stream.record(an_event(number))
        looks = 0
        while stream.queued:
            (figure,) = await store.look(ACME, limits)
            assert figure.remaining == 5
            looks += 1
    assert looks >= 20  # not one wait for all of it
    assert len(ids(server)) == QUEUED


async def _fill(store: ValkeyLimits, *events: AuditEvent) -> None:
    for event in events:
        await append(store.connection, event, events_max=EVENTS_MAX)


async def test_reading_filters_and_begins_with_the_newest(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store:
        await _fill(
            store,
            an_event(0),
            an_event(1, organization_id=""),
            an_event(2, action=AuditAction.LIMIT_RESET, request_id=""),
            an_event(3, created_at=1_700_000_100.0),
            an_event(4, organization_id="other"),
        )

        async def found(**filters: Any) -> list[str]:
            events = (await read_events(store.connection, **({"limit": 10} | filters))).events
            return [event.event_id.removeprefix("event-") for event in events]

        assert await found() == ["4", "3", "2", "1", "0"]
        assert await found(limit=2) == ["4", "3"]
        assert await found(organization_id="acme") == ["3", "2", "0"]
        assert await found(organization_id="") == ["1"]
        assert await found(organization_id="acme", limit=1) == ["3"]
        assert await found(request_id="request-3") == ["3"]
        assert await found(action=AuditAction.LIMIT_RESET) == ["2"]
        assert await found(since_s=1_700_000_050) == ["3"]
        assert await found(since_s=1_700_000_100.1) == []
        assert (await read_events(store.connection, limit=1)).events == (an_event(4, organization_id="other"),)


async def test_since_looks_no_further_back_than_it_must(server: Server, log: Log) -> None:
    old_ms = 1_700_000_000_000
    for number in range(3 * PAGE_EVENTS):
        server.client.xadd(STREAM, {"old": number}, id=f"{old_ms}-{number + 1}")
    async with opened(server.address, log) as store:
        await _fill(store, an_event(1, created_at=time.time()))
        found = await read_events(store.connection, limit=10, since_s=time.time() - 60)
        everything = await read_events(store.connection, limit=10)
    assert ([event.event_id for event in found.events], found.unreadable) == (["event-1"], 0)
    assert everything.unreadable == 3 * PAGE_EVENTS


async def test_an_event_written_twice_is_read_once(server: Server, log: Log) -> None:
    async with opened(server.address, log) as store:
        await _fill(store, an_event(0), an_event(1), an_event(0), an_event(1), an_event(2))
        found = await read_events(store.connection, limit=10)
    assert [event.event_id for event in found.events] == ["event-2", "event-1", "event-0"]


async def test_reading_goes_on_after_a_page(server: Server, log: Log) -> None:
    count = 2 * PAGE_EVENTS + 3
    async with opened(server.address, log) as store, a_stream(store.connection, log) as stream:
        for number in range(count):
            stream.record(an_event(number, organization_id="rare" if number == 1 else "acme"))
        await written(stream)
        found = await read_events(store.connection, limit=count + 1)
        rare = await read_events(store.connection, limit=1, organization_id="rare")
    assert [event.event_id for event in found.events] == numbered(count - 1, -1, -1)
    assert [event.event_id for event in rare.events] == ["event-1"]


async def test_what_is_no_event_is_counted(server: Server, log: Log) -> None:
    fields = {"event_id": "x", "request_id": "", "organization_id": "", "actor": "", "created_at": "1"}
    server.client.xadd(STREAM, {"foreign": "entry"})
    server.client.xadd(STREAM, fields | {"action": "OF_A_LATER_VERSION", "metadata": "{}"})
    server.client.xadd(STREAM, fields | {"action": "LIMIT_RESET", "metadata": "["})
    server.client.xadd(STREAM, fields | {"action": "LIMIT_RESET", "metadata": b"\xff"})
    async with opened(server.address, log) as store:
        await _fill(store, an_event(1))
        found = await read_events(store.connection, limit=10)
    assert [event.event_id for event in found.events] == ["event-1"]
    assert found.unreadable == 4


NO_EVENTS: dict[str, dict[str, str | bytes]] = {
    **{
        f"created at {moment}": {"created_at": moment}
        for moment in ("inf", "-inf", "nan", "1e300", "-1", "253402300800")
    },
    "deep metadata": {"metadata": '{"a":' * 40 + "1" + "}" * 40},
    "deeper than anybody reads": {"metadata": '{"a":' * 5000},
    "metadata with what is no number": {"metadata": '{"a": NaN, "b": "\\ud800"}'},
    "a list for metadata": {"metadata": '[["a", 1]]'},
    "a long number": {"metadata": '{"a": %s}' % ("1" * 5000)},
    **{
        f"no text for {name}": {name: b"\xed\xa0\x80"}
        for name in ("event_id", "request_id", "organization_id", "actor")
    },
}


@pytest.mark.parametrize("odd", NO_EVENTS.values(), ids=NO_EVENTS)
async def test_what_no_ledger_could_keep_is_no_event(server: Server, log: Log, odd: dict[str, str | bytes]) -> None:
    """It was written by somebody else; a ledger that stumbled over it would do so again after every start."""
    fields: dict[str, str | bytes] = {
        "event_id": "x",
        "request_id": "",
        "organization_id": "",
        "actor": "",
        "metadata": "{}",
    }
    server.client.xadd(STREAM, fields | {"action": "LIMIT_RESET", "created_at": "1"} | odd)
    async with opened(server.address, log) as store:
        await _fill(store, an_event(1))
        page = await read_after(store.connection, "0-0", most=10)
    assert [event.event_id for event in page.events] == ["event-1"]
    assert (page.unreadable, page.count) == (1, 2)


@pytest.mark.parametrize("moment", ["0", "253402300799.999"])
async def test_every_moment_that_a_date_can_name_is_one(server: Server, log: Log, moment: str) -> None:
    fields = {"event_id": "x", "request_id": "", "organization_id": "", "actor": "", "metadata": "{}"}
    server.client.xadd(STREAM, fields | {"action": "LIMIT_RESET", "created_at": moment})
    async with opened(server.address, log) as store:
        [event] = (await read_after(store.connection, "0-0", most=10)).events
    assert event.created_at == float(moment)


async def test_append_raises_where_nothing_is_written(server: Server, log: Log) -> None:
    server.client.set(STREAM, "not a stream")
    async with opened(server.address, log) as store:
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            await append(store.connection, an_event(), events_max=EVENTS_MAX)
