"""What the ledger has written down: every request, what became of it, and how far it was handed on. SQLite, WAL mode.

Nothing else sees a request before it is here: a write returns when it is on the disk. One writer, so all writes go
through one thread; whoever only reads has a connection of their own. ADR 0010 says why SQLite and what it costs.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from gateway.audit import AuditEvent
from limits.model import Settlement
from policies.model import OrganizationId
from usage.finished import FailedAttempt
from usage.json_text import json_text
from usage.record import MICRO, Kind
from usage.schema import SCHEMA

_INSERT: Final = """INSERT OR IGNORE INTO requests (request_id, revision, client_request_id, organization_id, kind,
started_us, record, told, settlement, tried_s, settled) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
JOURNAL_MARK: Final = "journal"
"""Mark of how far the journal has been read."""
ENDED_MARK: Final = "ended_before"
"""Start of an Envoy, the moment from which its requests are in the table, both in unix microseconds, and how many are
known that are not in it any more."""
AUDIT_MARK: Final = "audit_stream"
"""Mark of how far the audit trail has been read."""
RECORDS_MARK: Final = "records_delivered"
ALLOWED_MARK: Final = "allowed_delivered"
EVENTS_MARK: Final = "events_delivered"
"""Marks of how far the streams have been handed on; the first two are places of requests, the last of events."""
RECORDS_COUNT: Final = "records_written"
ESTIMATES_COUNT: Final = "estimates_written"
"""Marks of how many records have ever been written, and how many of them to stand for requests that nobody had told the
end of. Each of these may be followed by one that tells."""
RECOVERING_MARK: Final = "recovering"
"""1 from when the spool was found to have lost something until the journal has been read to its end."""
POLICY_MARK: Final = "policy"
"""Digest of the policy in force."""
_REFUSE: Final = f"""INSERT OR REPLACE INTO refused SELECT :stream, :place, :reason
WHERE EXISTS (SELECT 1 FROM requests WHERE seq = :place AND :stream <> '{EVENTS_MARK}')
OR EXISTS (SELECT 1 FROM events WHERE seq = :place AND :stream = '{EVENTS_MARK}')"""  # noqa: S608 - names of ours
"""What has been replaced meanwhile is not refused any more."""
_PRUNE_REQUESTS: Final = """DELETE FROM requests WHERE seq IN (
SELECT seq FROM requests INDEXED BY requests_started WHERE started_us < ? AND +seq <= ? AND settled = 1
AND seq NOT IN (SELECT place FROM refused WHERE stream IN (?, ?)) LIMIT ?)"""
_PRUNE_EVENTS: Final = """DELETE FROM events WHERE seq IN (
SELECT seq FROM events INDEXED BY events_created WHERE created_us < ? AND +seq <= ?
AND seq NOT IN (SELECT place FROM refused WHERE stream = ?) LIMIT ?)"""
"""By time: what is young is most of it, and not looked at."""
_PRUNE_POLICIES: Final = """DELETE FROM policies WHERE digest <> :now AND digest NOT IN (
SELECT json_extract(metadata, '$.policy_version') FROM events
WHERE action = 'POLICY_UPDATE' AND action <> 'REQUEST_DENIED' AND json_valid(metadata)
UNION SELECT json_extract(metadata, '$.policy_before') FROM events
WHERE action = 'POLICY_UPDATE' AND action <> 'REQUEST_DENIED' AND json_valid(metadata))"""
"""Of a policy the event of its end is kept as long as any request that began under it."""
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
PRUNED_AT_ONCE: Final = 2000
BUSY_MS: Final = 5000
MOMENT_US: Final = 10_000
_NOTHING_USED: Final = json.dumps((0, 0, 0, ""))
"""The settlement of a request that left nothing open, as far as it was known."""
EXPIRE: Final = "expire"
"""In the place of a settlement: close the open entry with what was reserved."""


