"""``router audit``: the audit trail, which the ledger keeps for weeks and the limit store while it is new."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Final

import click
from rich.markup import escape
from rich.table import Table

from cli.explain import explain
from cli.ledger import Ledger, LedgerAway, ledger
from cli.limit_store import json_option, on_store, redis_option
from cli.shown import iso, moment_s, plain, print_table, span_s
from gateway.audit import AuditAction, AuditEvent
from gateway.endpoints import AUDIT_PATH
from limits.audit_reader import Found, read_events
from limits.valkey import ValkeyLimits

LIMIT_MAX: Final = 10_000
PAGE_MAX: Final = 500
"""Events that the ledger tells at once."""
DETAILS_CHARS_MAX: Final = 240
"""In the table, where a figure of every limit would be a page; JSON has all of it."""


@click.group()
def audit() -> None:
    """Show who was refused, who changed what, and what happened to a request."""


audit.add_command(explain)


@audit.command("list")
@click.option("--org", "organization_id", help="Only this organisation's events.")
@click.option("--request", "request_id", help="Only events of this request id.")
@click.option(
    "--action",
    type=click.Choice([action.value for action in AuditAction], case_sensitive=False),
    metavar="ACTION",
    help=f"Only {', '.join(action.value for action in AuditAction)}.",
)
@click.option("--since", help="90s, 30m, 12h, 30d or 8w ago, or an ISO 8601 time.")
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), default=50, show_default=True, help="Events at most.")
@redis_option
@json_option
def list_(  # noqa: PLR0917 - one parameter an option
    organization_id: str | None,
    request_id: str | None,
    action: str | None,
    since: str | None,
    limit: int,
    redis: str | None,
    as_json: bool,
) -> None:
    """List events, the newest first.

    The ledger keeps them for USAGE_RETENTION_DAYS, requests that were let through included. Without it, or with
    --redis, those are listed that the limit store has: the newest AUDIT_EVENTS_MAX of all organisations together.
    """
    wanted = Wanted(
        organization_id=organization_id,
        request_id=request_id,
        action=None if action is None else AuditAction(action),
        since_s=None if since is None else _since_s(since, now_s=time.time()),
        limit=limit,
    )
    found = _look(wanted, redis)
    if found.unreadable:
        click.echo(f"{found.unreadable} entries of the stream are no event that this version knows.", err=True)
    if as_json:
        click.echo(json.dumps([event_json(event) for event in found.events]))
        return
    if not found.events:
        click.echo("There is no such event.")
        return
    table = Table(box=None, header_style="bold")
    for heading in ("TIME", "ACTION", "ORG", "ACTOR", "REQUEST", "DETAILS"):
        table.add_column(heading, overflow="fold")
    for event in found.events:
        table.add_row(*_cells(event))
    print_table(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which events; None: whatever it is. ``since_s`` is unix seconds."""

    organization_id: str | None
    request_id: str | None
    action: AuditAction | None
    since_s: float | None
    limit: int


def _look(wanted: Wanted, redis: str | None) -> Found:
    if redis is None:
        try:
            with ledger() as found:
                return Found(events=tuple(islice(_of_ledger(found, wanted), wanted.limit)), unreadable=0)
        except LedgerAway as away:
            click.echo(f"{away}. These are the events that the limit store has.", err=True)

    async def look(store: ValkeyLimits) -> Found:
        return await read_events(store.connection, **asdict(wanted))

    return on_store(redis, look)


def _of_ledger(asked: Ledger, wanted: Wanted) -> Iterator[AuditEvent]:
    cursor: str | None = None
    while True:
        page = asked.ask(
            AUDIT_PATH,
            organization=wanted.organization_id,
            request_id=wanted.request_id,
            action=None if wanted.action is None else wanted.action.value,
            since=None if wanted.since_s is None else f"{wanted.since_s:.6f}",
            limit=min(wanted.limit, PAGE_MAX),
            cursor=cursor,
        )
        for event in page["events"]:
            at_s = datetime.fromisoformat(event["created_at"]).timestamp()
            yield AuditEvent(**event | {"action": AuditAction(event["action"]), "created_at": at_s})
        cursor = page["next_cursor"]
        if cursor is None:
            return


def _since_s(text: str, *, now_s: float) -> float:
    span = span_s(text)
    at = moment_s(text) if span is None else now_s - span
    if at is None:
        raise click.UsageError("--since is 90s, 30m, 12h, 30d or 8w, or an ISO 8601 time such as 2030-01-31T12:00:00Z.")
    return at


def event_json(event: AuditEvent) -> dict[str, Any]:
    """An event as the contract has it; ``created_at`` is unix seconds."""
    return {
        "event_id": event.event_id,
        "request_id": event.request_id,
        "organization_id": event.organization_id,
        "actor": event.actor,
        "action": event.action.value,
        "created_at": event.created_at,
        "metadata": event.metadata,
    }


def _cells(event: AuditEvent) -> tuple[str, ...]:
    details = " ".join(f"{name}={_detail(value)}" for name, value in event.metadata.items())
    if len(details) > DETAILS_CHARS_MAX:
        details = details[:DETAILS_CHARS_MAX] + "…"
    who = (event.organization_id, event.actor, event.request_id)
    # Plain text: what a client sent may hold what steers a terminal, or looks like the table's own markup.
    return (iso(event.created_at), event.action.value, *(escape(plain(text)) or "-" for text in (*who, details)))


def _detail(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
