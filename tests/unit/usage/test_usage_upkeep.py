"""What the ledger does on the side: removes what is old, passes on signs of life, keeps policies and audit events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.audit import AuditAction, AuditEvent
from gateway.errors import StoreUnavailable
from gateway.settings import CommonSettings
from gateway.telemetry import get_logger
from limits.audit_stream import append
from limits.connection import Connection
from limits.valkey import open_limits
from policies.load import read_bundle
from policies.model import OrganizationId
from tests.harness.valkey import Server, a_server
from tests.unit.usage.usage_builders import START_S, a_running, a_spool, an_entry, an_event, metrics, until, value
from usage.archive import Archive, KeptEvent
from usage.audit_trail import UNKNOWN_PER_MINUTE, Unknown, follow_audit
from usage.metrics import LedgerMetrics
from usage.policies import keep_policies, read_policy
from usage.prune import prune_every
from usage.signs_of_life import TOGETHER_MAX, SignsOfLife
from usage.spool import ALLOWED_MARK, EVENTS_MARK, PRUNED_AT_ONCE, RECORDS_MARK, Changes, Spool
from usage.writer import Writer

DAY_S = 86_400


class Ledger:
    """A spool, whoever writes it and whoever reads it."""

    def __init__(self, directory: Path) -> None:
        self.spool: Spool = a_spool(directory)
        self.archive = Archive(self.spool.path)
        self.writer = Writer(
            self.spool, written=lambda _: None, metrics=metrics(), log=get_logger(), retry_s=0.001, group_s=0
        )

    async def events(self) -> list[KeptEvent]:
        return await self.archive.outgoing_events(after=0, most=1000)

    async def rows(self) -> int:
        return len(await self.archive.outgoing(after=0, most=10**6))


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Ledger]:
    ledger = Ledger(directory)
    task = asyncio.create_task(ledger.writer.run())
    try:
        yield ledger
    finally:
        task.cancel()
        await asyncio.wait([task])
        ledger.archive.close()
        ledger.writer.close()
        ledger.spool.close()


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


# --- Removing what is old.


async def test_what_is_old_is_removed_a_little_at_a_time_again_and_again(tmp_path: Path) -> None:
    now_s, files = float(START_S), []

    async def prune_files(before_s: float) -> None:
        files.append(before_s)

    async with running(tmp_path) as ledger:
        count = PRUNED_AT_ONCE + 10
        entries = [an_entry(f"r-{number}", settlement=None) for number in range(count)]
        marks: dict[str, int | str] = dict.fromkeys((RECORDS_MARK, ALLOWED_MARK, EVENTS_MARK), 10**6)
        await ledger.writer.write(Changes(entries=entries, marks=marks))
        pruning = asyncio.create_task(
            prune_every(
                0.001,
                ledger.spool,
                ledger.writer,
                prune_files,
                kept_s=DAY_S,
                clock_s=lambda: now_s,
                log=get_logger(),
            )
        )
        await until(lambda: len(files) > 2)
        assert await ledger.rows() == count
        assert set(files) == {START_S - DAY_S}
        now_s += DAY_S + 1
        await until(lambda: files[-1] > START_S)
        assert await ledger.rows() == 0
        await ended(pruning)


# --- Signs of life.


class Deadlines:
    """Keeps what was put off."""

    def __init__(self) -> None:
        self.extended: list[str] = []
        self.down = False
        self.may = asyncio.Event()
        self.may.set()
        self.most_at_once = self._at_once = 0

    async def extend(self, organization_id: OrganizationId, request_id: str, /) -> bool:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0)
        await self.may.wait()
        self._at_once -= 1
        if self.down:
            raise StoreUnavailable("down")
        self.extended.append(f"{organization_id} {request_id}")
        return True


@asynccontextmanager
async def passing_on(deadlines: Deadlines) -> AsyncIterator[SignsOfLife]:
    signs = SignsOfLife(deadlines)
    task = asyncio.create_task(signs.run())
    yield signs
    await ended(task)


async def test_signs_of_life_are_passed_on_each_request_once_however_often_it_is_told_of() -> None:
    deadlines = Deadlines()
    deadlines.may.clear()
    async with passing_on(deadlines) as signs:
        signs.take([a_running("r-0")])
        await until(lambda: deadlines.most_at_once)
        for _ in range(10):
            signs.take([a_running("r-1"), a_running("r-2", "other")])
        deadlines.may.set()
        await until(lambda: len(deadlines.extended) == 3)
    assert deadlines.extended == ["acme r-0", "acme r-1", "other r-2"]


async def test_signs_of_many_requests_are_not_passed_on_all_at_once() -> None:
    deadlines = Deadlines()
    async with passing_on(deadlines) as signs:
        signs.take([a_running(f"r-{number}") for number in range(1000)])
        await until(lambda: len(deadlines.extended) == 1000)
    assert deadlines.most_at_once == TOGETHER_MAX


async def test_sign_that_the_store_does_not_take_is_followed_by_another() -> None:
    deadlines = Deadlines()
    deadlines.down = True
    async with passing_on(deadlines) as signs:
        signs.take([a_running("r-1")])
        await until(lambda: deadlines.most_at_once)
        await asyncio.sleep(0)
        deadlines.down = False
        signs.take([a_running("r-1")])
        await until(lambda: deadlines.extended == ["acme r-1"])


# --- Policies.

POLICY = """
backends: [{id: a, uri: "http://a"}]
models: [{model: m, organization_id: "*", backends: [{backend_id: a, weight: 1}]}]
"""


def replace_policy(directory: Path, text: str) -> str:
    """Put a policy in place as an editor does; its digest."""
    directory.mkdir(exist_ok=True)
    (directory / ".new").write_text(text)
    (directory / ".new").rename(directory / "policy.yaml")
    return read_bundle(directory).digest


@asynccontextmanager
async def keeping(directory: Path) -> AsyncIterator[Ledger]:
    settings = CommonSettings(run_dir=directory, policy_dir=directory / "policies")
    async with running(directory) as ledger:
        task = asyncio.create_task(keep_policies(settings, ledger.writer, log=get_logger()))
        yield ledger
        await ended(task)


async def kept_digests(ledger: Ledger) -> list[str]:
    return [json.loads(event.metadata)["policy_version"] for event in await ledger.events()]


async def kept(ledger: Ledger, digest: str) -> str:
    """The policy's document, once it is kept."""
    async with asyncio.timeout(20):
        while (document := await ledger.archive.policy(digest)) is None:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.01)
    return document


