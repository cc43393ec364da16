"""Which limits hold for a caller: the ``limits`` of a policy, worked out for one organisation and one key. Pure.

An organisation's limits are its own over ``default``; a key's are its own over ``default_key``. Both are counted for
every request, so a key without limits of its own still shares its organisation's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from policies.model import Budget, KeyId, LimitPolicy, Limits, OnStoreError, OrganizationId, StoreErrors

ORGANIZATION_SUBJECT: Final = "org"
OUTPUT_TOKENS_MAX: Final = 10_000_000
"""No answer is longer, whatever a request or a policy says."""
ASSUMED_OUTPUT_TOKENS: Final = 4096
"""What is reserved for an answer where neither the request nor the policy names a maximum."""
CALLERS_MAX: Final = 10_000
"""Callers whose limits are kept worked out."""


def key_subject(key_id: str) -> str:
    """Name under which a key's use is counted within its organisation."""
    return f"key/{key_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectLimits:
    """Limits of one organisation or one key. None: there is no such limit.

    ``burst`` is set whenever ``requests_per_second`` is. ``budgets`` has at most one for each period.
    """

    subject: str
    requests_per_second: int | None = None
    burst: int | None = None
    tokens_per_minute: int | None = None
    max_parallel: int | None = None
    budgets: tuple[Budget, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is limited."""
        numbers = (self.requests_per_second, self.tokens_per_minute, self.max_parallel)
        return not self.budgets and all(number is None for number in numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerLimits:
    """All that holds for one key: its organisation's limits first, then its own.

    The key's are there where the policy has none too: a budget may have been set for it.
    """

    subjects: tuple[SubjectLimits, ...]
    clamp_output: bool = False
    rates_on_store_error: OnStoreError = "local"
    budgets_on_store_error: Literal["deny", "allow"] = "deny"

    @property
    def has_budgets(self) -> bool:
        """Whether some budget must pay for a request."""
        return any(subject.budgets for subject in self.subjects)


class LimitIndex:
    """Look-up of a policy's limits for the request path; immutable but for what it has worked out already."""

    __slots__ = ("_default", "_default_key", "_keys", "_known", "_organizations")

    def __init__(self, limits: Limits) -> None:
        self._default = limits.default
        self._default_key = limits.default_key
        self._organizations = dict(limits.organizations)
        self._keys = dict(limits.keys)
        self._known: dict[tuple[OrganizationId, KeyId, bool], CallerLimits] = {}

    def for_caller(self, organization_id: OrganizationId, key_id: KeyId, *, parallel: bool = True) -> CallerLimits:
        """Limits of a key of an organisation, with or without those of parallel requests; always the same object."""
        caller = (organization_id, key_id, parallel)
        found = self._known.get(caller)
        if found is None:
            if len(self._known) >= CALLERS_MAX:
                self._known.clear()
            found = self._work_out(organization_id, key_id)
            if not parallel:
                found = replace(found, subjects=tuple(replace(s, max_parallel=None) for s in found.subjects))
            self._known[caller] = found
        return found

    def for_organization(self, organization_id: OrganizationId) -> SubjectLimits:
        """Limits of an organisation itself."""
        own = self._organizations.get(organization_id, LimitPolicy())
        return _subject(ORGANIZATION_SUBJECT, own, self._default)

    def _work_out(self, organization_id: OrganizationId, key_id: KeyId) -> CallerLimits:
        own = self._organizations.get(organization_id, LimitPolicy())
        of_key = self._keys.get(key_id, LimitPolicy())
        widening = (of_key, self._default_key, own, self._default)
        organization = _subject(ORGANIZATION_SUBJECT, own, self._default)
        key = _subject(key_subject(key_id), of_key, self._default_key)
        errors = [policy.on_store_error or StoreErrors() for policy in widening]
        return CallerLimits(
            subjects=(organization, key),
            clamp_output=next((p.clamp_output for p in widening if p.clamp_output is not None), False),
            rates_on_store_error=next((e.rates for e in errors if e.rates is not None), "local"),
            budgets_on_store_error=next((e.budgets for e in errors if e.budgets is not None), "deny"),
        )


def _subject(name: str, own: LimitPolicy, wider: LimitPolicy) -> SubjectLimits:
    # A wider burst belongs to the wider rate; it says nothing of a rate of its own.
    rate = own if own.requests_per_second is not None else wider
    budgets = own.budgets if own.budgets is not None else wider.budgets
    burst = own.burst if own.burst is not None else rate.burst
    return SubjectLimits(
        subject=name,
        requests_per_second=rate.requests_per_second,
        burst=None if rate.requests_per_second is None else burst or rate.requests_per_second,
        tokens_per_minute=own.tokens_per_minute if own.tokens_per_minute is not None else wider.tokens_per_minute,
        max_parallel=own.max_parallel if own.max_parallel is not None else wider.max_parallel,
        budgets=budgets or (),
    )
