"""Envoy's count and the ledger's are of the same Envoy and of the same moment, whatever restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.telemetry import get_logger
from tests.unit.usage.usage_builders import a_spool, an_entry, metrics, value
from usage.archive import Archive
from usage.reconcile import KEPT_S, LAG_S, WORST_OF_S, Reconciliation
from usage.record import MICRO
from usage.spool import Changes
from usage.writer import Writer

TOTAL = "http.public.downstream_rq_total"
RUNNING = "http.public.downstream_rq_active"
START_S = 1_800_000_000.0


class Envoy:
    """An admin interface."""

    def __init__(self) -> None:
        self.started_s = START_S
        self.total: int | None = 0
        self.running = 0
        self.broken: dict[str, Any] = {}
        self.between: Callable[[], None] = lambda: None
        """Happens between its two answers."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path in self.broken:
            return httpx.Response(200, content=self.broken[request.url.path])
        if request.url.path == "/config_dump":
            assert request.url.params["mask"] == "last_updated"
            started = datetime.fromtimestamp(self.started_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
            bootstrap = {"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "last_updated": started}
            return httpx.Response(200, json={"configs": [{"@type": "x/ClustersConfigDump"}, bootstrap]})
        asked = request.url.params["filter"].strip("^$")
        stats: list[dict[str, Any]] = [{"histograms": {}}]
        if self.total is not None:
            stats.append({"name": asked, "value": {TOTAL: self.total, RUNNING: self.running}[asked]})
        if asked == TOTAL:
            self.between()
        return httpx.Response(200, json={"stats": stats})


class Ledger:
    """A reconciliation, and the time it goes by."""

    def __init__(self, directory: Path) -> None:
        self.envoy = Envoy()
        self.now_s = START_S + 10
        self.set_by_s = 0.0
        self.is_caught_up = True
        self.counted = metrics()
        self.spool = a_spool(directory)
        self.archive = Archive(self.spool.path)
        self.writer = Writer(
            self.spool, written=lambda _: None, metrics=self.counted, log=get_logger(), retry_s=0.001, group_s=0
        )
        self.reconciliation = self.started()
        self._told = 0

    def started(self) -> Reconciliation:
        return Reconciliation(
            self.spool,
            self.archive,
            self.writer,
            httpx.AsyncClient(transport=httpx.MockTransport(self.envoy)),
            "127.0.0.1:9901",
            caught_up=lambda: self.is_caught_up,
            metrics=self.counted,
            log=get_logger(),
            clock_s=lambda: self.now_s + self.set_by_s,
            monotonic_s=lambda: self.now_s,
        )

    @property
    def unaccounted(self) -> int | None:
        return self.reconciliation.unaccounted

    def end(self, count: int = 1, *, told: bool = True) -> None:
        """So many requests end now, and are told of."""
        self.envoy.total = (self.envoy.total or 0) + count
        if told:
            self.tell(*[self.now_s + self.set_by_s] * count)

    def tell(self, *ended_s: float) -> None:
        ended_us = [round(at * MICRO) for at in ended_s]
        self.spool.write(
            Changes(entries=[an_entry(f"r-{self._told + n}", ended_us=at) for n, at in enumerate(ended_us)])
        )
        self._told += len(ended_us)

    def restart_envoy(self) -> None:
        self.now_s += 0.2
        self.envoy.started_s = round(self.now_s, 3)
        self.envoy.total = self.envoy.running = 0
        self.now_s += 0.2

    async def compare(self, after_s: float = 0) -> tuple[int, int] | None:
        self.now_s += after_s
        found = await self.reconciliation.compare()
        return None if found is None else (found[0].ended, found[1])

    async def settled(self) -> int | None:
        """What is unaccounted once everything had its time."""
        self.now_s += LAG_S
        await self.compare()
        await self.compare(after_s=LAG_S + 1)
        await self.compare(after_s=WORST_OF_S + LAG_S)
        return self.unaccounted

    def close(self) -> None:
        self.archive.close()
        self.writer.close()
        self.spool.close()


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    opened = Ledger(tmp_path)
    yield opened
    opened.close()


async def after_the_first(ledger: Ledger) -> None:
    """From the first comparison on whatever is missing is known to be."""
    await ledger.compare()
    await ledger.compare(after_s=LAG_S)
    assert ledger.unaccounted == 0
    ledger.now_s += 1


async def test_requests_that_were_told_of_are_accounted_for(ledger: Ledger) -> None:
    await after_the_first(ledger)
    ledger.end(3)
    assert await ledger.compare() == (3, 3)
    assert await ledger.settled() == value(ledger.counted.unaccounted) == 0


async def test_what_is_known_is_told_from_the_first_look_on(ledger: Ledger) -> None:
    ledger.end(3)
    assert await ledger.compare() == (3, 3)
    assert ledger.unaccounted is None


async def test_request_is_unaccounted_once_it_should_have_been_told_of(ledger: Ledger) -> None:
    await after_the_first(ledger)
    ledger.end(1)
    ledger.end(2, told=False)
    ended_s = ledger.now_s
    assert await ledger.compare() == (3, 1)
    await ledger.compare(after_s=LAG_S - 1)
    assert ledger.unaccounted == 0
    await ledger.compare(after_s=1)
    assert ledger.unaccounted == value(ledger.counted.unaccounted) == 2
    ledger.tell(ended_s, ended_s)
    assert await ledger.settled() == value(ledger.counted.unaccounted) == 0


async def test_stream_that_runs_is_not_missed(ledger: Ledger) -> None:
    await after_the_first(ledger)
    ledger.envoy.total, ledger.envoy.running = 2, 2
    assert await ledger.settled() == 0
    assert await ledger.compare() == (0, 0)


@pytest.mark.parametrize("lost", [0, 1, 3])
async def test_loss_shows_while_others_end_all_the_time(ledger: Ledger, lost: int) -> None:
    await after_the_first(ledger)
    ledger.end(lost, told=False)
    for _ in range(40):
        ledger.now_s += 0.1
        ledger.end(50)
        await ledger.compare(after_s=0.7)
        assert ledger.unaccounted in {0, lost}
    assert ledger.unaccounted == lost


async def test_nothing_is_said_while_the_journal_is_not_read_to_its_end(ledger: Ledger) -> None:
    await after_the_first(ledger)
    ledger.is_caught_up = False
    ended_s = ledger.now_s
    ledger.end(5, told=False)
    assert await ledger.settled() == 0
    ledger.tell(*[ended_s] * 5)
    ledger.is_caught_up = True
    assert await ledger.settled() == 0


async def test_another_envoy_is_not_held_against_the_one_before(ledger: Ledger) -> None:
    await after_the_first(ledger)
    ledger.end(5)
    ledger.end(1, told=False)  # it dies with it
    await ledger.compare()
    before_s = ledger.now_s
    ledger.restart_envoy()
    ledger.tell(before_s, before_s)  # read late
    ledger.end(1)
    assert await ledger.compare() == (1, 1)
    ledger.end(2, told=False)
    assert await ledger.settled() == 2


async def test_what_was_counted_is_folded_and_stays_known(ledger: Ledger) -> None:
    await after_the_first(ledger)
    total = 0
    for _ in range(100):
        ledger.end(2)
        total += 2
        await ledger.compare(after_s=5)
    assert await ledger.compare() == (total, total)
    [(rows,)] = await ledger.archive.call(lambda db: db.execute("SELECT count(*) FROM ended").fetchall())
    assert rows <= (KEPT_S + LAG_S) / 5 + 2
    ledger.tell(ledger.now_s - 400)  # later than any journal
    ledger.envoy.total = total + 1
    assert await ledger.settled() == 0


async def test_what_begins_while_envoy_answers_has_not_ended(ledger: Ledger) -> None:
    await after_the_first(ledger)

    def begin() -> None:
        ledger.envoy.total = (ledger.envoy.total or 0) + 1
        ledger.envoy.running += 1

    ledger.envoy.between = begin
    for _ in range(5):
        assert await ledger.settled() == 0


@pytest.mark.parametrize("step_s", [-3600.0, -30.0, -5.0, 5.0, 3600.0])
async def test_clock_that_is_set_begins_the_counts_anew(ledger: Ledger, step_s: float) -> None:
    await after_the_first(ledger)
    ledger.end(5)
    await ledger.compare()
    ledger.set_by_s = step_s
    await ledger.compare(after_s=1)
    await ledger.compare(after_s=LAG_S)
    ledger.now_s += 1
    ledger.end(5)
    assert await ledger.compare() == (10, 10)
    ledger.end(1, told=False)
    assert await ledger.settled() == 1
    assert await ledger.compare() == (11, 10)


async def test_what_is_written_while_others_are_folded_is_known(ledger: Ledger) -> None:
    await after_the_first(ledger)
    writing = asyncio.create_task(ledger.writer.run())
    long_ago_s, told = ledger.now_s, 0
    ledger.now_s += 10 * KEPT_S
    for number in range(20):
        changes = Changes(entries=[an_entry(f"late-{number}", ended_us=round(long_ago_s * MICRO))])
        told += 1
        await asyncio.gather(ledger.writer.write(changes), ledger.compare(after_s=LAG_S))
    assert await ledger.compare() == (0, told)
    writing.cancel()
    await asyncio.wait([writing])


async def test_after_the_spool_was_lost_counts_begin_anew(ledger: Ledger) -> None:
    ledger.envoy.total = 1000
    ledger.tell(ledger.now_s, ledger.now_s)
    await after_the_first(ledger)
    ledger.end(3)
    assert await ledger.compare() == (1003, 1003)
    ledger.end(1, told=False)
    assert await ledger.settled() == 1


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.sampled_from(["request", "lost", "look", "ledger restarts", "envoy restarts", "time passes"]), max_size=40
    )
)
def test_count_is_right_whatever_restarts_whenever(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    async def work() -> None:
        ledger, lost = Ledger(tmp_path_factory.mktemp("spool")), 0
        await after_the_first(ledger)
        for step in steps:
            match step:
                case "request":
                    ledger.end()
                case "lost":
                    ledger.end(told=False)
                    lost += 1
                case "look":
                    await ledger.compare(after_s=1)
                case "ledger restarts":
                    ledger.reconciliation = ledger.started()
                case "envoy restarts":
                    ledger.restart_envoy()
                    lost = 0
                case _:
                    ledger.now_s += 50
        assert await ledger.settled() == lost
        ledger.close()

    asyncio.run(work())


async def test_envoy_that_has_seen_nothing_has_no_counter(ledger: Ledger) -> None:
    ledger.envoy.total = None
    assert await ledger.compare() == (0, 0)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/config_dump", b"no json"),
        ("/config_dump", b"{}"),
        ("/config_dump", b'{"configs": []}'),
        ("/config_dump", b'{"configs": [{"@type": "BootstrapConfigDump"}]}'),
        ("/config_dump", b'{"configs": [{"@type": "BootstrapConfigDump", "last_updated": "long ago"}]}'),
        ("/config_dump", b"[]"),
        ("/stats", b"no json"),
        ("/stats", b"{}"),
        ("/stats", b'{"stats": [1]}'),
    ],
)
async def test_answer_that_says_nothing_changes_nothing(ledger: Ledger, path: str, answer: bytes) -> None:
    ledger.envoy.broken = {path: answer}
    assert await ledger.compare() is None
    assert ledger.unaccounted is None
