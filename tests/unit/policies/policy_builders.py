"""Builders that state only what a test is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hypothesis import strategies as st

from policies.load import Bundle, Loaded, PolicyRejected, load
from policies.model import (
    Backend,
    BackendId,
    BackendUri,
    DefaultPolicy,
    KeyId,
    KillSwitch,
    ModelName,
    ModelPolicy,
    OrganizationId,
    OrganizationOverride,
    Place,
    Policy,
    WeightedBackend,
)

HERE = Place(file="test.yaml", line=1)

MINIMAL = """\
backends: [{id: a, uri: http://a}]
models: [{model: m, backends: [{backend_id: a, weight: 1}]}]
"""

FULL = """\
backends:
  - id: openai-eu
    uri: https://api.openai.example:8443/eu/v2/
    model_variant: gpt-4o-2024-08-06
    timeout: 1.5m
    health_check: {path: "/health?deep=1", interval: 500ms, timeout: 250ms}
    credential: {env: PROVIDER_KEY}
    price:
      {input_usd_per_1k: 0.005, output_usd_per_1k: 0.015, cached_input_usd_per_1k: 0.0025, reasoning_usd_per_1k: 0.02}
    labels: {region: eu-west-1, tier: gold, "odd label": "1.0", version: 1.10}
    reports_usage: true
  - id: vllm_6.local
    uri: http://[2001:DB8::1]:8000
    credential: {file: /run/secrets/vllm, header: X-Token, prefix: "Token "}
    price: {input_usd_per_1k: 0, output_usd_per_1k: 10000}
    reports_usage: false
  - {id: spare, uri: http://10.0.0.7, price: {input_usd_per_1k: 0, output_usd_per_1k: 0}}
default_policy: {failover_threshold: 5, ejection: 1h, warmup_window: 0s}
models:
  - model: gpt-4o
    organization_id: "*"
    backends:
      - {backend_id: openai-eu, weight: 70, allow_list: [key-1, 7], deny_list: []}
      - {backend_id: vllm_6.local, weight: 30, deny_list: [key-2]}
      - {backend_id: spare, weight: 0}
    degraded_backends: [vllm_6.local]
    max_output_tokens: 16384
  - model: on
    organization_id: acme
    backends: [{backend_id: spare, weight: 1}]
    max_output_tokens: 1
organization_overrides:
  - organization_id: acme
    model: gpt-4o
    backends: [{backend_id: spare, weight: 1}]
    reason: contract
  - {organization_id: 42, backends: [{backend_id: spare, weight: 1}]}
kill_switches:
  - {backend_id: spare, enabled: false, reason: maintenance}
limits:
  default: {requests_per_second: 100, burst: 200, tokens_per_minute: 1000000, max_parallel: 200, on_store_error: local}
  default_key: {max_parallel: 20, on_store_error: {rates: allow, budgets: deny}}
  organizations:
    acme: {budgets: [{period: MONTHLY, usd: 500.50, tokens: 50000000}, {period: DAILY, tokens: 0}], clamp_output: true}
  keys:
    key-1: {requests_per_second: 5, budgets: [], clamp_output: false, on_store_error: deny}
    key-2: {on_store_error: {budgets: allow}}
"""


def a_bundle(*texts: str) -> Bundle:
    """Files ``0.yaml``, ``1.yaml``, … of a directory ``policies``."""
    return Bundle.of("policies", ((f"{i}.yaml", text) for i, text in enumerate(texts)))


def loaded(*texts: str, endpoints: str = "") -> Loaded:
    return load(a_bundle(*texts), endpoints)


def problems(*texts: str, endpoints: str = "") -> list[str]:
    """What loading the texts says; nothing when it works."""
    try:
        loaded(*texts, endpoints=endpoints)
    except PolicyRejected as rejection:
        found = rejection.problems
        told = str(rejection).splitlines()
    else:
        return []
    assert found
    assert all(problem.place.file and problem.place.line >= 1 for problem in found)
    assert told == [str(problem) for problem in found]
    return told


def write(directory: Path, files: Mapping[str, str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def a_backend(backend_id: str) -> Backend:
    uri = BackendUri(scheme="http", host=f"{backend_id}.test", port=80, path_prefix="")
    return Backend(id=BackendId(backend_id), uri=uri, place=HERE)


def a_share(
    backend_id: str, weight: int = 1, *, allow: Iterable[str] = (), deny: Iterable[str] = ()
) -> WeightedBackend:
    return WeightedBackend(
        backend_id=BackendId(backend_id),
        weight=weight,
        allow_list=frozenset(map(KeyId, allow)),
        deny_list=frozenset(map(KeyId, deny)),
        place=HERE,
    )


def a_model(
    *shares: WeightedBackend, model: str = "m", organization: str = "*", degraded: Iterable[str] = ()
) -> ModelPolicy:
    return ModelPolicy(
        model=ModelName(model),
        organization_id=OrganizationId(organization),
        backends=shares or (a_share("a"),),
        degraded_backends=frozenset(map(BackendId, degraded)),
        place=HERE,
    )


def an_override(*shares: WeightedBackend, model: str = "*", organization: str = "acme") -> OrganizationOverride:
    return OrganizationOverride(
        organization_id=OrganizationId(organization),
        model=ModelName(model),
        backends=shares or (a_share("a"),),
        place=HERE,
    )


def a_policy(
    *models: ModelPolicy,
    overrides: Iterable[OrganizationOverride] = (),
    killed: Iterable[str] = (),
    spared: Iterable[str] = (),
    backends: Iterable[str] | None = None,
) -> Policy:
    """A policy whose backends are, if not given, those that its entries name."""
    models = models or (a_model(),)
    overrides = tuple(overrides)
    named = {share.backend_id for entry in (*models, *overrides) for share in entry.backends}
    switches = [(backend_id, True) for backend_id in killed] + [(backend_id, False) for backend_id in spared]
    return Policy(
        backends=tuple(map(a_backend, sorted(named) if backends is None else backends)),
        default_policy=DefaultPolicy(),
        models=models,
        organization_overrides=overrides,
        kill_switches=tuple(
            KillSwitch(backend_id=BackendId(backend_id), enabled=enabled, place=HERE)
            for backend_id, enabled in switches
        ),
    )


BACKENDS = ("a", "b", "c", "d")
KEYS = ("k1", "k2", "k3")
MODELS = ("m1", "m2", "m3")
ORGANIZATIONS = ("acme", "zeta")

_keys = st.sets(st.sampled_from(KEYS), max_size=2)


@st.composite
def shares(draw: st.DrawFn) -> tuple[WeightedBackend, ...]:
    ids = draw(st.lists(st.sampled_from(BACKENDS), min_size=1, unique=True))
    weights = [draw(st.integers(1, 100)), *(draw(st.integers(0, 100)) for _ in ids[1:])]
    return tuple(a_share(i, w, allow=draw(_keys), deny=draw(_keys)) for i, w in zip(ids, weights, strict=True))


@st.composite
def model_entries(draw: st.DrawFn, model: str = "m", organization: str = "*") -> ModelPolicy:
    backends = draw(shares())
    degraded = draw(st.sets(st.sampled_from([share.backend_id for share in backends])))
    return a_model(*backends, model=model, organization=organization, degraded=degraded)


@st.composite
def valid_policies(draw: st.DrawFn) -> Policy:
    """Any policy that breaks no rule."""
    pairs = st.tuples(st.sampled_from(MODELS), st.sampled_from(("*", *ORGANIZATIONS)))
    keys = draw(st.lists(pairs, min_size=1, max_size=5, unique=True))
    models = tuple(draw(model_entries(model=model, organization=organization)) for model, organization in keys)
    names = sorted({entry.model for entry in models})
    override_pairs = st.tuples(st.sampled_from((*names, "*")), st.sampled_from(ORGANIZATIONS))
    overridden = draw(st.lists(override_pairs, max_size=3, unique=True))
    killed = draw(st.sets(st.sampled_from(BACKENDS)))
    return a_policy(
        *models,
        overrides=[an_override(*draw(shares()), model=model, organization=org) for model, org in overridden],
        killed=killed,
        spared=draw(st.sets(st.sampled_from(sorted(set(BACKENDS) - killed)))) if len(killed) < len(BACKENDS) else (),
        backends=BACKENDS,
    )
