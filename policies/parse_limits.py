"""The ``limits`` section as values. Pure."""

from __future__ import annotations

from typing import Final, Literal

from policies.model import Budget, KeyId, LimitPolicy, Limits, OnStoreError, OrganizationId, StoreErrors
from policies.nodes import Cursor, Mapping, Read, each, fields_of, keyed
from policies.scalars import boolean, choice, integer, micro_usd, name

COUNT_MAX: Final = 10**15

_NONE: tuple[tuple[str, LimitPolicy], ...] = ()
_PERIOD: Read[Literal["DAILY", "MONTHLY"]] = choice("DAILY", "MONTHLY")
_ON_STORE_ERROR: Read[OnStoreError] = choice("local", "deny", "allow")
_BUDGETS_ON_STORE_ERROR: Read[Literal["deny", "allow"]] = choice("deny", "allow")
_LIMIT_FIELDS = frozenset(
    {
        "requests_per_second",
        "burst",
        "tokens_per_minute",
        "max_parallel",
        "budgets",
        "clamp_output",
        "on_store_error",
    }
)


def parse_limits(at: Cursor) -> Limits:
    """Limits of all, of organisations and of keys; sorted by id."""
    fields = fields_of(at, frozenset({"default", "default_key", "organizations", "keys"}))
    by_id = keyed(name, _limit_policy)
    return Limits(
        default=fields.get("default", _limit_policy, LimitPolicy()),
        default_key=fields.get("default_key", _limit_policy, LimitPolicy()),
        organizations=tuple((OrganizationId(key), value) for key, value in fields.get("organizations", by_id, _NONE)),
        keys=tuple((KeyId(key), value) for key, value in fields.get("keys", by_id, _NONE)),
    )


def _limit_policy(at: Cursor) -> LimitPolicy:
    fields = fields_of(at, _LIMIT_FIELDS)
    count = integer(1, COUNT_MAX)
    return LimitPolicy(
        requests_per_second=fields.get("requests_per_second", count, None),
        burst=fields.get("burst", count, None),
        tokens_per_minute=fields.get("tokens_per_minute", count, None),
        max_parallel=fields.get("max_parallel", count, None),
        budgets=fields.get("budgets", _budgets, None),
        clamp_output=fields.get("clamp_output", boolean, None),
        on_store_error=fields.get("on_store_error", _store_errors, None),
    )


def _store_errors(at: Cursor) -> StoreErrors:
    """One word for every class, or a word for each."""
    if not isinstance(at.node, Mapping):
        word = _ON_STORE_ERROR(at)
        return StoreErrors(rates=word, budgets=None if word == "local" else word)
    fields = fields_of(at, frozenset({"rates", "budgets"}))
    return StoreErrors(
        rates=fields.get("rates", _ON_STORE_ERROR, None),
        budgets=fields.get("budgets", _BUDGETS_ON_STORE_ERROR, None),
    )


def _budgets(at: Cursor) -> tuple[Budget, ...]:
    budgets = each(_budget)(at)
    periods = [budget.period for budget in budgets]
    for period in sorted({period for period in periods if periods.count(period) > 1}):
        at.fail(f"more than one budget for {period}")
    return budgets


def _budget(at: Cursor) -> Budget | None:
    fields = fields_of(at, frozenset({"period", "usd", "tokens"}))
    if fields.at("usd") is None and fields.at("tokens") is None:
        at.fail("needs 'usd' or 'tokens'")
    period = fields.need("period", _PERIOD, None)
    if period is None:
        return None
    return Budget(
        period=period,
        limit_micro_usd=fields.get("usd", micro_usd, None),
        limit_tokens=fields.get("tokens", integer(0, COUNT_MAX), None),
    )
