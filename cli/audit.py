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

from cli.event_lines import print_events
from cli.explain import explain
from cli.ledger import Ledger, LedgerAway, key_option, ledger, running_ledger, url_option
from cli.limit_store import json_option, on_store, redis_option
from cli.shown import asked_moment_s
from gateway.audit import AuditAction, AuditEvent
from gateway.endpoints import AUDIT_PATH
from limits.audit_reader import Found, read_events
from limits.valkey import ValkeyLimits
from usage.record import MICRO, iso

LIMIT_MAX: Final = 10_000
PAGE_MAX: Final = 500
"""Events that the ledger tells at once."""


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
@click.option("--until", help="As --since; events of that moment are left out.")
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), default=50, show_default=True, help="Events at most.")
@url_option
@key_option
@redis_option
@json_option
def list_(  # noqa: PLR0917 - one parameter an option
    organization_id: str | None,
    request_id: str | None,
    action: str | None,
    since: str | None,
    until: str | None,
    limit: int,
    url: str | None,
    key: str | None,
    redis: str | None,
    as_json: bool,
) -> None:
    """List events, the newest first.

    The ledger keeps them for USAGE_RETENTION_DAYS, requests that were let through included. Without it, or with
    --redis, those are listed that the limit store has: the newest AUDIT_EVENTS_MAX of all organisations together.
    """
    if url is not None and redis is not None:
        raise click.UsageError("Give --url or --redis, not both.")
    now_s = time.time()
    wanted = Wanted(
        organization_id=organization_id,
        request_id=request_id,
        action=None if action is None else AuditAction(action),
        since_s=None if since is None else asked_moment_s("--since", since, now_s=now_s),
        until_s=None if until is None else asked_moment_s("--until", until, now_s=now_s),
        limit=limit,
    )
    found = _look(wanted, redis) if url is None else _look_through(url, key, wanted)
    if found.unreadable:
        click.echo(f"{found.unreadable} entries of the stream are no event that this version knows.", err=True)
    if as_json:
        click.echo(json.dumps([event_json(event) for event in found.events]))
        return
    if not found.events:
        click.echo("There is no such event.")
        return
    print_events(found.events)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which events; None: whatever it is. ``since_s`` and ``until_s``, the first moment after, are unix seconds."""

    organization_id: str | None
    request_id: str | None
    action: AuditAction | None
    since_s: float | None
    until_s: float | None
    limit: int


def _look_through(url: str, key: str | None, wanted: Wanted) -> Found:
    with running_ledger(url, key) as found:
        return Found(events=tuple(islice(_of_ledger(found, wanted), wanted.limit)), unreadable=0)


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
            until=None if wanted.until_s is None else f"{wanted.until_s:.6f}",
            limit=min(wanted.limit, PAGE_MAX),
            cursor=cursor,
        )
        for event in page["events"]:
            at_s = datetime.fromisoformat(event["created_at"]).timestamp()
            yield AuditEvent(**event | {"action": AuditAction(event["action"]), "created_at": at_s})
        cursor = page["next_cursor"]
        if cursor is None:
            return


def event_json(event: AuditEvent) -> dict[str, Any]:
    """An event as the contract has it."""
    return {
        "event_id": event.event_id,
        "request_id": event.request_id,
        "organization_id": event.organization_id,
        "actor": event.actor,
        "action": event.action.value,
        "created_at": iso(round(event.created_at * MICRO)),
        "metadata": event.metadata,
    }
