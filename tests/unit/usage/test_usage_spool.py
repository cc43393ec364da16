"""The spool: written together or not at all, what stands of two, what waits, and what is never removed."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gateway.audit import AuditAction
from limits.model import Settlement
from tests.unit.usage.usage_builders import START_S, a_settlement, a_spool, an_attempt, an_entry, an_event
from usage.spool import (
    _PRUNE_EVENTS,
    _PRUNE_REQUESTS,
    ALLOWED_MARK,
    EVENTS_MARK,
    EXPIRE,
    POLICY_MARK,
    RECORDS_MARK,
    Changes,
    Refusal,
    Spool,
)

US = START_S * 1_000_000


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = a_spool(tmp_path)
    yield opened
    opened.close()


def rows(spool: Spool, table: str) -> list[tuple[Any, ...]]:
    """What another program reads of it."""
    with closing(sqlite3.connect(f"file:{spool.path}?mode=ro", uri=True)) as db:
        return list(db.execute(f"SELECT * FROM {table}"))


def ids(spool: Spool) -> list[str]:
    """Request ids in their order."""
    return [row[1] for row in rows(spool, "requests")]


# --- Together or not at all.


def test_everything_is_written_together(spool: Spool) -> None:
    fresh = spool.write(
        Changes(
            entries=[an_entry("r-1", ended_us=19_999), an_entry("r-2", settlement=None, record=None, kind="refused")],
            anonymous=[20_000, 29_000],
            attempts=[an_attempt(flags=("UF", "URX"))],
            events=[an_event()],
            marks={"journal": "7:8"},
            policies=[("0a", "{}")],
        )
    )
    assert [entry.request_id for entry in fresh] == ["r-1", "r-2"]
    assert ids(spool) == ["r-1", "r-2"]
    assert [row[4] for row in rows(spool, "attempts")] == ["UF,URX"]
    assert [row[1] for row in rows(spool, "events")] == ["e-1"]
    assert dict(rows(spool, "tallies")) == {"forwarded": 1, "anonymous": 2}
    assert rows(spool, "ended") == [(1, 1), (2, 2)]
    assert spool.mark("journal", "") == "7:8"
    assert rows(spool, "policies") == [("0a", "{}")]


@pytest.mark.parametrize(
    "broken",
    [
        Changes(entries=[an_entry("r-2")], marks={"m": object()}),  # type: ignore[dict-item]
        Changes(entries=[an_entry("r-2", started_us=2**70)]),
        Changes(entries=[an_entry("r-2")], events=[an_event(metadata={"x": {1}})]),
    ],
    ids=["a mark that is no value", "a number too large", "an event that is no JSON"],
)
def test_nothing_is_written_of_what_cannot_all_be(spool: Spool, broken: Changes) -> None:
    spool.write(Changes(entries=[an_entry("r-1")], marks={"m": 1}))
    good = Changes(entries=[an_entry("r-0")])
    good.add(broken)
    with pytest.raises((sqlite3.Error, OverflowError, TypeError)):
        spool.write(good)
    assert ids(spool) == ["r-1"]
    assert rows(spool, "tallies") == []
    assert spool.mark("m", 0) == 1
    assert [entry.request_id for entry in spool.write(Changes(entries=[an_entry("r-3")]))] == ["r-3"]


def test_requests_are_counted_once_and_the_last_mark_stands(spool: Spool) -> None:
    for number in range(3):
        entries = [an_entry(f"r-{n}", kind="limited" if n else "forwarded", ended_us=1) for n in range(number + 1)]
        spool.write(Changes(entries=entries, marks={"m": number}))
    assert dict(rows(spool, "tallies")) == {"forwarded": 1, "limited": 2}
    assert rows(spool, "ended") == [(0, 3)]
    assert spool.mark("m", None) == 2
    assert spool.mark("other", "none") == "none"


# --- Which of two entries of one request stands.


def test_request_told_of_again_changes_nothing(spool: Spool) -> None:
    spool.write(Changes(entries=[an_entry("r-1", record="first")]))
    assert spool.write(Changes(entries=[an_entry("r-1", record="second")])) == []
    assert [row[7] for row in rows(spool, "requests")] == ["first"]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_higher_revision_stands_whichever_comes_first(spool: Spool, first: int, together: bool) -> None:
    entries = [an_entry("r-1", revision=revision, record=f"{revision}") for revision in (first, 1 - first)]
    for changes in [Changes(entries=entries)] if together else [Changes(entries=[entry]) for entry in entries]:
        spool.write(changes)
    assert [(row[2], row[7]) for row in rows(spool, "requests")] == [(1, "1")]


def test_entry_that_takes_anothers_place_is_handed_on_after_it(spool: Spool) -> None:
    spool.write(Changes(entries=[an_entry("r-1", revision=0), an_entry("r-2")]))
    spool.write(Changes(entries=[an_entry("r-1", revision=1)]))
    assert ids(spool) == ["r-2", "r-1"]
    assert rows(spool, "requests")[1][0] > 2


# --- What is to be settled.


def test_unsettled_come_back_as_they_were_written_the_oldest_first(spool: Spool) -> None:
    settlement = a_settlement("r-2", micro_usd=2**40, charge_to='org:DAILY "é')
    spool.write(
        Changes(
            entries=[
                an_entry("r-1", settlement=EXPIRE, revision=0),
                an_entry("r-2", settlement=settlement, tried_s=5),
                an_entry("r-3", settlement=None),
                an_entry("r-4"),
            ]
        )
    )
    found = spool.unsettled(most=10)
    assert [(entry.request_id, entry.settlement, entry.tried_s, entry.revision) for entry in found] == [
        ("r-1", EXPIRE, None, 0),
        ("r-2", settlement, 5, 1),
        ("r-4", a_settlement("r-4"), None, 1),
    ]
    assert [entry.request_id for entry in spool.unsettled(most=2)] == ["r-1", "r-2"]


def test_settled_and_tried_are_marked(spool: Spool) -> None:
    entries = [an_entry("r-1"), an_entry("r-2")]
    spool.write(Changes(entries=entries))
    spool.write(Changes(settled=entries[:1], tried=[(9, entries[1])]))
    assert [(entry.request_id, entry.tried_s) for entry in spool.unsettled(most=10)] == [("r-2", 9)]


def test_settled_estimate_does_not_settle_what_took_its_place(spool: Spool) -> None:
    estimate = an_entry("r-1", revision=0, settlement=EXPIRE)
    spool.write(Changes(entries=[estimate]))
    spool.write(Changes(entries=[an_entry("r-1", revision=1)]))
    spool.write(Changes(settled=[estimate], tried=[(9, estimate)]))
    assert [(entry.revision, entry.tried_s) for entry in spool.unsettled(most=10)] == [(1, None)]


# --- What is removed, and what never is.


def delivered(spool: Spool, **places: int | str) -> None:
    marks: dict[str, int | str] = {RECORDS_MARK: 9, ALLOWED_MARK: 9, EVENTS_MARK: 9}
    spool.write(Changes(marks=marks | places))


def test_what_is_old_settled_and_handed_on_is_removed(spool: Spool) -> None:
    entries = [an_entry("old"), an_entry("new", started_us=US + 2)]
    events = [an_event("old"), an_event("new", created_at=START_S + 1.0)]
    attempts = [an_attempt(), an_attempt(started_us=US + 2)]
    spool.write(Changes(entries=entries, events=events, attempts=attempts, settled=entries))
    delivered(spool)
    assert spool.prune(before_us=US + 1) == 3
    assert ids(spool) == ["new"]
    assert [row[1] for row in rows(spool, "events")] == ["new"]
    assert [row[1] for row in rows(spool, "attempts")] == [US + 2]
    assert spool.prune(before_us=US + 1) == 0


@pytest.mark.parametrize(
    "places",
    [{RECORDS_MARK: 0}, {ALLOWED_MARK: 0}, {RECORDS_MARK: 0, ALLOWED_MARK: 0}],
    ids=["no record was handed on", "no event of it was", "neither was"],
)
def test_what_was_not_handed_on_is_never_removed(spool: Spool, places: dict[str, int]) -> None:
    spool.write(Changes(entries=[an_entry("r-1")], events=[an_event()], settled=[an_entry("r-1")]))
    delivered(spool, **places, **{EVENTS_MARK: 0})
    assert spool.prune(before_us=2**60) == 0
    assert ids(spool) == ["r-1"]
    assert len(rows(spool, "events")) == 1


def test_what_was_not_settled_is_never_removed(spool: Spool) -> None:
    spool.write(Changes(entries=[an_entry("r-1"), an_entry("r-2", settlement=None)]))
    delivered(spool)
    assert spool.prune(before_us=2**60) == 1
    assert ids(spool) == ["r-1"]


def test_policy_is_removed_once_the_event_of_its_end_is(spool: Spool) -> None:
    """No request is kept longer that began under it."""
    documents = [(digest, "{}") for digest in ("p-1", "p-2", "p-3")]
    changes = [("p-1", ""), ("p-2", "p-1"), ("p-3", "p-2")]
    events = [
        an_event(
            f"e-{number}",
            action=AuditAction.POLICY_UPDATE,
            created_at=START_S + number,
            metadata={"policy_version": digest, "policy_before": before},
        )
        for number, (digest, before) in enumerate(changes)
    ]
    spool.write(Changes(policies=documents, events=events))
    delivered(spool, **{POLICY_MARK: "p-3"})
    left = []
    for second in range(4):
        while spool.prune(before_us=US + second * 1_000_000 + 1):
            pass
        left.append([digest for digest, _ in rows(spool, "policies")])
    assert left == [["p-1", "p-2", "p-3"], ["p-2", "p-3"], ["p-3"], ["p-3"]]


@pytest.mark.parametrize(("stream", "kept"), [(RECORDS_MARK, True), (ALLOWED_MARK, True), (EVENTS_MARK, False)])
def test_what_was_refused_is_never_removed(spool: Spool, stream: str, kept: bool) -> None:
    entry = an_entry("r-1", settlement=None)
    spool.write(Changes(entries=[entry], refused=[Refusal(stream=stream, place=1, reason="NO")]))
    delivered(spool)
    assert spool.prune(before_us=2**60) == (not kept)
    spool.write(Changes(offered_again=[(stream, 1)]))
    assert spool.prune(before_us=2**60) == kept


def test_places_are_never_used_again(spool: Spool) -> None:
    """A mark says how far was handed on: what comes after everything was removed is behind it."""
    spool.write(Changes(entries=[an_entry(f"r-{number}", settlement=None) for number in range(5)]))
    delivered(spool)
    assert spool.prune(before_us=2**60) == 5
    spool.write(Changes(entries=[an_entry("r-5")]))
    assert [row[0] for row in rows(spool, "requests")] == [6]


@pytest.mark.parametrize("query", [_PRUNE_REQUESTS, _PRUNE_EVENTS])
def test_what_is_young_is_not_looked_at(spool: Spool, query: str) -> None:
    """It is nearly all of it, and whoever writes waits meanwhile."""
    plan = spool._db.execute(f"EXPLAIN QUERY PLAN {query}", [0] * query.count("?")).fetchall()
    steps = [step[3] for step in plan if "requests" in step[3] or "events" in step[3]]
    assert any("USING INDEX requests_started (started_us<?)" in step or "events_created" in step for step in steps)
    assert not any(step.startswith("SCAN") for step in steps)


def test_estimate_that_the_store_may_have_taken_long_ago_is_not_charged_again(spool: Spool) -> None:
    """Its end is told of a day later, when the store has forgotten that it has charged what was reserved."""
    estimate = an_entry("r-1", revision=0, settlement=EXPIRE)
    spool.write(Changes(entries=[estimate]))
    spool.write(Changes(tried=[(7, estimate)], settled=[estimate]))
    [fresh] = spool.write(Changes(entries=[an_entry("r-1", tried_s=100_000)]))
    assert fresh.tried_s == 7
    assert [entry.tried_s for entry in spool.unsettled(most=1)] == [7]


def test_whoever_reads_does_not_hold_up_a_checkpoint(spool: Spool) -> None:
    spool.write(Changes(entries=[an_entry("r-1")]))
    with closing(sqlite3.connect(spool.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM requests").fetchone()
        spool.write(Changes(entries=[an_entry("r-2")]))
        started_s = time.monotonic()
        assert not spool.checkpoint()
        assert time.monotonic() - started_s < 1
    assert spool.checkpoint()


def test_what_is_open_after_all_is_settled_again_with_what_it_used(spool: Spool) -> None:
    used, nothing = an_entry("r-1"), an_entry("r-2", settlement=None)
    spool.write(Changes(entries=[used, nothing], settled=[used]))
    assert spool.unsettled(most=9) == []
    estimates = [an_entry(entry.request_id, revision=0, settlement=EXPIRE) for entry in (used, nothing)]
    assert spool.write(Changes(entries=estimates)) == []
    found = [entry.settlement for entry in spool.unsettled(most=9)]
    assert found[0] == used.settlement
    assert isinstance(found[1], Settlement)
    assert (found[1].tokens, found[1].micro_usd, found[1].charge_to) == (0, 0, "")
