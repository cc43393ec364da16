"""Which backends a request may use: the one answer that routes and ext_proc share. Pure.

Three things narrow an entry's backends: a key's allow and deny lists (its *variant*), kill switches, and
degradation, which only demotes. Routes are built per variant; ext_proc names the variant in a header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeAlias, TypeVar

from policies.model import (
    ANY,
    BackendId,
    KeyId,
    ModelName,
    ModelPolicy,
    OrganizationId,
    OrganizationOverride,
    Policy,
)

Entry: TypeAlias = ModelPolicy | OrganizationOverride

M = TypeVar("M")
V = TypeVar("V")

_Key: TypeAlias = tuple[OrganizationId, ModelName]
_EVERY_ORGANIZATION = OrganizationId(ANY)
_EVERY_MODEL = ModelName(ANY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A backend that a request may go to. ``degraded``: only when no normal one is left."""

    backend_id: BackendId
    weight: int
    standing: Literal["normal", "degraded"]


def resolve(policy: Policy, organization: OrganizationId, model: ModelName) -> Entry | None:
    """Entry in force for a model and an organisation; None where the organisation has no such model.

    In this order: override of this model, override of every model, the organisation's own entry, the entry for
    every organisation. An override of every model replaces entries; it does not add models.
    """
    return _pick(*_entries(policy), organization, model)


def killed(policy: Policy) -> frozenset[BackendId]:
    """Backends whose kill switch is enabled."""
    return frozenset(switch.backend_id for switch in policy.kill_switches if switch.enabled)


def degraded(entry: Entry) -> frozenset[BackendId]:
    """Backends that an entry keeps as last resort; an override has none."""
    return entry.degraded_backends if isinstance(entry, ModelPolicy) else frozenset()


def admitted(entry: Entry, key_id: KeyId | None) -> frozenset[BackendId]:
    """Backends that allow and deny lists leave a key; None stands for a key that no list names."""
    return frozenset(weighted.backend_id for weighted in entry.backends if weighted.admits(key_id))


def candidates(policy: Policy, entry: Entry, key_id: KeyId | None) -> tuple[Candidate, ...]:
    """Backends that a key may use now, in the order of the entry."""
    return candidates_among(policy, entry, admitted(entry, key_id))


def candidates_among(policy: Policy, entry: Entry, subset: frozenset[BackendId] | None) -> tuple[Candidate, ...]:
    """Backends of one variant that may be used now; None is the variant that sees every backend."""
    out, last = killed(policy), degraded(entry)
    return tuple(
        Candidate(
            backend_id=weighted.backend_id,
            weight=weighted.weight,
            standing="degraded" if weighted.backend_id in last else "normal",
        )
        for weighted in entry.backends
        if weighted.backend_id not in out and (subset is None or weighted.backend_id in subset)
    )


def variant_of(entry: Entry, key_id: KeyId | None) -> frozenset[BackendId] | None:
    """Subset of backends that the lists leave a key; None where it sees every backend of the entry."""
    subset = admitted(entry, key_id)
    return None if len(subset) == len({weighted.backend_id for weighted in entry.backends}) else subset


def listed_keys(entry: Entry) -> frozenset[KeyId]:
    """Keys that an allow or deny list of the entry names."""
    return frozenset(chain.from_iterable(weighted.allow_list | weighted.deny_list for weighted in entry.backends))


def variants(entry: Entry) -> tuple[frozenset[BackendId], ...]:
    """Every proper, non-empty subset that some key may get, sorted."""
    keys: set[KeyId | None] = {None, *listed_keys(entry)}
    subsets = {variant_of(entry, key) for key in keys}
    return tuple(sorted((subset for subset in subsets if subset), key=sorted))


