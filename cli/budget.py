"""``router budget``: what may be spent in a day or a month; and putting a budget in the place of the policy's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import click

from cli.figures import Row, not_used, policy_budget, row_json, rows_of, table_of, with_every_budget
from cli.limit_store import (
    Written,
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
from cli.shown import MICRO_PER_USD, plain, print_table
from gateway.audit import AuditAction
from gateway.settings import StoreSettings, read
from limits.audit_stream import append
from limits.model import MONEY_KINDS, LimitKind
from limits.standing import BUDGETS, Standing, read_standing
from limits.valkey import ValkeyLimits
from policies.limits import ORGANIZATION_SUBJECT, CallerLimits, key_subject
from policies.model import KeyId, OrganizationId
from policies.parse_limits import COUNT_MAX
from policies.scalars import integer, micro_usd

Period = Literal["DAILY", "MONTHLY"]

_USD: Final = Written("dollars", micro_usd)
_TOKENS: Final = Written("tokens", integer(0, COUNT_MAX))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A budget before and after, by where it came from; None: no budget.

    ``was_counted``: the subject had some budget for the period, so that its use is known.
    """

    kind: LimitKind
    before: int | None
    before_is_set: bool
    was_counted: bool
    after: int | None
    after_is_set: bool

    def as_json(self) -> dict[str, Any]:
        """For the audit trail."""
        return {
            "unit": "usd" if self.kind in MONEY_KINDS else "tokens",
            "before": {"limit": _number(self.kind, self.before), "source": _source(self.before, self.before_is_set)},
            "after": {"limit": _number(self.kind, self.after), "source": _source(self.after, self.after_is_set)},
        }


def _number(kind: LimitKind, limit: int | None) -> int | float | None:
    return limit / MICRO_PER_USD if kind in MONEY_KINDS and limit is not None else limit


def _source(limit: int | None, is_set: bool) -> str:
    return "set" if is_set else "none" if limit is None else "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Rows of an organisation's or a key's budgets."""

    rows: tuple[Row, ...]
    standing: Standing


async def see_budgets(
    store: ValkeyLimits, organization_id: OrganizationId, limits: CallerLimits, *, subject: str | None = None
) -> Spent:
    """Budgets of the organisation and of the key in ``limits``, or of one of them alone.

    Raises:
        StoreUnavailable: there is no answer in time.
    """
    standing = await read_standing(store, organization_id)
    figures = await store.look(organization_id, with_every_budget(limits))
    budgets = [f for f in figures if f.kind in BUDGETS and subject in {None, f.subject}]
    return Spent(rows=rows_of(budgets, limits, standing), standing=standing)


@click.group()
def budget() -> None:
    """Show what has been spent of the budgets, or set one."""


@budget.command(short_help="Show what is spent of each budget.")
@organization_argument
@key_option
@redis_option
@json_option
def show(organization_id: OrganizationId, key_id: KeyId | None, redis: str | None, as_json: bool) -> None:
    """Show the daily and monthly budgets of ORG and, with --key, of that key.

    What an organisation spends is counted without a budget too; what a key spends, only while it has one.
    """
    limits = limits_of(limits_in_force(), organization_id, key_id)
    spent = on_store(redis, lambda store: see_budgets(store, organization_id, limits))
    if as_json:
        click.echo(json.dumps(_spent_json(organization_id, key_id, spent)))
        return
    if not spent.standing.has_used:
        click.echo(not_used(organization_id))
    print_table(table_of(spent.rows, spent.standing))
    if key_id is not None and not any(row.figure.subject == key_subject(key_id) for row in spent.rows):
        click.echo(f"Key {plain(key_id)} has no budget of its own.")


def _spent_json(organization_id: OrganizationId, key_id: KeyId | None, spent: Spent) -> dict[str, Any]:
    return {
        "organization_id": organization_id,
        "api_key_id": key_id,
        "has_used": spent.standing.has_used,
        "budgets": [row_json(row, spent.standing) for row in spent.rows],
    }


