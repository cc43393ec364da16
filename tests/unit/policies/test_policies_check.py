"""Rules between the parts of a policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from policy_builders import HERE, MINIMAL, a_model, a_policy, a_share, loaded, problems, valid_policies

from policies.check import check, warn
from policies.model import Policy

PRICED = MINIMAL.replace("uri: http://a", "uri: http://a, price: {input_usd_per_1k: 1, output_usd_per_1k: 1}")
BUDGET = "limits: {default: {budgets: [{period: DAILY, usd: 1}]}}\n"


def told(policy: Policy) -> list[str]:
    return [str(problem) for problem in check(policy, root=HERE)]


@given(valid_policies())
def test_policy_that_breaks_no_rule_survives(policy: Policy) -> None:
    assert told(policy) == []
    warn(policy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["policies:1 backends: there is none", "policies:1 models: there is none"]),
        (
            "backends: [{id: a, uri: http://a}]\nmodels: [{model: m, backends: []}]",
            ["policies/0.yaml:2 models[0].backends: there is none"],
        ),
        (
            MINIMAL + "kill_switches: [{backend_id: A, enabled: true}]",
            ["policies/0.yaml:3 kill_switches[0].backend_id: unknown backend 'A'"],
        ),
        (
            MINIMAL
            + "organization_overrides:\n- organization_id: o\n  model: n\n  backends: [{backend_id: a, weight: 1}]",
            ["policies/0.yaml:5 organization_overrides[0].model: no entry has model 'n'"],
        ),
        (
            MINIMAL + "organization_overrides: [{organization_id: '*', backends: [{backend_id: a, weight: 1}]}]",
            ["policies/0.yaml:3 organization_overrides[0].organization_id: must be one organisation"],
        ),
        (
            MINIMAL.replace("id: a,", "id: 'a b',", 1).replace("backend_id: a,", "backend_id: 'a b',"),
            [
                "policies/0.yaml:1 backends[0].id: 'a b' must be 1 to 63 letters, digits, '.', '_' or '-', "
                "the first a letter or digit"
            ],
        ),
        (
            MINIMAL.replace("model: m", "model: '*'"),
            ["policies/0.yaml:2 models[0].model: '*' cannot be a model's name"],
        ),
        (
            MINIMAL.replace("model: m", "model: '-'"),
            ["policies/0.yaml:2 models[0].model: '-' cannot be a model's name"],
        ),
    ],
    ids=["empty", "no-backends", "kill-switch", "override-model", "override-any", "backend-id", "star", "unrouted"],
)
def test_broken_rule_is_told_at_its_place(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


def test_backend_id_has_at_most_63_characters() -> None:
    assert told(a_policy(a_model(a_share("a" * 63)))) == []
    assert len(told(a_policy(a_model(a_share("a" * 64))))) == 1


def test_duplicates_point_to_the_first() -> None:
    text = """\
