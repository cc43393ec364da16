"""Marked nodes of policy files to a :class:`Policy`. Pure; never raises, never stops at the first problem.

Where a value is wrong a stand-in takes its place, so that the rest can still be looked at: the policy
of a parse with problems is for finding more of them, not for use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from policies.limits import OUTPUT_TOKENS_MAX
from policies.model import (
    ANY,
    Backend,
    BackendId,
    BackendUri,
    Credential,
    DefaultPolicy,
    HealthCheck,
    KeyId,
    KillSwitch,
    Limits,
    ModelName,
    ModelPolicy,
    OrganizationId,
    OrganizationOverride,
    Place,
    Policy,
    Price,
    Problem,
    WeightedBackend,
)
from policies.nodes import Cursor, Fields, Node, Read, Scalar, attempt, each, fields_of, is_null, keyed
from policies.parse_limits import parse_limits
from policies.scalars import (
    boolean,
    duration_or_zero_s,
    duration_s,
    env_name,
    header_name,
    header_prefix,
    integer,
    name,
    price_micro_usd,
    request_path,
    text,
    uri,
)

T = TypeVar("T")

WEIGHT_MAX: Final = 1_000_000

_ABSENT_URI = BackendUri(scheme="http", host="absent.invalid", port=80, path_prefix="")
_DEFAULT_POLICY = DefaultPolicy()
_DEFAULT_BACKEND = Backend(id=BackendId(""), uri=_ABSENT_URI, place=Place(file="", line=0))
_DEFAULT_HEALTH_CHECK = HealthCheck(path="/")
_DEFAULT_CREDENTIAL = Credential()
_NO_NAMES: tuple[str, ...] = ()
_NO_LABELS: tuple[tuple[str, str], ...] = ()
_BACKEND_FIELDS = frozenset(
    {"id", "uri", "model_variant", "timeout", "health_check", "credential", "price", "labels", "reports_usage"}
)
_PRICE_FIELDS = frozenset({"input_usd_per_1k", "output_usd_per_1k", "cached_input_usd_per_1k", "reasoning_usd_per_1k"})
_LIST_SECTIONS = frozenset({"backends", "models", "organization_overrides", "kill_switches"})
_SINGLE_SECTIONS = frozenset({"default_policy", "limits"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What could be read, and what could not."""

    policy: Policy
    problems: tuple[Problem, ...]


def parse(roots: Iterable[Node], *, digest: str = "") -> Parsed:
    """Read the root nodes of all files: lists concatenate, other sections may be in one file only."""
    problems: list[Problem] = []
    sections = _sections(Cursor(node=root, path="", problems=problems) for root in roots)
    policy = Policy(
        backends=_listed(sections["backends"], _backend),
        default_policy=_single(sections["default_policy"], _default_policy, _DEFAULT_POLICY),
        models=_listed(sections["models"], _model),
        organization_overrides=_listed(sections["organization_overrides"], _override),
        kill_switches=_listed(sections["kill_switches"], _kill_switch),
        limits=_single(sections["limits"], parse_limits, Limits()),
        digest=digest,
    )
    return Parsed(policy=policy, problems=tuple(problems))


def parse_endpoints(written: str, *, file: str) -> tuple[tuple[Backend, ...], tuple[Problem, ...]]:
    """Backends of ``id1:uri1,id2:uri2``, every other field at its default."""
    problems: list[Problem] = []
    backends: dict[str, Backend] = {}
    for i, item in enumerate(written.split(",") if written.strip() else ()):
        backend_id, colon, written_uri = item.strip().partition(":")
        node = Scalar(text=written_uri, quoted=True, place=Place(file=file, line=1))
        at = Cursor(node=node, path=f"[{i}]", problems=problems)
        if not colon or not backend_id:
            at.fail("expected id:uri")
        elif backend_id in backends:
            at.fail(f"duplicate backend id {backend_id!r}")
        else:
            backends[backend_id] = Backend(id=BackendId(backend_id), uri=attempt(at, uri, _ABSENT_URI), place=at.place)
    return tuple(backends.values()), tuple(problems)


def _sections(files: Iterable[Cursor]) -> dict[str, list[Cursor]]:
    """Where each section occurs. An empty file or section says nothing."""
    sections: dict[str, list[Cursor]] = {name: [] for name in _LIST_SECTIONS | _SINGLE_SECTIONS}
    for file in files:
        if is_null(file.node):
            continue
        fields = attempt(file, _file, Fields(file, {}))
        for section, found in sections.items():
            at = fields.at(section)
            if at is not None and not is_null(at.node):
                found.append(at)
    return sections


def _file(at: Cursor) -> Fields:
    return fields_of(at, _LIST_SECTIONS | _SINGLE_SECTIONS)


def _listed(found: list[Cursor], read: Read[T | None]) -> tuple[T, ...]:
    no_items: tuple[T, ...] = ()
    return tuple(value for at in found for value in attempt(at, each(read), no_items))


def _single(found: list[Cursor], read: Read[T], default: T) -> T:
    for other in found[1:]:
        other.fail(f"may be in one file only; already in {found[0].place.file}:{found[0].place.line}")
    return attempt(found[0], read, default) if found else default