@budget.command("set", short_help="Put a budget in the place of the policy's.")
@organization_argument
@click.option(
    "--period",
    required=True,
    type=click.Choice(["DAILY", "MONTHLY"], case_sensitive=False),
    metavar="DAILY|MONTHLY",
    help="Days and months are UTC's.",
)
@click.option(
    "--usd",
    "limit_micro_usd",
    type=_USD,
    metavar="DOLLARS",
    help="At most 6 decimals; with 0 only what is free passes.",
)
@click.option("--tokens", "limit_tokens", type=_TOKENS, metavar="N", help="Input and output together.")
@click.option("--policy", "to_policy", is_flag=True, help="Return to the policy's budgets of the period.")
@key_option
@actor_option
@redis_option
@json_option
def set_(  # noqa: PLR0917 - one parameter an option
    organization_id: OrganizationId,
    period: Period,
    limit_micro_usd: int | None,
    limit_tokens: int | None,
    to_policy: bool,
    key_id: KeyId | None,
    actor: str | None,
    redis: str | None,
    as_json: bool,
) -> None:
    """Put a budget in the place of the policy's for ORG or, with --key, for that key of it.

    It holds from the next request on, and until --policy or another one takes its place. The audit trail is told first:
    without it nothing is set.
    """
    wanted = _wanted(period, limit_micro_usd, limit_tokens, to_policy=to_policy)
    limits = limits_of(limits_in_force(), organization_id, key_id)
    subject = ORGANIZATION_SUBJECT if key_id is None else key_subject(key_id)
    named = {"subject": subject, "period": period} | ({} if key_id is None else {"api_key_id": key_id})
    events_max = read(StoreSettings).audit_events_max

    async def act(store: ValkeyLimits) -> tuple[list[Change], Spent]:
        changes = _changes(wanted, subject, limits, await read_standing(store, organization_id))
        if changes:
            metadata = {**named, "changes": [change.as_json() for change in changes]}
            event = an_event(AuditAction.BUDGET_SET, organization_id, actor=actor, metadata=metadata)
            await append(store.connection, event, events_max=events_max)
        for change in changes:
            limit = change.after if change.after_is_set else None
            await store.set_budget(organization_id, subject, *BUDGETS[change.kind], limit)
        return changes, await see_budgets(store, organization_id, limits, subject=subject)

    changes, spent = on_store(redis, act)
    if as_json:
        click.echo(json.dumps(_spent_json(organization_id, key_id, spent)))
    else:
        is_new = key_id is not None and bool(changes) and not changes[0].was_counted
        _tell(organization_id, key_id, spent, is_changed=bool(changes), is_new=is_new)


def _wanted(
    period: Period, limit_micro_usd: int | None, limit_tokens: int | None, *, to_policy: bool
) -> Mapping[LimitKind, int | None]:
    """Limits by kind; None: the policy's."""
    usd_kind, tokens_kind = (kind for kind, (of, _) in BUDGETS.items() if of == period)
    given = {
        kind: limit for kind, limit in ((usd_kind, limit_micro_usd), (tokens_kind, limit_tokens)) if limit is not None
    }
    if to_policy:
        if given:
            raise click.UsageError("--policy returns to the policy's budgets: give it without --usd and --tokens.")
        return {usd_kind: None, tokens_kind: None}
    if not given:
        raise click.UsageError("Give --usd, --tokens or both, or --policy.")
    return given


def _changes(
    wanted: Mapping[LimitKind, int | None], subject: str, limits: CallerLimits, standing: Standing
) -> list[Change]:
    """What is to be changed; nothing where it is so already."""
    changes = []
    kinds = [kind for kind, (period, _) in BUDGETS.items() if period in {BUDGETS[wish][0] for wish in wanted}]
    was_counted = any(
        (subject, kind) in standing.budgets or policy_budget(limits, subject, kind) is not None for kind in kinds
    )
    for kind, limit in wanted.items():
        by_policy = policy_budget(limits, subject, kind)
        was = standing.budgets.get((subject, kind))
        if limit != was:
            change = Change(
                kind=kind,
                before=by_policy if was is None else was,
                before_is_set=was is not None,
                was_counted=was_counted,
                after=by_policy if limit is None else limit,
                after_is_set=limit is not None,
            )
            changes.append(change)
    return changes


def _tell(
    organization_id: OrganizationId, key_id: KeyId | None, spent: Spent, *, is_changed: bool, is_new: bool
) -> None:
    whose = plain(organization_id) if key_id is None else f"key {plain(key_id)} of {plain(organization_id)}"
    click.echo(f"{'Set' if is_changed else 'Nothing changes'} for {whose}.")
    if not spent.standing.has_used:
        click.echo(not_used(organization_id))
    elif is_new:
        click.echo("What it uses is counted from now on: it had no budget for the period.")
    if spent.rows:
        print_table(table_of(spent.rows, spent.standing))
