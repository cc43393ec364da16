"""Reads the spool, beside whoever writes it: what is to be handed on, and what is asked for."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from usage.json_text import from_json
from usage.spool import ENDED_MARK, MOMENT_US, is_damage, known_before

T = TypeVar("T")

_REQUEST: Final = (
    "seq, request_id, revision, client_request_id, organization_id, kind, started_us, record, told, settlement, settled"
)
_EVENT: Final = "seq, event_id, request_id, organization_id, actor, action, created_us, metadata"


class Outgoing(NamedTuple):
    """What is needed of a request to hand it on; ``record`` is None where nothing is billed."""

    seq: int
    request_id: str
    organization_id: str
    kind: str
    started_us: int
    record: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRequest:
    """A request as it was written down; ``record`` is None where nothing is billed."""

    seq: int
    request_id: str
    revision: int
    client_request_id: str
    organization_id: str
    kind: str
    started_us: int
    record: str | None
    told: Mapping[str, Any]
    settlement: str | None
    """As :mod:`usage.spool` writes it; None where there was nothing to settle."""
    settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptEvent:
    """An audit event as it was written down. ``metadata`` is a JSON object."""

    seq: int
    event_id: str
    request_id: str
    organization_id: str
    actor: str
    action: str
    created_us: int
    metadata: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAttempt:
    """One attempt at a backend that failed."""

    backend: str
    status: int
    flags: tuple[str, ...]
    started_us: int
    duration_ms: int


class Archive:
    """A connection that reads, in a thread of its own. Methods raise sqlite3.Error."""

    def __init__(self, path: Path, *, damaged: Callable[[sqlite3.Error], None] = lambda _: None) -> None:
        """``damaged`` is told of an error after which trying again will not do."""
        self._path = path
        self._damaged = damaged
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive")
        self._db: sqlite3.Connection | None = None

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do something with the connection, in its thread."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._connected()))
        except sqlite3.Error as error:
            if is_damage(error):
                self._damaged(error)
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.submit(self._disconnect)
        self._thread.shutdown(wait=True)

    async def outgoing(self, *, after: int, most: int, refused_of: str | None = None) -> list[Outgoing]:
        """Requests in the order in which they were written; with a stream's mark those that it could not hand on."""
        query = (
            "SELECT seq, request_id, organization_id, kind, started_us, record FROM requests"  # noqa: S608 - names of ours
            f" WHERE seq > :after {_only(refused_of)} ORDER BY seq LIMIT :most"
        )
        asked = {"after": after, "most": most, "stream": refused_of}
        return await self.call(lambda db: [Outgoing(*row) for row in db.execute(query, asked)])

    async def outgoing_events(self, *, after: int, most: int, refused_of: str | None = None) -> list[KeptEvent]:
        """Audit events in the order in which they were written; with a mark as :meth:`outgoing`."""
        query = (
            f"SELECT {_EVENT} FROM events"  # noqa: S608 - names of ours
            f" WHERE seq > :after {_only(refused_of)} ORDER BY seq LIMIT :most"
        )
        asked = {"after": after, "most": most, "stream": refused_of}
        return await self.call(lambda db: [_event(row) for row in db.execute(query, asked)])

    async def backlog(self, *, after: int) -> tuple[int, int | None]:
        """How many requests are not handed on, at most, and when the oldest of them ended (unix microseconds)."""

        def look(db: sqlite3.Connection) -> tuple[int, int | None]:
            [(last,)] = db.execute("SELECT max(seq) FROM requests")
            oldest = db.execute(
                "SELECT started_us + 1000 * CASE WHEN json_valid(told)"
                " THEN coalesce(json_extract(told, '$.duration_ms'), 0) ELSE 0 END"
                " FROM requests WHERE seq > ? ORDER BY seq LIMIT 1",
                (after,),
            ).fetchone()
            return (0, None) if oldest is None else (last - after, oldest[0])

        return await self.call(look)

    async def known(self, envoy_started_us: int, *, until_us: int) -> int | None:
        """How many requests of the running Envoy are known that had ended by then; None: nothing is compared yet."""

        def look(db: sqlite3.Connection) -> int | None:
            row = db.execute("SELECT value FROM marks WHERE name = ?", (ENDED_MARK,)).fetchone()
            if row is None:
                return None
            since_us, before = known_before(row[0], envoy_started_us)
            return int(before + _ended(db, since_us, until_us))

        return await self.call(look)

    async def ended(self, *, since_us: int, until_us: int) -> int:
        """How many requests are known that ended between two moments, as far as that is not folded."""
        return await self.call(lambda db: _ended(db, since_us, until_us))

    async def refused(self, stream: str) -> int:
        """How much a stream could not hand on."""

        def look(db: sqlite3.Connection) -> int:
            [(count,)] = db.execute("SELECT count(*) FROM refused WHERE stream = ?", (stream,))
            return int(count)

        return await self.call(look)

    async def refusal(self, stream: str, place: int) -> str | None:
        """Why a stream could not hand on what is at a place of it; None: it could, or will."""

        def look(db: sqlite3.Connection) -> str | None:
            row = db.execute("SELECT reason FROM refused WHERE stream = ? AND place = ?", (stream, place)).fetchone()
            return None if row is None else str(row[0])

        return await self.call(look)

    async def request(self, request_id: str, *, of: str | None = None) -> KeptRequest | None:
        """By its own id, or the newest by the id that its client gave it; ``of`` an organisation, None: of any.

        Of those with the client's id one that was forwarded comes before repetitions of its answer.
        """

        def look(db: sqlite3.Connection) -> KeptRequest | None:
            for by in ("request_id = :id", "client_request_id = :id AND kind = 'forwarded'", "client_request_id = :id"):
                query = (
                    f"SELECT {_REQUEST} FROM requests WHERE {by} AND (:of IS NULL OR organization_id = :of)"  # noqa: S608
                    " ORDER BY seq DESC LIMIT 1"
                )
                if (row := db.execute(query, {"id": request_id, "of": of}).fetchone()) is not None:
                    return _request(row)
            return None

        return await self.call(look)

    async def attempts(self, request_id: str) -> list[KeptAttempt]:
        """Attempts of a request that failed, in order."""

        def look(db: sqlite3.Connection) -> list[KeptAttempt]:
            rows = db.execute(
                "SELECT backend, status, flags, started_us, duration_ms FROM attempts"
                " WHERE request_id = ? ORDER BY started_us",
                (request_id,),
            )
            return [
                KeptAttempt(
                    backend=backend,
                    status=status,
                    flags=tuple(flags.split(",")) if flags else (),
                    started_us=started_us,
                    duration_ms=duration_ms,
                )
                for backend, status, flags, started_us, duration_ms in rows
            ]

        return await self.call(look)

    async def events_of(self, request_id: str, *, of: str | None = None) -> list[KeptEvent]:
        """Audit events of a request, in order; ``of`` an organisation, None: of any."""
        query = (
            f"SELECT {_EVENT} FROM events WHERE request_id = :id AND request_id <> ''"  # noqa: S608 - names of ours
            " AND (:of IS NULL OR organization_id = :of) ORDER BY seq"
        )
        asked = {"id": request_id, "of": of}
        return await self.call(lambda db: [_event(row) for row in db.execute(query, asked)])

    async def policy(self, digest: str) -> str | None:
        """The policy that a digest stands for, as :mod:`usage.policies` keeps it."""

        def look(db: sqlite3.Connection) -> str | None:
            row = db.execute("SELECT document FROM policies WHERE digest = ?", (digest,)).fetchone()
            return None if row is None else str(row[0])

        return await self.call(look)

    async def mark(self, name: str, default: Any) -> Any:
        """A mark as it was last written."""

        def look(db: sqlite3.Connection) -> Any:
            row = db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
            return default if row is None else row[0]

        return await self.call(look)

    async def tallies(self) -> dict[str, int]:
        """How many requests of each kind the journal has told of."""
        return await self.call(lambda db: dict(db.execute("SELECT kind, requests FROM tallies")))

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, isolation_level=None)
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _ended(db: sqlite3.Connection, since_us: int, until_us: int) -> int:
    [(count,)] = db.execute(
        "SELECT coalesce(sum(requests), 0) FROM ended WHERE moment BETWEEN ? AND ?",
        (since_us // MOMENT_US, until_us // MOMENT_US),
    )
    return int(count)


def _only(refused_of: str | None) -> str:
    return "" if refused_of is None else "AND seq IN (SELECT place FROM refused WHERE stream = :stream)"


def _request(row: Sequence[Any]) -> KeptRequest:
    seq, request_id, revision, client_request_id, organization_id, kind, started_us, *rest = row
    record, told, settlement, settled = rest
    return KeptRequest(
        seq=seq,
        request_id=request_id,
        revision=revision,
        client_request_id=client_request_id or "",
        organization_id=organization_id,
        kind=kind,
        started_us=started_us,
        record=record,
        told=from_json(told),
        settlement=settlement,
        settled=bool(settled),
    )


def _event(row: Sequence[Any]) -> KeptEvent:
    seq, event_id, request_id, organization_id, actor, action, created_us, metadata = row
    return KeptEvent(
        seq=seq,
        event_id=event_id,
        request_id=request_id,
        organization_id=organization_id,
        actor=actor,
        action=action,
        created_us=created_us,
        metadata=metadata,
    )
