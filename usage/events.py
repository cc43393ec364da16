"""The audit trail as it is asked for: a page of events, the newest first, and the place where the next one begins.

What was let through is in one table, everything else in another; a place is a moment, a table and a row, so that no
event comes twice and none is left out, whatever is written meanwhile.
"""

from __future__ import annotations

import base64
import binascii
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from heapq import merge
from itertools import islice
from typing import Any, Final, NamedTuple

from gateway.audit import AuditAction
from gateway.errors import Reason, Refused
from usage.archive import Archive, KeptEvent, Outgoing
from usage.delivery import allowed_event, event_json
from usage.record import MICRO

PAGE_DEFAULT: Final = 100
PAGE_MAX: Final = 500
SAME_ID_MAX: Final = 500
"""Requests of one client's id whose events are listed: the newest."""
PARAMETERS: Final = ("since", "until", "organization", "action", "request_id", "limit", "cursor")
_LAST_SEQ: Final = 2**63 - 1
_TABLES: Final = (0, 1)


class Place(NamedTuple):
    """Where an event stands among all: its moment, its table (0: events, 1: requests) and its row."""

    at_us: int
    table: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which events: all that is set holds. ``since_us`` is the first moment, ``until_us`` the first one after."""

    limit: int = PAGE_DEFAULT
    since_us: int | None = None
    until_us: int | None = None
    organization_id: str | None = None
    action: AuditAction | None = None
    request_id: str | None = None
    after: Place | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Events as JSON objects; ``cursor`` leads to the next page, None: there is none."""

    events: tuple[dict[str, Any], ...]
    cursor: str | None


def read_asked(pairs: Sequence[tuple[str, str]]) -> Asked:
    """What the parameters of a query ask for.

    Raises:
        Refused: INVALID_FIELD, for the first that is wrong.
    """
    texts = check_parameters(pairs, PARAMETERS)

    def taken(name: str, reader: Callable[[str], Any], form: str) -> Any:
        try:
            return reader(texts[name]) if name in texts else None
        except (ValueError, OverflowError):
            raise _wrong(name, form) from None

    moment = "Give unix seconds, or an ISO 8601 time such as 2030-01-31T12:00:00Z."
    return Asked(
        since_us=taken("since", moment_us, moment),
        until_us=taken("until", moment_us, moment),
        organization_id=texts.get("organization"),
        action=taken("action", AuditAction, f"It is one of {', '.join(action.value for action in AuditAction)}."),
        request_id=texts.get("request_id"),
        limit=taken("limit", _page_size, f"Give a whole number from 1 to {PAGE_MAX}.") or PAGE_DEFAULT,
        after=taken("cursor", read_cursor, "It is no cursor of this router's."),
    )


def check_parameters(pairs: Sequence[tuple[str, str]], known: Sequence[str]) -> dict[str, str]:
    """The parameters of a query by name.

    Raises:
        Refused: INVALID_FIELD, for the first that is not known or is there twice.
    """
    texts: dict[str, str] = {}
    for name, text in pairs:
        if name not in known:
            there_are = f"there are {', '.join(known)}" if known else "there are none"
            raise _wrong(name, f"There is no parameter of this name; {there_are}.")
        if name in texts:
            raise _wrong(name, "It is given twice.")
        texts[name] = text
    return texts


async def list_events(archive: Archive, asked: Asked) -> Page:
    """One page.

    Raises:
        sqlite3.Error: the spool cannot be read.
    """

    def look(db: sqlite3.Connection) -> list[tuple[Place, dict[str, Any]]]:
        tables = [list(table(db, one)) for one in _by_own_ids(db, asked) for table in (_others, _allowed)]
        return list(islice(merge(*tables, key=lambda item: item[0], reverse=True), asked.limit + 1))

    found = await archive.call(look)
    page = found[: asked.limit]
    return Page(
        events=tuple(event for _, event in page),
        cursor=written_cursor(page[-1][0]) if len(found) > len(page) else None,
    )


