"""``router limits``: what an organisation has used of its limits; forgetting it, so that its next request passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from cli.figures import Row, amount, not_used, row_json, rows_of, table_of
from cli.limit_store import (
    actor_option,
    an_event,
    json_option,
    key_option,
    limits_in_force,
    limits_of,
    on_store,
    organization_argument,
    redis_option,
)
from cli.shown import MICRO_PER_USD, plain, print_table, usd
from gateway.audit import AuditAction, AuditEvent
from gateway.errors import StoreUnavailable
from gateway.settings import StoreSettings, read
from limits.audit_stream import append
from limits.model import Credit
from limits.standing import Standing, read_standing
from limits.valkey import ValkeyLimits
from policies.limits import ORGANIZATION_SUBJECT, CallerLimits, key_subject
from policies.model import KeyId, OrganizationId


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An organisation's limits and what is used of them."""

    rows: tuple[Row, ...]
    standing: Standing


async def see(store: ValkeyLimits, organization_id: OrganizationId, limits: CallerLimits) -> Seen:
    """Two round trips. The store's clock is read first: what resets at midnight is not shown to reset after it.

    Raises:
        StoreUnavailable: there is no answer in time.
    """
    standing = await read_standing(store, organization_id)
    figures = await store.look(organization_id, limits)
    return Seen(rows=rows_of(figures, limits, standing), standing=standing)


@click.group()
def limits() -> None:
    """Show what an organisation has used of its limits, or reset it."""


@limits.command(short_help="Show what is used of each limit.")
@organization_argument
@key_option
@redis_option
@json_option
def show(organization_id: OrganizationId, key_id: KeyId | None, redis: str | None, as_json: bool) -> None:
    """Show every limit of ORG and, with --key, of that key: what is used, what remains, when it resets.

    The limits are those of POLICY_DIR; budgets that `router budget set` put in their place are marked.
    """
    in_force = limits_of(limits_in_force(), organization_id, key_id)
    seen = on_store(redis, lambda store: see(store, organization_id, in_force))
    if as_json:
        click.echo(json.dumps(_shown_json(organization_id, key_id, seen)))
        return
    count = seen.standing.open_requests
    click.echo(f"{plain(organization_id)}: {count} {'request is' if count == 1 else 'requests are'} open.")
    if not seen.standing.has_used:
        click.echo(not_used(organization_id))
    if seen.rows:
        print_table(table_of(seen.rows, seen.standing))
    else:
        click.echo("Nothing is limited.")


def _shown_json(organization_id: OrganizationId, key_id: KeyId | None, seen: Seen) -> dict[str, Any]:
    return {
        "organization_id": organization_id,
        "api_key_id": key_id,
        "has_used": seen.standing.has_used,
        "open_requests": seen.standing.open_requests,
        "limits": [row_json(row, seen.standing) for row in seen.rows],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """What a reset has done. ``untold``: why the audit trail lacks the credits."""

    credits: tuple[Credit, ...]
    after: Seen
    untold: str = ""


@limits.command(short_help="Forget what was used, so that the next request passes.")
@organization_argument
@key_option
@actor_option
@redis_option
@json_option
def reset(
    organization_id: OrganizationId, key_id: KeyId | None, actor: str | None, redis: str | None, as_json: bool
) -> None:
    """Forget what ORG or, with --key, that key of it has used, so that its next request passes.

    Without --key the organisation's own limits are reset, and no key's; with it the key's, and not the organisation's.
    What is open stays open. The audit trail is told first: without it nothing is reset.
    """
    in_force = limits_of(limits_in_force(), organization_id, key_id)
    subject = ORGANIZATION_SUBJECT if key_id is None else key_subject(key_id)
    events_max = read(StoreSettings).audit_events_max

    def event(**metadata: Any) -> AuditEvent:
        named = {"subject": subject} if key_id is None else {"subject": subject, "api_key_id": key_id}
        return an_event(AuditAction.LIMIT_RESET, organization_id, actor=actor, metadata={**named, **metadata})

    async def act(store: ValkeyLimits) -> Reset:
        before = await see(store, organization_id, in_force)
        figures = [row_json(row, before.standing) for row in before.rows if row.figure.subject == subject]
        asked = event(phase="before", figures=figures)
        await append(store.connection, asked, events_max=events_max)
        credits_ = await store.reset(organization_id, (subject,))
        after = await see(store, organization_id, in_force)
        done = event(phase="after", of=asked.event_id, credits=[_credit_json(credit) for credit in credits_])
        try:
            await append(store.connection, done, events_max=events_max)
        except StoreUnavailable as error:
            return Reset(credits=credits_, after=after, untold=str(error))
        return Reset(credits=credits_, after=after)

    done = on_store(redis, act)
    _tell(organization_id, key_id, done, as_json=as_json)
    if done.untold:
        raise click.ClickException(f"It is reset, but the audit trail lacks what was forgiven: {done.untold}")


def _tell(organization_id: OrganizationId, key_id: KeyId | None, done: Reset, *, as_json: bool) -> None:
    if as_json:
        credits_ = [_credit_json(credit) for credit in done.credits]
        click.echo(json.dumps({**_shown_json(organization_id, key_id, done.after), "credits": credits_}))
        return
    whose = plain(organization_id) if key_id is None else f"Key {plain(key_id)} of {plain(organization_id)}"
    forgiven = [f"{plain(c.period)} {usd(c.micro_usd)} and {c.tokens:,} tokens" for c in done.credits]
    click.echo(f"{whose} is reset. Forgiven: {'; '.join(forgiven) or 'nothing that a budget counts'}.")
    if not done.after.standing.has_used:
        click.echo(not_used(organization_id))
    for row in still_in_the_way(done.after.rows):
        click.echo(f"Still in the way: {row}.", err=True)


def still_in_the_way(rows: Sequence[Row]) -> tuple[str, ...]:
    """Limits under which the next request would be denied all the same: of the other subject, or of nothing at all."""
    found = []
    for row in rows:
        if row.is_exhausted:
            kind, limit = row.figure.kind, row.figure.limit
            whose = "the organisation's" if row.figure.subject == ORGANIZATION_SUBJECT else "the key's"
            found.append(f"{whose} {row.label}, {amount(kind, row.used)} used of {amount(kind, limit)}")
    return tuple(found)


def _credit_json(credit: Credit) -> dict[str, Any]:
    return {
        "period": credit.period,
        "tokens": credit.tokens,
        "usd": credit.micro_usd / MICRO_PER_USD,
        "micro_usd": credit.micro_usd,
    }
