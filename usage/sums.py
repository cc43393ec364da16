"""Sums of usage records by organisation and model, exact: a part of the spool at a time, so that nobody waits long."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

from usage.archive import Archive

PART: Final = 20_000
"""Requests looked at in one go."""
_SUMS: Final = """
SELECT organization_id, json_extract(record, '$.model'), count(*),
  sum(json_extract(record, '$.tokens_input')), sum(json_extract(record, '$.tokens_output')),
  sum(json_extract(record, '$.cost_micro_usd'))
FROM requests INDEXED BY requests_started WHERE started_us > :after AND started_us <= :to AND json_valid(record)
  AND (:of IS NULL OR organization_id = :of)
GROUP BY 1, 2
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """What an organisation has used of a model."""

    organization_id: str
    model: str
    requests: int
    tokens_input: int
    tokens_output: int
    cost_micro_usd: int


async def sum_records(archive: Archive, *, since_us: int | None, organization_id: str | None) -> list[Sum]:
    """Sums of the records that are kept, sorted.

    Raises:
        sqlite3.Error: the spool cannot be read.
    """
    found: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    # By the time of their start, as that stays when an estimate is replaced.
    after = -1 if since_us is None else since_us - 1
    last = await archive.call(_last)
    while after < last:
        to = await archive.call(lambda db, after=after: _end_of_part(db, after, last))  # type: ignore[misc]
        asked = {"after": after, "to": to, "of": organization_id}
        for organization, model, *figures in await archive.call(lambda db, asked=asked: _part(db, asked)):  # type: ignore[misc]
            found[organization, model] = [a + b for a, b in zip(found[organization, model], figures, strict=True)]
        after = to
    return [
        Sum(
            organization_id=organization,
            model=model,
            requests=requests,
            tokens_input=tokens_input,
            tokens_output=tokens_output,
            cost_micro_usd=cost,
        )
        for (organization, model), (requests, tokens_input, tokens_output, cost) in sorted(found.items())
    ]


def _last(db: sqlite3.Connection) -> int:
    [(last,)] = db.execute("SELECT coalesce(max(started_us), -1) FROM requests")
    return int(last)


def _end_of_part(db: sqlite3.Connection, after: int, last: int) -> int:
    """The start of the last request of the next part."""
    row = db.execute(
        "SELECT started_us FROM requests WHERE started_us > ? ORDER BY started_us LIMIT 1 OFFSET ?", (after, PART - 1)
    ).fetchone()
    return last if row is None else min(int(row[0]), last)


def _part(db: sqlite3.Connection, asked: dict[str, Any]) -> list[tuple[Any, ...]]:
    return db.execute(_SUMS, asked).fetchall()
