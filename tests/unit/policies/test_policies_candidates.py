"""Which backends a request may use."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_builders import (
    KEYS,
    MODELS,
    ORGANIZATIONS,
    a_model,
    a_policy,
    a_share,
    an_override,
    valid_policies,
)

from policies.candidates import PolicyIndex, candidates, candidates_among, is_override, resolve, variant_of, variants
from policies.model import KeyId, ModelName, OrganizationId, Policy

ACME = OrganizationId("acme")
OTHER = OrganizationId("other")
M = ModelName("m")
SOME_KEYS = st.sampled_from([KeyId(key) for key in (*KEYS, "unlisted")])


def standing(policy: Policy, key: str | None = None) -> dict[str, str]:
    found = candidates(policy, policy.models[0], KeyId(key) if key else None)
    return {str(candidate.backend_id): candidate.standing for candidate in found}


@pytest.mark.parametrize(
    ("present", "winner"),
    [
        ({"override-m", "override-any", "own", "every"}, "override-m"),
        ({"override-any", "own", "every"}, "override-any"),
        ({"override-any", "every"}, "override-any"),
        ({"own", "every"}, "own"),
        ({"every"}, "every"),
        ({"override-m"}, "override-m"),
        ({"override-any"}, None),
        (set(), None),
    ],
)
def test_most_specific_entry_wins(present: set[str], winner: str | None) -> None:
    entries: dict[str, Any] = {
        "override-m": an_override(model="m"),
        "override-any": an_override(model="*"),
        "own": a_model(organization="acme"),
        "every": a_model(),
    }
    unrelated = a_model(model="unrelated")
    policy = a_policy(
        *(entries[name] for name in ("own", "every") if name in present),
        unrelated,
        overrides=[entries[name] for name in ("override-m", "override-any") if name in present],
    )
    expected = entries[winner] if winner else None
    assert resolve(policy, ACME, M) == expected
    assert resolve(policy, OTHER, M) == (entries["every"] if "every" in present else None)


def test_kill_switch_takes_a_backend_only_while_enabled() -> None:
    entry = a_model(a_share("a"), a_share("b"))
    assert standing(a_policy(entry, killed=["a"])) == {"b": "normal"}
    assert standing(a_policy(entry, spared=["a"])) == {"a": "normal", "b": "normal"}


def test_degraded_backend_stays_as_last_resort() -> None:
    assert standing(a_policy(a_model(a_share("a"), a_share("b"), degraded=["a"]))) == {"a": "degraded", "b": "normal"}


def test_lists_narrow_a_keys_backends() -> None:
    policy = a_policy(a_model(a_share("a", allow=["k1"]), a_share("b", deny=["k1", "k2"])))
    assert standing(policy, "k1") == {"a": "normal"}
    assert standing(policy, "k2") == {}
    assert standing(policy, "k3") == {"b": "normal"}
    assert variants(policy.models[0]) == (frozenset("a"), frozenset("b"))


def test_deny_wins_over_allow() -> None:
    assert standing(a_policy(a_model(a_share("a", allow=["k1"], deny=["k1"]), a_share("b"))), "k1") == {"b": "normal"}


def test_index_tells_killed_from_forbidden() -> None:
    policy = a_policy(a_model(a_share("a", allow=["k1", "k2"]), a_share("b", allow=["k2"])), killed=["a"])
    found = PolicyIndex(policy).lookup(ACME, M)
    assert found is not None
    k1, k2, nobody = KeyId("k1"), KeyId("k2"), KeyId("nobody")
    assert [found.admits(key) for key in (k1, k2, nobody)] == [True, True, False]
    assert [found.all_killed(key) for key in (k1, k2, nobody)] == [True, False, False]
    assert [found.variant(key) for key in (k1, k2, nobody)] == [frozenset("a"), None, frozenset()]


def test_index_lists_the_models_of_an_organisation() -> None:
    policy = a_policy(
        a_model(model="z"),
        a_model(model="a"),
        a_model(model="own", organization="acme"),
        a_model(model="theirs", organization="other"),
        overrides=[an_override(model="theirs", organization="acme"), an_override(organization="third")],
    )
    index = PolicyIndex(policy)
    assert index.models_for(ACME) == ("a", "own", "theirs", "z")
    assert index.models_for(OTHER) == ("a", "theirs", "z")
    assert index.models_for(OrganizationId("third")) == ("a", "z")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (a_policy(a_model(a_share("a"), a_share("b"))), False),
        (a_policy(a_model(a_share("a"), a_share("b")), killed=["b"]), True),
        (a_policy(a_model(a_share("a"), a_share("b")), spared=["b"]), False),
        (a_policy(a_model(a_share("a")), a_model(a_share("x"), model="n"), killed=["x"]), False),
        (a_policy(a_model(a_share("a"), a_share("b"), degraded=["b"])), True),
        (a_policy(a_model(a_share("a"), a_share("b", deny=["k1"]))), True),
        (a_policy(a_model(a_share("a"), a_share("b", deny=["k2"]))), False),
        (a_policy(a_model(a_share("a")), overrides=[an_override(a_share("a"))]), True),
    ],
    ids=["plain", "killed", "spared", "killed-elsewhere", "degraded", "denied", "denied-to-another", "override"],
)
def test_decision_is_override_when_an_operator_changed_the_choice(policy: Policy, expected: bool) -> None:
    entry = resolve(policy, ACME, M)
    assert entry is not None
    assert is_override(policy, entry, variant_of(entry, KeyId("k1"))) is expected


@given(valid_policies(), SOME_KEYS)
def test_candidates_are_never_killed_or_denied(policy: Policy, key: KeyId) -> None:
    off = {switch.backend_id for switch in policy.kill_switches if switch.enabled}
    for entry in (*policy.models, *policy.organization_overrides):
        shares = {share.backend_id: share for share in entry.backends}
        for candidate in candidates(policy, entry, key):
            assert candidate.backend_id not in off
            assert key not in shares[candidate.backend_id].deny_list
            assert not shares[candidate.backend_id].allow_list or key in shares[candidate.backend_id].allow_list


@given(valid_policies(), SOME_KEYS)
def test_variants_cover_every_key(policy: Policy, key: KeyId) -> None:
    for entry in (*policy.models, *policy.organization_overrides):
        subset = variant_of(entry, key)
        assert subset is None or not subset or subset in variants(entry)
        assert candidates_among(policy, entry, subset) == candidates(policy, entry, key)


@given(valid_policies(), st.sampled_from((*ORGANIZATIONS, "other")), st.sampled_from((*MODELS, "none", "*")), SOME_KEYS)
def test_index_agrees_with_resolve(policy: Policy, organization: str, model: str, key: KeyId) -> None:
    index = PolicyIndex(policy)
    entry = resolve(policy, OrganizationId(organization), ModelName(model))
    found = index.lookup(OrganizationId(organization), ModelName(model))
    assert (found.entry if found else None) == entry
    assert (entry is not None) == (model in index.models_for(OrganizationId(organization)))
    if found is not None and entry is not None:
        assert found.variant(key) == variant_of(entry, key)
        left = candidates(policy, entry, key)
        assert found.all_killed(key) == (found.admits(key) and not left)