def is_damage(error: sqlite3.Error) -> bool:
    """Whether it is not the disk that fails but the file that is not what was written. SQLite docs: "Result Codes"."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _DAMAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request as it is written down. ``record`` is None where nothing is billed, ``settlement`` where none is open.

    Of two entries of one request the one with the higher ``revision`` stands. ``tried_s``: the limit store may know of
    the settlement since then. ``ended_us`` is None where nobody has told of the end.
    """

    request_id: str
    revision: int
    client_request_id: str
    organization_id: OrganizationId
    kind: Kind
    started_us: int
    record: str | None
    told: str
    settlement: Settlement | Literal["expire"] | None
    tried_s: int | None = None
    ended_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Something that a stream could not hand on: ``stream`` by its mark, and the place in it."""

    stream: str
    place: int
    reason: str


@dataclass(slots=True)
class Changes:
    """What is written together, or not at all."""

    entries: list[Entry] = field(default_factory=list)
    attempts: list[FailedAttempt] = field(default_factory=list)
    events: list[AuditEvent] = field(default_factory=list)
    settled: list[Entry] = field(default_factory=list)
    tried: list[tuple[int, Entry]] = field(default_factory=list)
    """Unix seconds, and what the limit store may know of since then."""
    anonymous: list[int] = field(default_factory=list)
    """When requests ended of which nothing is kept, as nobody was known."""
    marks: dict[str, int | str] = field(default_factory=dict)
    policies: list[tuple[str, str]] = field(default_factory=list)
    """Digests, and what they stand for."""
    offered_again: list[tuple[str, int]] = field(default_factory=list)
    """Streams and places, of which nothing is refused any more but what ``refused`` says."""
    refused: list[Refusal] = field(default_factory=list)

    @property
    def size(self) -> int:
        """What takes room: requests and attempts. The rest is small, or its source waits for each."""
        return len(self.entries) + len(self.attempts)

    def add(self, other: Changes) -> None:
        """Write another's together with these."""
        self.entries += other.entries
        self.attempts += other.attempts
        self.events += other.events
        self.settled += other.settled
        self.tried += other.tried
        self.anonymous += other.anonymous
        self.marks |= other.marks
        self.policies += other.policies
        self.offered_again += other.offered_again
        self.refused += other.refused


