"""Pages of the audit trail: every event once, whatever is written meanwhile; what is asked for, and nothing else."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.audit import AuditAction
from gateway.errors import Reason, Refused
from tests.contract.document import document
from tests.unit.usage.usage_builders import START_S, a_finished, a_spool, an_entry, an_event
from usage.archive import Archive
from usage.entries import entry_of
from usage.events import Asked, Place, list_events, read_asked, read_cursor, written_cursor
from usage.spool import Changes, Spool

US = START_S * 1_000_000


@contextmanager
def a_trail() -> Iterator[tuple[Spool, Archive]]:
    with tempfile.TemporaryDirectory() as directory:
        spool = a_spool(Path(directory))
        archive = Archive(spool.path)
        try:
            yield spool, archive
        finally:
            archive.close()
            spool.close()


@pytest.fixture
async def trail() -> AsyncIterator[tuple[Spool, Archive]]:
    with a_trail() as opened:
        yield opened


def allowed(number: int, at_us: int, **changes: Any) -> Changes:
    entry = entry_of(a_finished(request_id=f"r-{number}", started_us=at_us, **changes))
    assert entry is not None
    return Changes(entries=[entry])


def other(number: int, at_us: int, **changes: Any) -> Changes:
    return Changes(events=[an_event(f"e-{number}", created_at=at_us / 1_000_000, **changes)])


async def pages(archive: Archive, asked: Asked) -> list[str]:
    """Ids of all events, page by page."""
    found = []
    while True:
        page = await list_events(archive, asked)
        found += [event["event_id"] for event in page.events]
        if page.cursor is None:
            return found
        asked = Asked(limit=asked.limit, organization_id=asked.organization_id, after=read_cursor(page.cursor))


async def plans(archive: Archive, asked: Asked) -> str:
    """How SQLite finds what is asked for."""
    traced: list[str] = []

    def watch(db: Any) -> None:
        db.set_trace_callback(traced.append)

    await archive.call(watch)
    await list_events(archive, asked)
    queries = [query for query in traced if query.startswith("SELECT")]
    told = await archive.call(lambda db: [db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall() for query in queries])
    return json.dumps(told)


WRITTEN = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=12)
"""Which table, and the moment: few, so that many events share one."""


@settings(max_examples=60, deadline=None)
@given(before=WRITTEN, between=st.lists(WRITTEN, max_size=6), limit=st.integers(1, 4))
async def test_every_event_comes_once_and_in_order_while_others_are_written(
    before: list[tuple[bool, int]], between: list[list[tuple[bool, int]]], limit: int
) -> None:
    with a_trail() as (spool, archive):
        written = []

        def write(some: list[tuple[bool, int]]) -> None:
            for is_request, moment in some:
                number, at_us = len(written), US + moment
                spool.write((allowed if is_request else other)(number, at_us))
                written.append((at_us, f"r-{number}:allowed" if is_request else f"e-{number}"))

        write(before)
        there, waiting = {event_id for _, event_id in written}, iter(between)
        found, asked = [], Asked(limit=limit)
        while True:
            page = await list_events(archive, asked)
            assert len(page.events) <= limit
            found += [event["event_id"] for event in page.events]
            if page.cursor is None:
                break
            write(next(waiting, []))
            asked = Asked(limit=limit, after=read_cursor(page.cursor))
        assert len(found) == len(set(found))
        assert there <= set(found)
        at_us = {event_id: at for at, event_id in written}
        assert [at_us[event_id] for event_id in found] == sorted((at_us[e] for e in found), reverse=True)


async def test_events_are_as_the_contract_has_them(trail: tuple[Spool, Archive]) -> None:
    spool, archive = trail
    spool.write(allowed(1, US))
    spool.write(other(2, US + 1))
    page = await list_events(archive, Asked())
    validator = document().validator("/components/schemas/AuditPage")
    validator.validate({"events": list(page.events), "next_cursor": page.cursor})
    assert [event["action"] for event in page.events] == ["KEY_CREATED", "REQUEST_ALLOWED"]
    assert page.cursor is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"organization_id": "globex"}, ["e-3", "r-1:allowed"]),
        ({"action": AuditAction.REQUEST_ALLOWED}, ["r-1:allowed", "r-0:allowed"]),
        ({"action": AuditAction.REQUEST_DENIED}, ["e-2"]),
        ({"action": AuditAction.KEY_CREATED}, ["e-3"]),
        ({"request_id": "r-0"}, ["e-2", "r-0:allowed"]),
        ({"request_id": "c-0"}, ["e-2", "r-1:allowed", "r-0:allowed"]),
        ({"request_id": "c-0", "organization_id": "acme"}, ["e-2", "r-0:allowed"]),
        ({"request_id": ""}, []),
        ({"since_us": US + 2}, ["e-3", "e-2"]),
        ({"until_us": US + 2}, ["r-1:allowed", "r-0:allowed"]),
        ({"since_us": US + 1, "until_us": US + 3, "organization_id": "acme"}, ["e-2"]),
        ({"limit": 1}, ["e-3"]),
    ],
    ids=str,
)
async def test_what_is_asked_for_all_holds(
    trail: tuple[Spool, Archive], asked: dict[str, Any], expected: list[str]
) -> None:
    spool, archive = trail
    spool.write(allowed(0, US, client_request_id="c-0"))
    spool.write(allowed(1, US + 1, client_request_id="c-0", organization_id="globex"))
    spool.write(other(2, US + 2, request_id="r-0", action=AuditAction.REQUEST_DENIED))
    spool.write(other(3, US + 3, organization_id="globex"))
    page = await list_events(archive, Asked(**asked))
    assert [event["event_id"] for event in page.events] == expected


async def test_only_what_was_forwarded_was_allowed(trail: tuple[Spool, Archive]) -> None:
    spool, archive = trail
    spool.write(Changes(entries=[an_entry("r-1", kind="refused", record=None), an_entry("r-2", kind="limited")]))
    assert (await list_events(archive, Asked())).events == ()


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        (Asked(organization_id="acme"), "requests_allowed"),
        (Asked(organization_id="acme"), "events_organization"),
        (Asked(action=AuditAction.POLICY_UPDATE), "events_rare"),
        (Asked(), "requests_started"),
        (Asked(), "events_created"),
    ],
    ids=str,
)
async def test_no_listing_looks_through_everything(trail: tuple[Spool, Archive], asked: Asked, index: str) -> None:
    told = await plans(trail[1], asked)
    assert index in told
    assert "TEMP B-TREE" not in told


async def test_of_one_request_nothing_else_is_looked_through(trail: tuple[Spool, Archive]) -> None:
    told = await plans(trail[1], Asked(request_id="r-1", organization_id="acme"))
    assert {"requests_client", "events_request"} <= set(re.findall(r"INDEX (\w+)", told))
    assert "created_us<" not in told


# --- What is asked for, as text.


def test_parameters_are_read() -> None:
    asked = read_asked(
        [
            ("since", "1800000000.5"),
            ("until", "2030-01-31T12:00:00+01:00"),
            ("organization", "acme"),
            ("action", "LIMIT_RESET"),
            ("limit", "500"),
            ("cursor", written_cursor(Place(1, 0, 7))),
        ]
    )
    assert asked == Asked(
        since_us=1_800_000_000_500_000,
        until_us=1_896_087_600_000_000,
        organization_id="acme",
        action=AuditAction.LIMIT_RESET,
        limit=500,
        after=Place(1, 0, 7),
    )


def test_time_without_a_zone_is_utc() -> None:
    assert read_asked([("since", "1970-01-01T00:00:01")]).since_us == 1_000_000


@given(st.builds(Place, st.integers(0, 2**62), st.integers(0, 1), st.integers(0, 2**62)))
def test_cursor_is_read_as_it_was_written(place: Place) -> None:
    assert read_cursor(written_cursor(place)) == place


@given(st.text(max_size=40))
def test_no_text_but_a_cursor_is_taken_for_one(text: str) -> None:
    try:
        place = read_cursor(text)
    except ValueError:
        return
    assert isinstance(place, Place)
    assert all(type(value) is int for value in place)


@pytest.mark.parametrize(
    ("pairs", "name"),
    [
        ([("limit", "1"), ("limit", "1")], "limit"),
        ([("limit", "٣")], "limit"),
        ([("limit", "1e2")], "limit"),
        ([("since", "nan")], "since"),
        ([("since", "1e99")], "since"),
        ([("until", "0000-01-01")], "until"),
        ([("action", "request_denied")], "action"),
        ([("cursor", "bnVsbA")], "cursor"),
        ([("cursor", "WzEsMiwzLDRd")], "cursor"),
        ([("cursor", "WzEsMiwzXQ")], "cursor"),
        ([("cursor", "WzEsLTEsM10")], "cursor"),
        ([("page", "2")], "page"),
    ],
    ids=str,
)
def test_first_parameter_that_is_wrong_is_named(pairs: list[tuple[str, str]], name: str) -> None:
    with pytest.raises(Refused) as refused:
        read_asked(pairs)
    assert (refused.value.reason, refused.value.param) == (Reason.INVALID_FIELD, name)
