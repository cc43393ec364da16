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
FROM requests WHERE seq > :after AND seq <= :to AND record IS NOT NULL
  AND (:since_us IS NULL OR started_us >= :since_us) AND (:of IS NULL OR organization_id = :of)
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
    after, last = await archive.call(lambda db: _bounds(db, since_us))
    found: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    while after < last:
        asked = {"after": after, "to": after + PART, "since_us": since_us, "of": organization_id}
        for organization, model, *figures in await archive.call(lambda db, asked=asked: _part(db, asked)):  # type: ignore[misc]
            found[organization, model] = [a + b for a, b in zip(found[organization, model], figures, strict=True)]
        after += PART
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


def _bounds(db: sqlite3.Connection, since_us: int | None) -> tuple[int, int]:
    """Before the first and at the last request of the time."""
    if since_us is None:
        [(lowest,)] = db.execute("SELECT min(seq) FROM requests")
    else:
        [(lowest,)] = db.execute("SELECT min(seq) FROM requests WHERE started_us >= ?", (since_us,))
    [(highest,)] = db.execute("SELECT max(seq) FROM requests")
    return (0, 0) if lowest is None else (lowest - 1, highest)


def _part(db: sqlite3.Connection, asked: dict[str, Any]) -> list[tuple[Any, ...]]:
    return db.execute(_SUMS, asked).fetchall()