class Spool:
    """The database file. Every method blocks, and raises sqlite3.Error when the disk does not do what it should."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
        self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk, not only with the kernel
        self._db.execute("PRAGMA wal_autocheckpoint = 4000")
        self._db.executescript(SCHEMA)
        self._stat = path.stat()

    def close(self) -> None:
        """Fold the log into the file."""
        self._db.close()

    def write(self, changes: Changes) -> list[Entry]:
        """Write everything, or nothing; which entries were not there before."""
        with self._together():
            fresh = [put for entry in changes.entries if (put := self._put(entry)) is not None]
            self._put_others(changes)
            self._count(fresh, changes.anonymous)
        return fresh

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Everything or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _put(self, entry: Entry) -> Entry | None:
        """The entry as it is written; None where one is there already that stands."""
        if self._db.execute(_INSERT, _row(entry)).rowcount:
            return entry
        if not entry.revision:  # it is overdue in the limit store, whatever was settled there: that has been lost
            self._db.execute(
                "UPDATE requests SET settled = 0, settlement = coalesce(settlement, ?)"
                " WHERE request_id = ? AND settled = 1",
                (_NOTHING_USED, entry.request_id),
            )
            return None
        old = self._db.execute(
            "SELECT seq, tried_s FROM requests WHERE request_id = ? AND revision < ?",
            (entry.request_id, entry.revision),
        ).fetchone()
        if old is None:
            return None
        place, tried_s = old
        if tried_s is not None:
            # Once the store has forgotten that it was charged what was reserved, it is not to be charged again.
            entry = replace(entry, tried_s=tried_s)
        self._db.execute(
            "DELETE FROM refused WHERE stream IN (?, ?) AND place = ?", (RECORDS_MARK, ALLOWED_MARK, place)
        )
        self._db.execute("DELETE FROM requests WHERE seq = ?", (place,))
        self._db.execute(_INSERT, _row(entry))
        return entry

    def _put_others(self, changes: Changes) -> None:
        self._db.executemany(
            "INSERT OR IGNORE INTO attempts VALUES (?, ?, ?, ?, ?, ?)",
            (
                (a.request_id, a.started_us, a.backend, a.status, ",".join(a.flags), a.duration_ms)
                for a in changes.attempts
            ),
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO events (event_id, request_id, organization_id, actor, action, created_us, metadata)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            map(_event_row, changes.events),
        )
        # Of that revision: another may have taken its place, and that is to be settled too.
        self._db.executemany(
            "UPDATE requests SET tried_s = ? WHERE request_id = ? AND revision = ?",
            ((tried_s, entry.request_id, entry.revision) for tried_s, entry in changes.tried),
        )
        self._db.executemany(
            "UPDATE requests SET settled = 1 WHERE request_id = ? AND revision = ?",
            ((entry.request_id, entry.revision) for entry in changes.settled),
        )
        self._db.executemany(
            "INSERT INTO marks VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            changes.marks.items(),
        )
        self._db.executemany("INSERT OR IGNORE INTO policies VALUES (?, ?)", changes.policies)
        self._db.executemany("DELETE FROM refused WHERE stream = ? AND place = ?", changes.offered_again)
        self._db.executemany(
            _REFUSE, ({"stream": r.stream, "place": r.place, "reason": r.reason} for r in changes.refused)
        )

    def _count(self, fresh: Sequence[Entry], anonymous: Sequence[int]) -> None:
        """Every request that has ended is counted once: by its kind, and by the hundredth of a second of its end."""
        told = [entry for entry in fresh if entry.ended_us is not None]
        kinds = Counter(entry.kind for entry in told) + Counter({"anonymous": len(anonymous)})
        self._add_up("tallies (kind, requests)", kinds.items())
        moments = [entry.ended_us for entry in told if entry.ended_us is not None]
        self._add_up("ended (moment, requests)", Counter(at // MOMENT_US for at in (*moments, *anonymous)).items())
        records = [entry for entry in fresh if entry.record is not None]
        estimates = sum(not entry.revision for entry in records)
        self._add_up("marks (name, value)", ((RECORDS_COUNT, len(records)), (ESTIMATES_COUNT, estimates)))

    def _add_up(self, table: str, counts: Iterable[tuple[Any, int]]) -> None:
        key, count = table[table.index("(") + 1 : -1].split(", ")
        self._db.executemany(
            f"INSERT INTO {table} VALUES (?, ?)"  # noqa: S608 - names of ours
            f" ON CONFLICT ({key}) DO UPDATE SET {count} = {count} + excluded.{count}",
            ((name, more) for name, more in counts if more),
        )

    def fold_ended(self, started_us: int, *, before_us: int) -> None:
        """Add up what ended before a moment, of the Envoy that runs since ``started_us``, and remove it."""
        with self._together():
            since_us, known = known_before(self.mark(ENDED_MARK, None), started_us)
            [(more,)] = self._db.execute(
                "SELECT coalesce(sum(requests), 0) FROM ended WHERE moment >= ? AND moment < ?",
                (since_us // MOMENT_US, before_us // MOMENT_US),
            )
            self._db.execute("DELETE FROM ended WHERE moment < ?", (before_us // MOMENT_US,))
            self._mark_ended(started_us, since_us, known + more)

    def begin_ended(self, started_us: int, *, until_us: int, known: int) -> None:
        """Take it that of that Envoy so many requests are known that had ended by then; only later ones are counted."""
        with self._together():
            self._db.execute("DELETE FROM ended WHERE moment <= ?", (until_us // MOMENT_US,))
            self._mark_ended(started_us, min(started_us, until_us), known)

    def forget_ended(self) -> None:
        """Count anew: moments do not mean any more what they meant."""
        with self._together():
            self._db.execute("DELETE FROM ended")
            self._db.execute("DELETE FROM marks WHERE name = ?", (ENDED_MARK,))

    def prune_ended(self, *, before_us: int) -> None:
        """Nobody asks for it, as Envoy does not say what it has counted."""
        with self._together():
            if self._db.execute("DELETE FROM ended WHERE moment < ?", (before_us // MOMENT_US,)).rowcount:
                self._db.execute("DELETE FROM marks WHERE name = ?", (ENDED_MARK,))

    def _mark_ended(self, started_us: int, since_us: int, known: int) -> None:
        value = json.dumps((started_us, since_us, known))
        self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (ENDED_MARK, value))

    @property
    def size_bytes(self) -> int:
        """What a copy of it takes."""
        [(pages,)], [(page_bytes,)] = (self._db.execute(f"PRAGMA {name}") for name in ("page_count", "page_size"))
        return int(pages * page_bytes)

    def is_gone(self) -> bool:
        """Whether another file is in its place, or none: what is written to this one is lost once it is closed."""
        try:
            return not os.path.samestat(self.path.stat(), self._stat)
        except FileNotFoundError:
            return True
        except OSError:  # then nobody can tell
            return False

    def copy_to(self, path: Path) -> None:
        """Write everything that is in it to another file."""
        with closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)

    def mark(self, name: str, default: Any) -> Any:
        """A mark as it was last written."""
        row = self._db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return default if row is None else row[0]

    def unsettled(self, *, most: int) -> list[Entry]:
        """The oldest entries that the limit store has not taken, without what only matters to others."""
        found = self._db.execute(
            "SELECT request_id, revision, organization_id, settlement, tried_s FROM requests"
            " WHERE settled = 0 ORDER BY seq LIMIT ?",
            (most,),
        )
        return list(map(_entry_of, found))

    def frames(self) -> int:
        """How many frames of the log count. SQLite docs: "PRAGMA wal_checkpoint"."""
        return int(self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1])

    def is_sound(self) -> bool:
        """Whether the file holds together; takes seconds where it is large."""
        return bool(self._db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")

    def checkpoint(self) -> bool:
        """Fold the whole log into the file, so that nothing hangs on the log; False: somebody still reads it."""
        self._db.execute("PRAGMA busy_timeout = 0")  # whoever writes waits for nobody who reads
        try:
            return not self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")

    def prune(self, *, before_us: int) -> int:
        """Remove some of what is older, was handed on and is settled; how much. What was refused stays."""
        delivered = min(int(self.mark(mark, 0)) for mark in (RECORDS_MARK, ALLOWED_MARK))
        told = int(self.mark(EVENTS_MARK, 0))
        removed = self._db.execute(
            _PRUNE_REQUESTS, (before_us, delivered, RECORDS_MARK, ALLOWED_MARK, PRUNED_AT_ONCE)
        ).rowcount
        removed += self._db.execute(_PRUNE_EVENTS, (before_us, told, EVENTS_MARK, PRUNED_AT_ONCE)).rowcount
        removed += self._db.execute(
            "DELETE FROM attempts WHERE started_us IN (SELECT started_us FROM attempts WHERE started_us < ? LIMIT ?)",
            (before_us, PRUNED_AT_ONCE),
        ).rowcount
        if removed:
            self._db.execute("PRAGMA incremental_vacuum(200)").fetchall()
        else:
            removed += self._db.execute(_PRUNE_POLICIES, {"now": self.mark(POLICY_MARK, "")}).rowcount
        return removed


def known_before(written: str | None, envoy_started_us: int) -> tuple[int, int]:
    """From when on requests of an Envoy are in the table, and how many are known besides; of ENDED_MARK's value."""
    if written is not None:
        of_us, since_us, known = json.loads(written)
        if of_us == envoy_started_us:
            return since_us, known
    return envoy_started_us, 0