backends:
  - {id: a, uri: http://a}
  - {id: a, uri: http://b}
models:
  - {model: m, backends: [{backend_id: a, weight: 1}]}
  - model: m
    backends:
      - {backend_id: a, weight: 1}
      - {backend_id: a, weight: 2}
organization_overrides:
  - {organization_id: o, model: m, backends: [{backend_id: a, weight: 1}]}
  - {organization_id: o, model: m, backends: [{backend_id: a, weight: 1}]}
kill_switches:
  - {backend_id: a, enabled: true}
  - {backend_id: a, enabled: false}
"""
    assert problems(text) == [
        "policies/0.yaml:3 backends[1].id: duplicate backend id, first at policies/0.yaml:2",
        "policies/0.yaml:6 models[1].model: duplicate model and organization_id, first at policies/0.yaml:5",
        "policies/0.yaml:9 models[1].backends[1].backend_id: duplicate backend, first at policies/0.yaml:8",
        "policies/0.yaml:12 organization_overrides[1].organization_id: "
        "duplicate override of organization_id and model, first at policies/0.yaml:11",
        "policies/0.yaml:15 kill_switches[1].backend_id: "
        "duplicate kill switch of a backend, first at policies/0.yaml:14",
    ]


def test_rule_does_not_stumble_on_what_could_not_be_read() -> None:
    text = "backends: [{id: a, uri: http://a}]\nmodels: [{model: m, backends: [{backend_id: a, weight: x}]}]"
    assert problems(text) == ["policies/0.yaml:2 models[0].backends[0].weight: expected a whole number, got 'x'"]
    assert problems("backend: []\nmodels: [{model: m, backends: [{backend_id: a, weight: 1}]}]") == [
        "policies/0.yaml:1 backend: unknown field (did you mean 'backends'?)"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "kill_switches: [{backend_id: a, enabled: true}]",
            "policies/0.yaml:2 models[0].backends: kill switches take every backend",
        ),
        (
            MINIMAL.replace("weight: 1", "weight: 1, allow_list: [k], deny_list: [k]"),
            "policies/0.yaml:2 models[0].backends[0].allow_list: key 'k' is denied too, and deny wins",
        ),
        (
            MINIMAL.replace("model: m,", "model: m, degraded_backends: [a],"),
            "policies/0.yaml:2 models[0].degraded_backends: every backend is degraded",
        ),
        (
            MINIMAL.replace("model: m,", "model: m, max_output_tokens: 9,") + BUDGET,
            "policies/0.yaml:1 backends[0].price: there is none: the use of this backend is not charged to usd budgets",
        ),
        (
            PRICED + BUDGET,
            "policies/0.yaml:2 models[0].max_output_tokens: there is none: "
            "a request that names no maximum is reserved as 4096 tokens",
        ),
    ],
    ids=["killed", "lists", "degraded", "price", "output"],
)
def test_what_is_hardly_meant_is_a_warning(text: str, expected: str) -> None:
    assert [str(warning) for warning in loaded(text).warnings] == [expected]


def warned(text: str) -> list[str]:
    return [warning.place.path for warning in loaded(text).warnings]


@pytest.mark.parametrize(
    ("limits", "paths"),
    [
        ("default: {budgets: [{period: DAILY, usd: 1}]}", ["backends[0].price", "models[0].max_output_tokens"]),
        ("default_key: {budgets: [{period: DAILY, usd: 1}]}", ["backends[0].price", "models[0].max_output_tokens"]),
        (
            "organizations: {acme: {budgets: [{period: DAILY, usd: 1}]}}",
            ["backends[0].price", "models[0].max_output_tokens"],
        ),
        ("keys: {k: {budgets: [{period: DAILY, usd: 0}]}}", ["backends[0].price", "models[0].max_output_tokens"]),
        ("default: {budgets: [{period: DAILY, tokens: 1}]}", ["models[0].max_output_tokens"]),
        ("default: {clamp_output: true}", ["models[0].max_output_tokens"]),
        ("default: {clamp_output: false, budgets: []}", []),
        ("default: {requests_per_second: 1, tokens_per_minute: 1, max_parallel: 1}", []),
        ("keys: {nobody: {max_parallel: 1}}", []),
    ],
)
def test_budgets_want_prices_and_longest_answers(limits: str, paths: list[str]) -> None:
    assert warned(MINIMAL + f"limits: {{{limits}}}") == paths


def test_warnings_of_budgets_are_one_for_each_backend_that_is_used_and_each_model() -> None:
    text = """\
backends: [{id: a, uri: http://a}, {id: b, uri: http://b}, {id: c, uri: http://c}, {id: unused, uri: http://d}]
models:
  - {model: m, backends: [{backend_id: a, weight: 1}, {backend_id: b, weight: 0}]}
  - {model: m, organization_id: acme, backends: [{backend_id: a, weight: 1}], max_output_tokens: 9}
  - {model: text-embedding-3-small, backends: [{backend_id: a, weight: 1}]}
organization_overrides: [{organization_id: acme, backends: [{backend_id: c, weight: 1}]}]
limits:
  organizations: {x: {budgets: [{period: DAILY, usd: 1}]}, y: {budgets: [{period: MONTHLY, usd: 1}]}}
"""
    assert warned(text) == [*(f"backends[{i}].price" for i in range(3)), "models[0].max_output_tokens"]