def written_cursor(place: Place) -> str:
    """A place as text that is nobody's business."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def read_cursor(text: str) -> Place:
    """What :func:`written_cursor` has written.

    Raises:
        ValueError: it has not.
    """
    try:
        values = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(values, list) or any(type(value) is not int or abs(value) > _LAST_SEQ for value in values):
        raise ValueError("no place")
    try:
        place = Place(*values)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if place.table not in _TABLES:
        raise ValueError("no table")
    return place


def _by_own_ids(db: sqlite3.Connection, asked: Asked) -> list[Asked]:
    """What is asked for, once for each request that the id may mean: a client may have given several the same one."""
    if asked.request_id is None:
        return [asked]
    query = (
        "SELECT request_id FROM requests WHERE client_request_id = :id"
        " AND (:of IS NULL OR organization_id = :of) ORDER BY seq DESC LIMIT :most"
    )
    given = {"id": asked.request_id, "of": asked.organization_id, "most": SAME_ID_MAX}
    ids = {asked.request_id, *(row[0] for row in db.execute(query, given))}
    return [replace(asked, request_id=each) for each in ids]


def _others(db: sqlite3.Connection, asked: Asked) -> Iterator[tuple[Place, dict[str, Any]]]:
    if asked.action is AuditAction.REQUEST_ALLOWED:
        return
    where, values = _where(asked, table=0, at="created_us")
    if asked.action is not None:
        where.append("action = ?")
        values.append(asked.action.value)
        if asked.action is not AuditAction.REQUEST_DENIED:  # then there is an index of few
            where.append("action <> 'REQUEST_DENIED'")
    # Of a request there are few events, of an organisation many: SQLite without statistics takes the wrong ones.
    source = "events" if asked.request_id is None else "events INDEXED BY events_request"
    query = (
        f"SELECT seq, event_id, request_id, organization_id, actor, action, created_us, metadata FROM {source}"  # noqa: S608 - names of ours
        f" WHERE {' AND '.join(where)} ORDER BY created_us DESC, seq DESC LIMIT ?"
    )
    for row in db.execute(query, (*values, asked.limit + 1)):
        fields = ("seq", "event_id", "request_id", "organization_id", "actor", "action", "created_us", "metadata")
        event = KeptEvent(**dict(zip(fields, row, strict=True)))
        yield Place(event.created_us, 0, event.seq), event_json(event)


def _allowed(db: sqlite3.Connection, asked: Asked) -> Iterator[tuple[Place, dict[str, Any]]]:
    if asked.action not in {None, AuditAction.REQUEST_ALLOWED}:
        return
    where, values = _where(asked, table=1, at="started_us")
    query = (
        "SELECT seq, request_id, organization_id, kind, started_us, record FROM requests"  # noqa: S608 - names of ours
        f" WHERE kind = 'forwarded' AND record IS NOT NULL AND {' AND '.join(where)}"
        " ORDER BY started_us DESC, seq DESC LIMIT ?"
    )
    for row in db.execute(query, (*values, asked.limit + 1)):
        request = Outgoing(*row)
        yield Place(request.started_us, 1, request.seq), allowed_event(request, json.loads(request.record or ""))


def _where(asked: Asked, *, table: int, at: str) -> tuple[list[str], list[int | str]]:
    """Conditions and their values, for the table whose moments are in column ``at``."""
    after = asked.after or Place(_LAST_SEQ, 0, 0)
    # Of the events of the same moment the other table's come all before or all after.
    seq = after.seq if table == after.table else (_LAST_SEQ if table < after.table else -1)
    where, values = [f"{at} <= ? AND ({at}, seq) < (?, ?)"], [after.at_us, after.at_us, seq]
    filters: tuple[tuple[str, int | str | None], ...] = (
        (f"{at} >= ?", asked.since_us),
        (f"{at} < ?", asked.until_us),
        ("organization_id = ?", asked.organization_id),
        ("request_id = ? AND request_id <> ''", asked.request_id),
    )
    held = [(condition, value) for condition, value in filters if value is not None]
    return where + [condition for condition, _ in held], [*values, *(value for _, value in held)]


def moment_us(text: str) -> int:
    """Unix microseconds of unix seconds, or of an ISO 8601 time, which is UTC unless it says otherwise.

    Raises:
        ValueError: it is neither.
    """
    try:
        at_s = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * MICRO)
    if not 0 <= at_s < 10**11:
        raise ValueError("no moment that is kept")
    return round(at_s * MICRO)


def _page_size(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= PAGE_MAX:
        raise ValueError("no page has so many")
    return int(text)


def _wrong(name: str, text: str) -> Refused:
    return Refused(Reason.INVALID_FIELD, f"{name[:64]}: {text}", param=name[:64])