async def test_every_policy_that_was_in_force_is_kept_and_its_change_audited_once(tmp_path: Path) -> None:
    first = replace_policy(tmp_path / "policies", POLICY)
    async with keeping(tmp_path) as ledger:
        assert read_policy(await kept(ledger, first)).policy.digest == first
        replace_policy(tmp_path / "policies", "garbage: 1")
        second = replace_policy(tmp_path / "policies", POLICY.replace("http://a", "http://b"))
        assert read_policy(await kept(ledger, second)).policy.digest == second
    async with keeping(tmp_path) as ledger:
        await kept(ledger, second)
        assert await kept_digests(ledger) == [first, second]
        [_, change] = await ledger.events()
        assert change.action == AuditAction.POLICY_UPDATE.value
        assert json.loads(change.metadata) == {"policy_version": second, "policy_before": first}
        assert await ledger.archive.policy(first) is not None


async def test_policy_that_is_none_from_the_start_is_waited_for(tmp_path: Path) -> None:
    replace_policy(tmp_path / "policies", "garbage: 1")
    async with keeping(tmp_path) as ledger:
        good = replace_policy(tmp_path / "policies", POLICY)
        assert await kept(ledger, good)
        assert await kept_digests(ledger) == [good]


# --- The audit trail.


@pytest.fixture
def server() -> Iterator[Server]:
    with a_server() as started:
        yield started


@asynccontextmanager
async def following(directory: Path, server: Server) -> AsyncIterator[tuple[Ledger, Connection]]:
    async with (
        running(directory) as ledger,
        open_limits(f"unix://{server.socket}", log=get_logger(), deadline_s=5) as store,
    ):
        task = asyncio.create_task(follow_audit(store.connection, ledger.writer, metrics=metrics(), log=get_logger()))
        yield ledger, store.connection
        await ended(task)


async def tell(connection: Connection, *events: AuditEvent) -> None:
    """As another program does."""
    for event in events:
        await append(connection, event, events_max=10_000)


async def has_events(ledger: Ledger, *event_ids: str) -> None:
    async with asyncio.timeout(20):
        while [event.event_id for event in await ledger.events()] != list(event_ids):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.01)


async def test_audit_events_are_copied_once_and_in_order_over_restarts(tmp_path: Path, server: Server) -> None:
    async with following(tmp_path, server) as (ledger, connection):
        await tell(connection, an_event("e-1"), an_event("e-2", metadata={"param": "é\ud800"}))
        await has_events(ledger, "e-1", "e-2")
        await tell(connection, an_event("e-2"), an_event("e-3"))
        await has_events(ledger, "e-1", "e-2", "e-3")
    async with following(tmp_path, server) as (ledger, connection):
        await tell(connection, an_event("e-4"))
        await has_events(ledger, "e-1", "e-2", "e-3", "e-4")
        [second] = [event for event in await ledger.events() if event.event_id == "e-2"]
        assert (second.actor, second.action, second.created_us) == ("k-1", "KEY_CREATED", START_S * 10**6)
        assert json.loads(second.metadata) == {"param": "é\ufffd"}


