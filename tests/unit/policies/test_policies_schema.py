"""schema.json, which editors use, says the same as the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from policy_builders import FULL, MINIMAL, problems

from policies.compose import compose
from policies.model import Problem
from policies.nodes import Mapping, Node, Scalar

POLICIES = Path(__file__).parents[3] / "policies"
SCHEMA: dict[str, Any] = json.loads((POLICIES / "schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def instance(node: Node) -> Any:
    """What an editor validates: the document by YAML 1.2's core schema."""
    if isinstance(node, Mapping):
        return {key.text: instance(value) for key, value in node.entries if isinstance(key, Scalar)}
    if not isinstance(node, Scalar):
        return [instance(item) for item in node.items]
    readers: dict[str, Any] = {"null": lambda _: None, "bool": lambda text: text.lower() == "true"}
    return (readers | {"int": int, "float": float, "string": str})[node.kind](node.text)


def schema_errors(text: str) -> list[str]:
    root = compose(text, file="f.yaml")
    assert not isinstance(root, Problem), root
    return [error.message for error in VALIDATOR.iter_errors(instance(root))]


def test_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_sample_policy_names_the_schema_and_fits_it() -> None:
    text = (POLICIES / "router.yaml").read_text()
    assert "$schema=schema.json" in text.splitlines()[0]
    assert list(VALIDATOR.iter_errors(yaml.safe_load(text))) == []


def backend(fields: str) -> str:
    return MINIMAL.replace("uri: http://a", f"uri: http://a, {fields}")


def limits(fields: str) -> str:
    return MINIMAL + f"limits: {{default: {{{fields}}}}}\n"


GOOD = {
    "minimal": MINIMAL,
    "full": FULL,
    "empty sections": MINIMAL + "kill_switches:\nlimits:\ndefault_policy:\norganization_overrides:\n",
    "ipv6": MINIMAL.replace("http://a", '"http://[::1]:8000/v1"'),
    "plain scalars as names": MINIMAL.replace("model: m", "model: 1.0, organization_id: true"),
    "credential prefix may be empty": backend("credential: {env: K, prefix: ''}"),
    "zero budget": limits("budgets: [{period: DAILY, usd: 0}]"),
    "store error for every class": limits("on_store_error: local"),
    "store error for each class": limits("on_store_error: {rates: allow, budgets: deny}"),
    "store error for one class": limits("on_store_error: {budgets: allow}"),
    "store error for no class": limits("on_store_error: {}"),
    "limits of each key": MINIMAL + "limits: {default_key: {max_parallel: 1}}",
    "shortest answers": MINIMAL.replace("model: m", "model: m, max_output_tokens: 1"),
    "longest answers": MINIMAL.replace("model: m", "model: m, max_output_tokens: 10000000"),
    "highest price": backend("price: {input_usd_per_1k: 10000, output_usd_per_1k: 10000.0}"),
    "price of zero": backend("price: {input_usd_per_1k: 0, output_usd_per_1k: .5}"),
    "no limits": limits(""),
}

BAD = {
    "unknown section": MINIMAL + "model: []",
    "unknown field": backend("credental: {}"),
    "missing uri": MINIMAL.replace(", uri: http://a", ""),
    "missing weight": MINIMAL.replace(", weight: 1", ""),
    "missing model": MINIMAL.replace("model: m, ", ""),
    "list expected": MINIMAL + "kill_switches: {}",
    "mapping expected": backend("price: 5"),
    "null field": backend("timeout: "),
    "null name": MINIMAL.replace("model: m", "model: ~"),
    "backend id": MINIMAL.replace("id: a", "id: -a", 1).replace("backend_id: a", "backend_id: -a"),
    "scheme": MINIMAL.replace("http://a", "ftp://a"),
    "query": MINIMAL.replace("http://a", '"http://a/?x"'),
    "user": MINIMAL.replace("http://a", "http://u@a"),
    "zero timeout": backend("timeout: 0.0s"),
    "unitless timeout": backend("timeout: 30"),
    "relative health path": backend("health_check: {path: health}"),
    "both credentials": backend("credential: {env: A, file: b}"),
    "no credential": backend("credential: {header: x-token}"),
    "credential header": backend("credential: {env: A, header: Host}"),
    "env name": backend("credential: {env: a-b}"),
    "negative price": backend("price: {input_usd_per_1k: -1, output_usd_per_1k: 1}"),
    "quoted price": backend("price: {input_usd_per_1k: '1', output_usd_per_1k: 1}"),
    "half a price": backend("price: {input_usd_per_1k: 1}"),
    "quoted boolean": backend("reports_usage: 'true'"),
    "yes is no boolean": backend("reports_usage: yes"),
    "negative weight": MINIMAL.replace("weight: 1", "weight: -1"),
    "fractional weight": MINIMAL.replace("weight: 1", "weight: 1.5"),
    "weights sum to 0": MINIMAL.replace("weight: 1", "weight: 0"),
    "no backends": MINIMAL.replace("{backend_id: a, weight: 1}", ""),
    "model star": MINIMAL.replace("model: m", 'model: "*"'),
    "model with a space": MINIMAL.replace("model: m", "model: a b"),
    "key with a comma": MINIMAL.replace("weight: 1", "weight: 1, deny_list: ['a,b']"),
    "override of everyone": MINIMAL
    + "organization_overrides: [{organization_id: '*', backends: [{backend_id: a, weight: 1}]}]",
    "kill switch without state": MINIMAL + "kill_switches: [{backend_id: a}]",
    "threshold": MINIMAL + "default_policy: {failover_threshold: 0}",
    "zero ejection": MINIMAL + "default_policy: {ejection: 0s}",
    "zero burst": limits("burst: 0"),
    "empty budget": limits("budgets: [{period: DAILY}]"),
    "period": limits("budgets: [{period: daily, usd: 1}]"),
    "store error": limits("on_store_error: open"),
    "store error of rates": limits("on_store_error: {rates: open}"),
    "budgets cannot be counted here": limits("on_store_error: {budgets: local}"),
    "store error of what": limits("on_store_error: {tokens: deny}"),
    "null store error": limits("on_store_error: "),
    "limits of whose": MINIMAL + "limits: {default_org: {max_parallel: 1}}",
    "budget of a billion": limits("budgets: [{period: DAILY, usd: 1000000001}]"),
    "too high a price": backend("price: {input_usd_per_1k: 10000.5, output_usd_per_1k: 1}"),
    "too high a cached price": backend(
        "price: {input_usd_per_1k: 1, output_usd_per_1k: 1, cached_input_usd_per_1k: 10001}"
    ),
    "too high a price of reasoning": backend(
        "price: {input_usd_per_1k: 1, output_usd_per_1k: 1, reasoning_usd_per_1k: 10001}"
    ),
    "no answer": MINIMAL.replace("model: m", "model: m, max_output_tokens: 0"),
    "endless answers": MINIMAL.replace("model: m", "model: m, max_output_tokens: 10000001"),
    "fractional answers": MINIMAL.replace("model: m", "model: m, max_output_tokens: 1.5"),
    "limits key": MINIMAL + "limits: {keys: {'a b': {}}}",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_loader_and_schema_accept(text: str) -> None:
    assert problems(text) == []
    assert schema_errors(text) == []


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_loader_and_schema_refuse(text: str) -> None:
    assert problems(text)
    assert schema_errors(text)