def _backend(at: Cursor) -> Backend | None:
    fields = fields_of(at, _BACKEND_FIELDS)
    backend = Backend(
        id=BackendId(fields.need("id", text, "")),
        uri=fields.need("uri", uri, _ABSENT_URI),
        model_variant=fields.get("model_variant", text, None),
        timeout_s=fields.get("timeout", duration_s, _DEFAULT_BACKEND.timeout_s),
        health_check=fields.get("health_check", _health_check, None),
        credential=fields.get("credential", _credential, None),
        price=fields.get("price", _price, None),
        labels=fields.get("labels", keyed(text, text), _NO_LABELS),
        reports_usage=fields.get("reports_usage", boolean, _DEFAULT_BACKEND.reports_usage),
        place=at.place,
    )
    return backend if backend.id else None


def _health_check(at: Cursor) -> HealthCheck:
    fields = fields_of(at, frozenset({"path", "interval", "timeout"}))
    return HealthCheck(
        path=fields.need("path", request_path, "/"),
        interval_s=fields.get("interval", duration_s, _DEFAULT_HEALTH_CHECK.interval_s),
        timeout_s=fields.get("timeout", duration_s, _DEFAULT_HEALTH_CHECK.timeout_s),
    )


def _credential(at: Cursor) -> Credential:
    fields = fields_of(at, frozenset({"env", "file", "header", "prefix"}))
    if (fields.at("env") is None) == (fields.at("file") is None):
        at.fail("needs exactly one of 'env' and 'file'")
    header = fields.get("header", header_name, _DEFAULT_CREDENTIAL.header)
    scheme = _DEFAULT_CREDENTIAL.prefix if header == _DEFAULT_CREDENTIAL.header else ""
    return Credential(
        env=fields.get("env", env_name, None),
        file=fields.get("file", text, None),
        header=header,
        prefix=fields.get("prefix", header_prefix, scheme),
    )


def _price(at: Cursor) -> Price:
    fields = fields_of(at, _PRICE_FIELDS)
    return Price(
        input_micro_usd_per_1k=fields.need("input_usd_per_1k", price_micro_usd, 0),
        output_micro_usd_per_1k=fields.need("output_usd_per_1k", price_micro_usd, 0),
        cached_input_micro_usd_per_1k=fields.get("cached_input_usd_per_1k", price_micro_usd, None),
        reasoning_micro_usd_per_1k=fields.get("reasoning_usd_per_1k", price_micro_usd, None),
    )


def _default_policy(at: Cursor) -> DefaultPolicy:
    fields = fields_of(at, frozenset({"failover_threshold", "ejection", "warmup_window"}))
    return DefaultPolicy(
        failover_threshold=fields.get("failover_threshold", integer(1, 1_000), _DEFAULT_POLICY.failover_threshold),
        ejection_s=fields.get("ejection", duration_s, _DEFAULT_POLICY.ejection_s),
        warmup_window_s=fields.get("warmup_window", duration_or_zero_s, _DEFAULT_POLICY.warmup_window_s),
    )


def _model(at: Cursor) -> ModelPolicy | None:
    fields = fields_of(
        at, frozenset({"model", "organization_id", "backends", "degraded_backends", "max_output_tokens"})
    )
    entry = ModelPolicy(
        model=ModelName(fields.need("model", name, "")),
        organization_id=OrganizationId(fields.get("organization_id", name, ANY)),
        backends=fields.need("backends", each(_weighted), ()),
        degraded_backends=frozenset(map(BackendId, fields.get("degraded_backends", each(text), _NO_NAMES))),
        max_output_tokens=fields.get("max_output_tokens", integer(1, OUTPUT_TOKENS_MAX), None),
        place=at.place,
    )
    return entry if entry.model else None


def _override(at: Cursor) -> OrganizationOverride | None:
    fields = fields_of(at, frozenset({"organization_id", "model", "backends", "reason"}))
    override = OrganizationOverride(
        organization_id=OrganizationId(fields.need("organization_id", name, "")),
        model=ModelName(fields.get("model", name, ANY)),
        backends=fields.need("backends", each(_weighted), ()),
        reason=fields.get("reason", text, ""),
        place=at.place,
    )
    return override if override.organization_id else None


def _weighted(at: Cursor) -> WeightedBackend | None:
    fields = fields_of(at, frozenset({"backend_id", "weight", "allow_list", "deny_list"}))
    weighted = WeightedBackend(
        backend_id=BackendId(fields.need("backend_id", text, "")),
        weight=fields.need("weight", integer(0, WEIGHT_MAX), 1),
        allow_list=frozenset(map(KeyId, fields.get("allow_list", each(name), _NO_NAMES))),
        deny_list=frozenset(map(KeyId, fields.get("deny_list", each(name), _NO_NAMES))),
        place=at.place,
    )
    return weighted if weighted.backend_id else None


def _kill_switch(at: Cursor) -> KillSwitch | None:
    fields = fields_of(at, frozenset({"backend_id", "enabled", "reason"}))
    switch = KillSwitch(
        backend_id=BackendId(fields.need("backend_id", text, "")),
        enabled=fields.need("enabled", boolean, False),
        reason=fields.get("reason", text, ""),
        place=at.place,
    )
    return switch if switch.backend_id else None
