"""Three counts of requests beside each other, and in words why they differ. What is counted: :mod:`usage.reconcile`."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from gateway.errors import StoreUnavailable
from limits.standing import read_standing
from limits.valkey import ValkeyLimits
from usage.archive import Archive
from usage.delivery import count_mark
from usage.reconcile import LAG_S, EnvoyCount
from usage.record import BILLED
from usage.spool import ESTIMATES_COUNT, RECORDS_COUNT, RECORDS_MARK

ORGANIZATIONS_AT_ONCE: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Everything that is counted. None: whoever knows does not answer, or there is nobody who knows.

    ``completed`` and ``known`` are of the Envoy that runs, ``unaccounted`` of those the ones that should have been told
    of by now; ``kinds`` and the records are of all time. ``open`` entries are the limit store's,
    ``unsettled`` requests are written down and not settled, ``malformed`` messages came since the ledger's start.
    """

    completed: int | None
    running: int | None
    known: int | None
    unaccounted: int | None
    kinds: dict[str, int]
    records: int
    estimates: int
    delivered: int
    refused: int
    waiting: int
    oldest_waiting_s: float
    unsettled: int
    open: int | None
    malformed: int

    def as_json(self) -> dict[str, Any]:
        """The figures, and the reasons why they differ."""
        return {**asdict(self), "differences": list(differences(self))}


def differences(counts: Counts) -> Iterator[dict[str, Any]]:
    """A difference and its reason each: ``requests`` how many, ``reason`` a word for programs, ``text`` for people."""
    late, lost = 0, counts.unaccounted or 0
    if counts.completed is None or counts.known is None:
        yield {"reason": "ENVOY_UNKNOWN", "requests": 0, "text": "Envoy's admin interface does not answer."}
    else:
        late = counts.completed - counts.known - lost
    without = sum(counts.kinds.get(kind, 0) for kind in BILLED) - counts.records + counts.estimates
    left = counts.records - counts.delivered - counts.refused - counts.waiting
    for reason, requests, text in (
        ("NOT_TOLD_YET", late, f"completed, and not told of yet: Envoy may take up to {LAG_S:.0f} s"),
        ("UNACCOUNTED", lost, "completed, and nobody has told of them: they are lost"),
        ("WITHOUT_RECORD", without, "were told of, and no record could be made of them: the log says why"),
        ("ESTIMATES", counts.estimates, "records stand for requests that were closed because they were overdue"),
        ("REFUSED", counts.refused, "records could not be handed on: the log says why; they are offered at each start"),
        ("WAITING", counts.waiting, f"records wait to be delivered, the oldest for {counts.oldest_waiting_s:.0f} s"),
        ("REPLACED", left, "records were written and not delivered: estimates that were replaced before"),
        ("DELIVERED_TWICE", -left, "more records were delivered than written: the spool was damaged"),
        ("UNSETTLED", counts.unsettled, "are written down, and the limit store has not taken them yet"),
        ("OPEN", counts.open or 0, "are open in the limit store: they run, or their end is still to be told"),
        ("MALFORMED", counts.malformed, "messages of Envoy's could not be used since the ledger's start"),
    ):
        if requests > 0:
            yield {"reason": reason, "requests": requests, "text": text}


class Comparing(Protocol):
    """The part of :class:`usage.reconcile.Reconciliation` that compares."""

    unaccounted: int | None

    async def compare(self) -> tuple[EnvoyCount, int] | None:
        """Envoy's count and the ledger's of the same Envoy; None where Envoy does not answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounts:
    """Who knows the counts; ``oldest_s`` is the age of the oldest record that waits, ``store`` None where none is."""

    archive: Archive
    reconciliation: Comparing
    oldest_s: Callable[[], float]
    malformed: Callable[[], float]
    count_open: Callable[[], Awaitable[int | None]]

    async def look(self) -> Counts:
        """The counts as they are now.

        Raises:
            sqlite3.Error: the spool cannot be read.
        """
        compared = await self.reconciliation.compare()
        kinds = await self.archive.tallies()
        marks = await self.archive.call(_marks)
        at = int(marks.get(RECORDS_MARK, 0))
        waiting, unsettled = await self.archive.call(lambda db: _left(db, after=at))
        return Counts(
            completed=None if compared is None else compared[0].ended,
            running=None if compared is None else compared[0].running,
            known=None if compared is None else compared[1],
            unaccounted=None if compared is None else self.reconciliation.unaccounted,
            kinds=kinds,
            records=int(marks.get(RECORDS_COUNT, 0)),
            estimates=int(marks.get(ESTIMATES_COUNT, 0)),
            delivered=int(marks.get(count_mark(RECORDS_MARK), 0)),
            refused=await self.archive.refused(RECORDS_MARK),
            waiting=waiting,
            oldest_waiting_s=round(self.oldest_s(), 3) if waiting else 0.0,
            unsettled=unsettled,
            open=await self.count_open(),
            malformed=int(self.malformed()),
        )


def _marks(db: sqlite3.Connection) -> dict[str, Any]:
    return dict(db.execute("SELECT name, value FROM marks"))


def _left(db: sqlite3.Connection, *, after: int) -> tuple[int, int]:
    [(waiting,)] = db.execute("SELECT count(*) FROM requests WHERE seq > ? AND record IS NOT NULL", (after,))
    [(unsettled,)] = db.execute("SELECT count(*) FROM requests WHERE settled = 0")
    return waiting, unsettled


async def open_entries(store: ValkeyLimits) -> int | None:
    """How many requests are open in the limit store; None while it does not answer."""
    found = 0
    try:
        organizations = await store.organizations()
        for start in range(0, len(organizations), ORGANIZATIONS_AT_ONCE):
            some = organizations[start : start + ORGANIZATIONS_AT_ONCE]
            standings = await asyncio.gather(*(read_standing(store, organization) for organization in some))
            found += sum(standing.open_requests for standing in standings)
    except StoreUnavailable:
        return None
    return found