def _row(entry: Entry) -> tuple[Any, ...]:
    settlement = entry.settlement
    return (
        entry.request_id,
        entry.revision,
        entry.client_request_id or None,
        entry.organization_id,
        entry.kind,
        entry.started_us,
        entry.record,
        entry.told,
        _written(settlement),
        entry.tried_s,
        int(settlement is None),
    )


def _written(settlement: Settlement | Literal["expire"] | None) -> str | None:
    if settlement is None or settlement == EXPIRE:
        return settlement
    return json.dumps((settlement.tokens, settlement.micro_usd, settlement.admitted_s, settlement.charge_to))


def _entry_of(row: Sequence[Any]) -> Entry:
    request_id, revision, organization_id, written, tried_s = row
    settlement: Settlement | Literal["expire"] = EXPIRE
    if written != EXPIRE:
        tokens, micro_usd, admitted_s, charge_to = json.loads(written)
        settlement = Settlement(
            request_id=request_id,
            organization_id=OrganizationId(organization_id),
            tokens=tokens,
            micro_usd=micro_usd,
            admitted_s=admitted_s,
            charge_to=charge_to,
        )
    return Entry(
        request_id=request_id,
        revision=revision,
        client_request_id="",
        organization_id=OrganizationId(organization_id),
        kind="forwarded",
        started_us=0,
        record=None,
        told="",
        settlement=settlement,
        tried_s=tried_s,
    )


def _event_row(event: AuditEvent) -> tuple[Any, ...]:
    return (
        event.event_id,
        event.request_id,
        event.organization_id,
        event.actor,
        event.action.value,
        round(event.created_at * MICRO),
        json_text(dict(event.metadata)),
    )
