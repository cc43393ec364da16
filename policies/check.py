"""What holds between the parts of a policy: references, duplicates, weights, names. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from gateway import names
from policies.candidates import Entry, candidates_among, killed
from policies.limits import ASSUMED_OUTPUT_TOKENS
from policies.model import ANY, LimitPolicy, ModelPolicy, Place, Policy, Problem
from policies.nodes import shown, suggestion

T = TypeVar("T")

BACKEND_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""A backend's id is part of cluster names, and of comma-joined header values."""
_EMBEDS = "embed"
"""In the names of models that make no text."""


def check(policy: Policy, *, root: Place) -> tuple[Problem, ...]:
    """Every rule that the policy breaks; ``root`` is where to point when something is absent."""
    rules = (_backends, _models, _overrides, _entries, _degraded, _kill_switches)
    absent = (
        _problem(root, section, "there is none")
        for section, values in (("backends", policy.backends), ("models", policy.models))
        if not values
    )
    return tuple(chain(absent, chain.from_iterable(rule(policy) for rule in rules)))


def warn(policy: Policy) -> tuple[Problem, ...]:
    """What is allowed but hardly meant."""
    rules = (_warn_killed, _warn_lists, _warn_prices, _warn_output)
    return tuple(chain.from_iterable(rule(policy) for rule in rules))


def _backends(policy: Policy) -> Iterator[Problem]:
    for backend in policy.backends:
        if not BACKEND_ID.fullmatch(backend.id):
            text = f"{shown(backend.id)} must be 1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit"
            yield _problem(backend.place, "id", text)
    yield from _duplicates(policy.backends, lambda b: b.id, lambda b: b.place, "id", "backend id")


def _models(policy: Policy) -> Iterator[Problem]:
    for entry in policy.models:
        if entry.model in {ANY, names.SCOPE_UNROUTED}:
            yield _problem(entry.place, "model", f"'{entry.model}' cannot be a model's name")
    yield from _duplicates(
        policy.models,
        lambda entry: (entry.model, entry.organization_id),
        lambda entry: entry.place,
        "model",
        "model and organization_id",
    )


def _overrides(policy: Policy) -> Iterator[Problem]:
    models = frozenset(str(entry.model) for entry in policy.models)
    for override in policy.organization_overrides:
        if override.organization_id == ANY:
            yield _problem(override.place, "organization_id", "must be one organisation")
        if override.model != ANY and override.model not in models:
            text = f"no entry has model {shown(override.model)}{suggestion(override.model, models)}"
            yield _problem(override.place, "model", text)
    yield from _duplicates(
        policy.organization_overrides,
        lambda override: (override.organization_id, override.model),
        lambda override: override.place,
        "organization_id",
        "override of organization_id and model",
    )


def _entries(policy: Policy) -> Iterator[Problem]:
    known = _backend_ids(policy)
    for entry in _all_entries(policy):
        if not entry.backends:
            yield _problem(entry.place, "backends", "there is none")
        elif not any(weighted.weight for weighted in entry.backends):
            yield _problem(entry.place, "backends", "weights sum to 0")
        for weighted in entry.backends:
            if weighted.backend_id not in known:
                yield _problem(weighted.place, "backend_id", _unknown_backend(weighted.backend_id, known))
        yield from _duplicates(entry.backends, lambda w: w.backend_id, lambda w: w.place, "backend_id", "backend")


def _degraded(policy: Policy) -> Iterator[Problem]:
    for entry in policy.models:
        used = frozenset(str(weighted.backend_id) for weighted in entry.backends)
        for backend_id in sorted(entry.degraded_backends - used):
            text = f"{shown(backend_id)} is not a backend of this model{suggestion(backend_id, used)}"
            yield _problem(entry.place, "degraded_backends", text)


def _kill_switches(policy: Policy) -> Iterator[Problem]:
    known = _backend_ids(policy)
    for switch in policy.kill_switches:
        if switch.backend_id not in known:
            yield _problem(switch.place, "backend_id", _unknown_backend(switch.backend_id, known))
    yield from _duplicates(
        policy.kill_switches,
        lambda switch: switch.backend_id,
        lambda switch: switch.place,
        "backend_id",
        "kill switch of a backend",
    )


def _warn_killed(policy: Policy) -> Iterator[Problem]:
    if killed(policy):
        for entry in _all_entries(policy):
            if not candidates_among(policy, entry, None):
                yield _problem(entry.place, "backends", "kill switches take every backend")


def _warn_lists(policy: Policy) -> Iterator[Problem]:
    for entry in _all_entries(policy):
        for weighted in entry.backends:
            for key_id in sorted(weighted.allow_list & weighted.deny_list):
                yield _problem(weighted.place, "allow_list", f"key {shown(key_id)} is denied too, and deny wins")
        if isinstance(entry, ModelPolicy) and entry.backends:
            normal = [w for w in entry.backends if w.backend_id not in entry.degraded_backends]
            if not normal:
                yield _problem(entry.place, "degraded_backends", "every backend is degraded")


def _warn_prices(policy: Policy) -> Iterator[Problem]:
    budgets = chain.from_iterable(limits.budgets or () for limits in _limit_policies(policy))
    if all(budget.limit_micro_usd is None for budget in budgets):
        return
    used = {weighted.backend_id for entry in _all_entries(policy) for weighted in entry.backends}
    for backend in policy.backends:
        if backend.price is None and backend.id in used:
            yield _problem(
                backend.place, "price", "there is none: the use of this backend is not charged to usd budgets"
            )


def _warn_output(policy: Policy) -> Iterator[Problem]:
    if any(limits.budgets or limits.clamp_output for limits in _limit_policies(policy)):
        text = f"there is none: a request that names no maximum is reserved as {ASSUMED_OUTPUT_TOKENS} tokens"
        for entry in policy.models:
            if entry.max_output_tokens is None and _EMBEDS not in entry.model:
                yield _problem(entry.place, "max_output_tokens", text)


def _limit_policies(policy: Policy) -> Iterator[LimitPolicy]:
    limits = policy.limits
    return chain(
        (limits.default, limits.default_key),
        (of_organization for _, of_organization in limits.organizations),
        (of_key for _, of_key in limits.keys),
    )


def _duplicates(
    values: Iterable[T], key: Callable[[T], Hashable], place: Callable[[T], Place], field: str, what: str
) -> Iterator[Problem]:
    first: dict[Hashable, Place] = {}
    for value in values:
        seen = first.setdefault(key(value), place(value))
        if seen is not place(value):
            yield _problem(place(value), field, f"duplicate {what}, first at {seen.file}:{seen.line}")


def _all_entries(policy: Policy) -> Iterator[Entry]:
    return chain(policy.models, policy.organization_overrides)


def _backend_ids(policy: Policy) -> frozenset[str]:
    return frozenset(str(backend.id) for backend in policy.backends)


def _unknown_backend(backend_id: str, known: frozenset[str]) -> str:
    return f"unknown backend {shown(backend_id)}{suggestion(backend_id, known)}"


def _problem(place: Place, field: str, text: str) -> Problem:
    path = f"{place.path}.{field}" if place.path and field else place.path or field
    return Problem(place=replace(place, path=path), text=text)