def is_override(policy: Policy, entry: Entry, subset: frozenset[BackendId] | None) -> bool:
    """Whether an operator's hand changed the choice: override, kill switch, degradation or a list."""
    backends = {weighted.backend_id for weighted in entry.backends}
    return (
        isinstance(entry, OrganizationOverride)
        or (subset is not None and not backends <= subset)
        or not backends.isdisjoint(killed(policy) | degraded(entry))
    )


class ResolvedModel:
    """An entry with the variant of every key worked out beforehand."""

    __slots__ = ("_killed", "_listed", "_unlisted", "entry")

    def __init__(self, entry: Entry, out: frozenset[BackendId]) -> None:
        self.entry = entry
        self._killed = out
        self._unlisted = variant_of(entry, None)
        self._listed = {key: variant_of(entry, key) for key in listed_keys(entry)}

    def variant(self, key_id: KeyId) -> frozenset[BackendId] | None:
        """As :func:`variant_of`; an empty set means that the key may use no backend of this model."""
        return self._listed.get(key_id, self._unlisted)

    def admits(self, key_id: KeyId) -> bool:
        """Whether the lists leave a key at least one backend."""
        return self.variant(key_id) != frozenset()

    def all_killed(self, key_id: KeyId) -> bool:
        """Whether kill switches took every backend that the lists leave a key."""
        if not self._killed:
            return False
        subset = self.variant(key_id)
        if subset is None:
            subset = frozenset(weighted.backend_id for weighted in self.entry.backends)
        return bool(subset) and subset <= self._killed


class PolicyIndex:
    """Immutable look-up of a policy for the request path; built once for each policy."""

    __slots__ = ("_models", "_names", "_names_any", "_overrides", "policy")

    def __init__(self, policy: Policy) -> None:
        out = killed(policy)
        models, overrides = _entries(policy)
        self.policy = policy
        self._models = {key: ResolvedModel(entry, out) for key, entry in models.items()}
        self._overrides = {key: ResolvedModel(entry, out) for key, entry in overrides.items()}
        own: dict[OrganizationId, set[ModelName]] = {}
        for organization, model in chain(models, overrides):
            if model != _EVERY_MODEL:
                own.setdefault(organization, set()).add(model)
        everyone = own.pop(_EVERY_ORGANIZATION, set())
        self._names_any = tuple(sorted(everyone))
        self._names = {organization: tuple(sorted(everyone | names)) for organization, names in own.items()}

    def lookup(self, organization: OrganizationId, model: ModelName) -> ResolvedModel | None:
        """As :func:`resolve`, in constant time."""
        return _pick(self._models, self._overrides, organization, model)

    def max_output_tokens(self, organization: OrganizationId, model: ModelName) -> int | None:
        """The most that a model answers with, as its entry for the organisation says, or the entry for every one."""
        for of in (organization, _EVERY_ORGANIZATION):
            resolved = self._models.get((of, model))
            if resolved is not None and isinstance(resolved.entry, ModelPolicy) and resolved.entry.max_output_tokens:
                return resolved.entry.max_output_tokens
        return None

    def models_for(self, organization: OrganizationId) -> tuple[ModelName, ...]:
        """Models that an organisation has, sorted; allow and deny lists of keys are not looked at."""
        return self._names.get(organization, self._names_any)


def _entries(policy: Policy) -> tuple[dict[_Key, ModelPolicy], dict[_Key, OrganizationOverride]]:
    models = {(entry.organization_id, entry.model): entry for entry in policy.models}
    overrides = {(entry.organization_id, entry.model): entry for entry in policy.organization_overrides}
    return models, overrides


def _pick(
    models: Mapping[_Key, M], overrides: Mapping[_Key, V], organization: OrganizationId, model: ModelName
) -> M | V | None:
    if model == _EVERY_MODEL:
        return None
    override = overrides.get((organization, model))
    if override is not None:
        return override
    entry = models.get((organization, model)) or models.get((_EVERY_ORGANIZATION, model))
    if entry is None:
        return None
    return overrides.get((organization, _EVERY_MODEL)) or entry
