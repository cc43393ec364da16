"""Audit events out of the store, the newest first. What the stream is: :mod:`limits.audit_stream`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NoReturn

from gateway.audit import AuditAction, AuditEvent
from limits.audit_stream import STREAM, answer
from limits.connection import Connection
from limits.resp import pack

PAGE_EVENTS: Final = 500
SKEW_S: Final = 3600.0
"""How far the store's clock may be behind the one that an event was dated with."""
CREATED_MAX_S: Final = 253_402_300_800.0
"""The year 10000, which no date can name."""
LEVELS_MAX: Final = 32
"""Of metadata: what is deeper not everybody can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Events, the newest first, and how many entries of the stream could not be read as one."""

    events: tuple[AuditEvent, ...]
    unreadable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Entries of the stream in the order of their writing. ``last`` is the id of the last, '' where there is none."""

    events: tuple[AuditEvent, ...]
    unreadable: int
    count: int
    last: str


async def read_after(connection: Connection, after: str, *, most: int) -> Page:
    """What has been written after the entry with that id.

    Raises:
        StoreUnavailable: there is no answer in time.
    """
    start = f"({after}".encode()
    entries = await answer(connection, pack(b"XRANGE", STREAM, start, b"+", b"COUNT", b"%d" % most))
    events = [event for _, fields in entries if (event := _event_of(fields)) is not None]
    return Page(
        events=tuple(events),
        unreadable=len(entries) - len(events),
        count=len(entries),
        last=entries[-1][0].decode() if entries else "",
    )


async def read_events(
    connection: Connection,
    *,
    limit: int,
    organization_id: str | None = None,
    request_id: str | None = None,
    action: AuditAction | None = None,
    since_s: float | None = None,
    until_s: float | None = None,
) -> Found:
    """The newest events of which every filter holds, each once.

    ``since_s`` is the first moment and ``until_s`` the first one after, in unix seconds.

    Newest is by the time of writing: what waited for the store is where it was written. Read a page at a time, so
    neither side holds the whole stream.

    Raises:
        StoreUnavailable: there is no answer in time.
    """
    # An entry's id is the time of its writing, which comes after the event's: older entries need not be looked at.
    start = b"-" if since_s is None else b"%d" % max(0, (since_s - SKEW_S) * 1000)
    end, unreadable = b"+", 0
    found: dict[str, AuditEvent] = {}
    while len(found) < limit:
        page = await answer(connection, pack(b"XREVRANGE", STREAM, end, start, b"COUNT", b"%d" % PAGE_EVENTS))
        for _, fields in page:
            event = _event_of(fields)
            if event is None:
                unreadable += 1
            elif (
                organization_id in {None, event.organization_id}
                and request_id in {None, event.request_id}
                and action in {None, event.action}
                and (since_s is None or event.created_at >= since_s)
                and (until_s is None or event.created_at < until_s)
            ):
                found[event.event_id] = event
        if len(page) < PAGE_EVENTS:
            break
        end = b"(" + page[-1][0]
    return Found(events=tuple(islice(found.values(), limit)), unreadable=unreadable)


def _event_of(fields: list[bytes]) -> AuditEvent | None:
    """Event of an entry; None where somebody else wrote it, or a later version, or nobody could keep it."""
    try:
        texts = {fields[at].decode(): fields[at + 1].decode() for at in range(0, len(fields), 2)}
        created_at, metadata = float(texts["created_at"]), json.loads(texts["metadata"], parse_constant=_not_json)
        # What is no number is not within bounds either.
        if not (0 <= created_at < CREATED_MAX_S and isinstance(metadata, dict) and _is_flat(metadata, LEVELS_MAX)):
            return None
        return AuditEvent(
            event_id=texts["event_id"],
            request_id=texts["request_id"],
            organization_id=texts["organization_id"],
            actor=texts["actor"],
            action=AuditAction(texts["action"]),
            metadata=metadata,
            created_at=created_at,
        )
    except (KeyError, ValueError, IndexError, RecursionError):
        return None


def _not_json(constant: str) -> NoReturn:
    raise ValueError(constant)


def _is_flat(value: Any, levels: int) -> bool:
    """Whether a value has no more levels than these."""
    if not isinstance(value, dict | list):
        return True
    return levels > 0 and all(
        _is_flat(each, levels - 1) for each in (value.values() if isinstance(value, dict) else value)
    )
