"""Usage records of a stack that hands them on as files, for tests: by request id, once everything is there."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, Final

import httpx
from jsonschema import Draft202012Validator

from gateway.settings import JOURNAL
from tests.harness.process import eventually
from tests.harness.stack import Stack
from usage.delivery import EVENTS_TOPIC, RECORDS_TOPIC
from usage.journal_file import Position
from usage.ledger import SPOOL_FILE
from usage.outlets import RECORDS_DIRECTORY
from usage.spool import ALLOWED_MARK, EVENTS_MARK, JOURNAL_MARK, RECORDS_MARK

SCHEMA_PATH: Final = Path(__file__).parents[2] / "docs" / "usage-record.schema.json"

Record = dict[str, Any]
RequestOrId = httpx.Response | str


@cache
def validator() -> Draft202012Validator:
    """Of docs/usage-record.schema.json."""
    return Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))


def problems_of(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with a record, by the schema and by what a schema cannot say."""
    problems = [f"{error.json_path}: {error.message}" for error in validator().iter_errors(record)]
    if round(record["cost_usd"] * 1_000_000) != record["cost_micro_usd"]:
        problems.append(f"$.cost_usd: {record['cost_usd']} is not {record['cost_micro_usd']} micro-dollars")
    return problems


def id_of(request: RequestOrId) -> str:
    """The id that the router gave a request."""
    return request if isinstance(request, str) else request.headers["x-request-id"]


class Records:
    """What a stack's ledger has handed on, in order, and what it has written down."""

    def __init__(self, stack: Stack) -> None:
        self._handed_on = stack.directory / RECORDS_DIRECTORY
        self._spool = stack.directory / SPOOL_FILE
        self._journal = stack.directory / JOURNAL
        self._stack = stack

    def all(self) -> list[Record]:
        """Every record so far."""
        return self._lines(RECORDS_TOPIC)

    def events(self) -> list[Record]:
        """Every audit event so far."""
        return self._lines(EVENTS_TOPIC)

    def every(self, request: RequestOrId) -> list[Record]:
        """The records of a request so far."""
        return [record for record in self.all() if record["request_id"] == id_of(request)]

    def of(self, request: RequestOrId) -> Record:
        """The one record of a request, once both of Envoy's tellings of it have been taken."""
        self.complete([request])
        [record] = self.every(request)
        return record

    def kind_of(self, request: RequestOrId) -> str | None:
        """What became of a request, as it is written down; None where it is not."""
        found = self._rows("SELECT kind FROM requests WHERE request_id = ?", id_of(request))
        return str(found[0][0]) if found else None

    def complete(self, requests: Iterable[RequestOrId]) -> None:
        """Wait until the journal has told of the requests, and everything written down by then is handed on.

        What then is not there never will be, and what is there twice has been told of twice.
        """
        ids = [id_of(request).encode() for request in requests]
        eventually(lambda: self._journal_has(ids), "Envoy's journal has the requests", every_s=0.05)
        size = self._journal.stat().st_size
        eventually(lambda: self._read_up_to() >= size, "the ledger has read the journal")
        eventually(self._is_handed_on, "everything is handed on")

    def _journal_has(self, ids: Iterable[bytes]) -> bool:
        self._stack.http.post(f"{self._stack.envoy_url}/reopen_logs").raise_for_status()  # writes what it holds back
        journal = self._journal.read_bytes()
        ended = b"".join(line for line in journal.splitlines() if b'"listener":"public"' in line)
        return all(request_id in ended for request_id in ids)

    def _read_up_to(self) -> int:
        return Position.read(str(self._marks().get(JOURNAL_MARK, ""))).offset

    def _is_handed_on(self) -> bool:
        marks = self._marks()
        [(requests, events)] = self._rows(
            "SELECT (SELECT coalesce(max(seq), 0) FROM requests), (SELECT coalesce(max(seq), 0) FROM events)"
        )
        return (
            min(int(marks.get(mark, 0)) for mark in (RECORDS_MARK, ALLOWED_MARK)) >= requests
            and int(marks.get(EVENTS_MARK, 0)) >= events
        )

    def _marks(self) -> dict[str, Any]:
        return dict(self._rows("SELECT name, value FROM marks"))

    def _rows(self, query: str, *values: str) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self._spool}?mode=ro", uri=True)) as db:
            return db.execute(query, values).fetchall()

    def _lines(self, topic: str) -> list[Record]:
        files = sorted((self._handed_on / topic).glob("*.jsonl"))
        texts = (file.read_text() for file in files)
        return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]