async def test_entry_that_is_no_event_does_not_stop_the_others(tmp_path: Path, server: Server) -> None:
    async with following(tmp_path, server) as (ledger, connection):
        server.client.xadd("router:audit", {"something": "else"})
        await tell(connection, an_event("e-1"))
        await has_events(ledger, "e-1")


async def test_more_events_than_are_read_at_once_are_all_copied(tmp_path: Path, server: Server) -> None:
    async with following(tmp_path, server) as (ledger, connection):
        ids = [f"e-{number}" for number in range(700)]
        await tell(connection, *map(an_event, ids))
        await has_events(ledger, *ids)


@pytest.mark.parametrize("moment", ["inf", "nan", "1e300", "-1", "253402300800"])
async def test_moment_that_no_date_can_name_does_not_stop_the_ledger(
    tmp_path: Path, server: Server, moment: str
) -> None:
    fields = {"event_id": "x", "request_id": "", "organization_id": "", "actor": "", "metadata": "{}"}
    async with following(tmp_path, server) as (ledger, connection):
        server.client.xadd("router:audit", fields | {"action": "LIMIT_RESET", "created_at": moment})
        await tell(connection, an_event("e-1"))
        await has_events(ledger, "e-1")


# --- Of denials of nobody known only so many a minute.


def a_denial(event_id: str = "d", **changes: Any) -> AuditEvent:
    """Of somebody without a key."""
    return an_event(event_id, **({"action": AuditAction.REQUEST_DENIED, "organization_id": "", "actor": ""} | changes))


class Log:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def warning(self, event: str, *, events: int, **_: Any) -> None:
        self.told.append((event, events))


def an_unknown(clock_s: Callable[[], float] = lambda: 0.0) -> tuple[Unknown, LedgerMetrics, Log]:
    counted, log = metrics(), Log()
    return Unknown(metrics=counted, log=cast("Any", log), clock_s=clock_s), counted, log


def test_only_so_many_denials_of_nobody_known_are_kept_of_each_minute() -> None:
    unknown, counted, _ = an_unknown()
    for minute in (0, 1, 0):
        for _ in range(UNKNOWN_PER_MINUTE):
            unknown.keeps(a_denial(created_at=START_S + 60.0 * minute))
    assert value(counted.events_skipped) == UNKNOWN_PER_MINUTE
    assert not unknown.keeps(a_denial(created_at=START_S + 119.0))
    assert unknown.keeps(a_denial(created_at=START_S + 120.0))


@pytest.mark.parametrize(
    "event",
    [
        a_denial(organization_id="acme"),
        *(a_denial(action=action) for action in AuditAction if "REQUEST" not in action.value),
    ],
    ids=lambda event: f"{event.action.value} of {event.organization_id or 'nobody'}",
)
def test_what_somebody_known_or_an_operator_did_is_always_kept(event: AuditEvent) -> None:
    unknown, counted, _ = an_unknown()
    assert all(unknown.keeps(event) for _ in range(2 * UNKNOWN_PER_MINUTE))
    assert all(unknown.keeps(a_denial()) for _ in range(UNKNOWN_PER_MINUTE))
    assert value(counted.events_skipped) == 0


def test_minutes_that_are_remembered_are_few() -> None:
    unknown, _, _ = an_unknown()
    assert all(unknown.keeps(a_denial(created_at=60.0 * minute)) for minute in range(1000))
    assert len(unknown._seen) <= 60


def test_number_of_those_that_are_not_kept_is_told_once_a_minute() -> None:
    now = [0.0]
    unknown, _, log = an_unknown(lambda: now[0])
    unknown.tell()
    for seconds, denials in ((0, UNKNOWN_PER_MINUTE + 5), (30, 3), (59, 4), (60, 0), (130, 0), (131, 1)):
        now[0] = float(seconds)
        for _ in range(denials):
            unknown.keeps(a_denial())
        unknown.tell()
    assert log.told == [("audit_events_skipped", 5), ("audit_events_skipped", 7), ("audit_events_skipped", 1)]


async def test_flood_of_denials_fills_no_disk(tmp_path: Path, server: Server) -> None:
    async with following(tmp_path, server) as (ledger, connection):
        await tell(connection, *(a_denial(f"d-{number}") for number in range(UNKNOWN_PER_MINUTE + 50)))
        await tell(connection, an_event("known", organization_id="acme", action=AuditAction.REQUEST_DENIED))
        expected = [f"d-{number}" for number in range(UNKNOWN_PER_MINUTE)]
        await has_events(ledger, *expected, "known")
