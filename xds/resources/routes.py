"""Routes of the public listener: one scope and one route configuration for each model.

A model's route weighs its backends and moves on to an untried one when an attempt fails (design,
"weighted clusters that really fail over"). What each candidate is comes from ``policies.candidates``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from envoy_data_plane.envoy.config.core.v3 import DataSource, HeaderValueOption
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    HeaderMatcher,
    RetryPolicy,
    RetryPolicyRetryBackOff,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    ScopedRouteConfiguration,
    ScopedRouteConfigurationKey,
    ScopedRouteConfigurationKeyFragment,
    VirtualHost,
    WeightedCluster,
    WeightedClusterClusterWeight,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExtProcOverrides,
    ExtProcPerRoute,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from gateway import names
from gateway.endpoints import HEALTHZ_PATH, INFERENCE_PATH, MODELS_PATH, POST_ENDPOINTS, READYZ_PATH
from gateway.settings import VERSION, XdsSettings
from policies.candidates import Candidate, Entry, candidates_among, is_override, killed, resolve, variants
from policies.model import ANY, BackendId, ModelName, ModelPolicy, OrganizationId, Policy
from xds.resources.audit_routes import audit_routes
from xds.resources.encode import header, seconds
from xds.resources.filters import EXT_PROC

RETRY_ON = "5xx,connect-failure,reset,refused-stream,retriable-status-codes"
STATUS_TIMEOUT_S = 0.8
_OVERHEAD_US = f"{names.INTERNAL_HEADER_PREFIX}overhead-us"
"""Set by the route, turned into milliseconds by the virtual host, removed by the route configuration: Envoy evaluates
response headers in this order, and one level sees only what an earlier one has added."""
_UNDECIDED = RouteAction(cluster=names.CLUSTER_UNROUTED)
"""A cluster route, because only with one does Envoy honour request_body_buffer_limit."""
WEIGHT_TOTAL = 100_000_000
"""Weights are scaled to about this total, so that weight 1 is a share nobody is sent to first."""


def _exactly(name: str, value: str) -> HeaderMatcher:
    return HeaderMatcher(name=name, string_match=StringMatcher(exact=value))


def _absent(name: str) -> HeaderMatcher:
    return HeaderMatcher(name=name, present_match=True, invert_match=True)


def _response_headers(decision: str, avoided: tuple[BackendId, ...]) -> list[HeaderValueOption]:
    failover = f"%CEL(upstream.request_attempt_count > 1 ? 'FAILOVER' : '{decision}')%"
    backend = f"%CLUSTER_METADATA({names.METADATA_NAMESPACE}:{names.CLUSTER_METADATA_BACKEND_ID})%"
    headers = [
        header(names.HEADER_ROUTING_BACKEND, backend),
        header(names.HEADER_ROUTING_DECISION, failover),
        header(_OVERHEAD_US, "%COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%"),
        # Left out where ext_proc has said nothing of it.
        *(header(name, f"%DYNAMIC_METADATA({names.LIMITS_NAMESPACE}:{name})%") for name in names.RATE_LIMIT_HEADERS),
    ]
    if avoided:
        warning = f'299 {names.NODE_ID} "degraded backend avoided: {", ".join(avoided)}"'
        used = ", ".join(f"'{names.entry_cluster(backend_id)}'" for backend_id in avoided)
        # Empty, and so left out, where the last resort answered after all.
        headers.append(header(names.HEADER_WARNING, f"%CEL(xds.cluster_name in [{used}] ? '' : '{warning}')%"))
    return headers


def scaled_weights(among: tuple[Candidate, ...]) -> dict[BackendId, int]:
    """Envoy weights. A last resort (weight 0, or degraded while others are not) gets 1: tried, never chosen first."""
    preferred = {c.backend_id: c.weight for c in among if c.weight > 0 and c.standing == "normal"}
    if not preferred:
        preferred = {c.backend_id: c.weight or 1 for c in among}
    total = sum(preferred.values())
    return {c.backend_id: max(1, preferred.get(c.backend_id, 0) * WEIGHT_TOTAL // total) for c in among}


def _weighted(policy: Policy, among: tuple[Candidate, ...]) -> RouteAction:
    timeout_s = {backend.id: backend.timeout_s for backend in policy.backends}
    weights = scaled_weights(among)
    return RouteAction(
        weighted_clusters=WeightedCluster(
            clusters=[
                WeightedClusterClusterWeight(name=names.entry_cluster(backend_id), weight=weight)
                for backend_id, weight in weights.items()
            ]
        ),
        timeout=seconds(0),
        retry_policy=RetryPolicy(
            retry_on=RETRY_ON,
            retriable_status_codes=[429],
            num_retries=len(weights) - 1,
            # The inner route's own limit answers first; this one only guards against a bug.
            per_try_timeout=seconds(max(timeout_s[backend_id] for backend_id in weights) + 5),
            refresh_cluster_on_retry=True,
            retry_back_off=RetryPolicyRetryBackOff(base_interval=seconds(0.001), max_interval=seconds(0.002)),
        ),
    )


def _route(policy: Policy, entry: Entry, subset: frozenset[BackendId] | None, match: RouteMatch) -> Route:
    among = candidates_among(policy, entry, subset)
    if not among:
        return Route(match=match, direct_response=DirectResponseAction(status=503))
    degraded = tuple(sorted(c.backend_id for c in among if c.standing == "degraded"))
    avoided = degraded if len(degraded) < len(among) else ()
    decision = "OVERRIDE" if is_override(policy, entry, subset) else "PRIMARY"
    return Route(
        match=match, route=_weighted(policy, among), response_headers_to_add=_response_headers(decision, avoided)
    )


def _entry_routes(policy: Policy, entry: Entry, organization: OrganizationId | None) -> Iterator[Route]:
    of_organization = [_exactly(names.HEADER_ORGANIZATION, organization)] if organization else []
    for subset in variants(entry):
        of_variant = _exactly(names.HEADER_VARIANT, names.variant(subset))
        yield _route(policy, entry, subset, RouteMatch(prefix="/", headers=[*of_organization, of_variant]))
    plain = [*of_organization, _absent(names.HEADER_VARIANT)]
    yield _route(policy, entry, None, RouteMatch(prefix="/", headers=plain))
    if organization:
        # A variant this table does not know yet must not fall through to another organisation's routes.
        yield Route(
            match=RouteMatch(prefix="/", headers=of_organization), direct_response=DirectResponseAction(status=503)
        )


def _organizations(policy: Policy, model: ModelName) -> list[OrganizationId]:
    own = {m.organization_id for m in policy.models if m.model == model}
    overridden = {o.organization_id for o in policy.organization_overrides if o.model in (model, ANY)}
    return sorted((own | overridden) - {OrganizationId(ANY)})


def backends_of(policy: Policy, model: ModelName) -> frozenset[BackendId]:
    """Every backend that some route of the model leads to."""
    entries = (resolve(policy, o, model) for o in [*_organizations(policy, model), OrganizationId(ANY)])
    return frozenset(c.backend_id for entry in entries if entry for c in candidates_among(policy, entry, None))


def by_model(policy: Policy) -> dict[ModelName, Policy]:
    """For each model, sorted, the policy with this model's entries alone.

    What follows looks through all entries of a policy; with the whole one it would do so once for each model.
    """
    entries: dict[ModelName, list[ModelPolicy]] = {}
    for entry in policy.models:
        entries.setdefault(entry.model, []).append(entry)
    return {model: replace(policy, models=tuple(entries[model])) for model in sorted(entries)}


def what_decides(policy: Policy, model: ModelName) -> object:
    """The part of a policy that a model's routes are made of: equal values, equal routes."""
    overrides = tuple(o for o in policy.organization_overrides if o.model in (model, ANY))
    entries = tuple(m for m in policy.models if m.model == model)
    choices: tuple[Entry, ...] = (*entries, *overrides)
    used = {w.backend_id for w in chain.from_iterable(choice.backends for choice in choices)}
    timeouts = tuple(sorted((b.id, b.timeout_s) for b in policy.backends if b.id in used))
    return ("routes", entries, overrides, timeouts, killed(policy) & used)


def model_routes(policy: Policy, model: ModelName, settings: XdsSettings) -> RouteConfiguration:
    """The routes of one model: organisations of their own first, then everybody's."""
    routes: list[Route] = []
    for organization in [*_organizations(policy, model), None]:
        entry = resolve(policy, organization or OrganizationId(ANY), model)
        if entry is not None:
            routes += _entry_routes(policy, entry, organization)
    routes.append(Route(match=RouteMatch(prefix="/"), direct_response=DirectResponseAction(status=503)))
    host = VirtualHost(
        name=model,
        domains=["*"],
        routes=routes,
        request_headers_to_remove=[
            names.HEADER_AUTHORIZATION,
            names.HEADER_API_KEY,
            "proxy-authorization",
            "api-key",  # where clients made for other gateways repeat their key
            names.HEADER_SIGNATURE,
            names.HEADER_ORGANIZATION,
            names.HEADER_VARIANT,
            "cookie",
        ],
        response_headers_to_add=[
            header(names.HEADER_OVERHEAD_MS, f"%CEL(double(response.headers['{_OVERHEAD_US}']) / 1000.0)%")
        ],
        request_body_buffer_limit=settings.buffer_bytes,
    )
    return RouteConfiguration(
        name=names.model_routes(model), virtual_hosts=[host], response_headers_to_remove=[_OVERHEAD_US]
    )


def _answers_seen(body: ProcessingModeBodySendMode) -> dict[str, Any]:
    """Filter configuration of a route whose answers ext_proc sees too."""
    mode = ProcessingMode(
        request_header_mode=ProcessingModeHeaderSendMode.SEND,
        request_body_mode=ProcessingModeBodySendMode.BUFFERED,
        response_header_mode=ProcessingModeHeaderSendMode.SEND,
        response_body_mode=body,
        request_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
        response_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
    )
    return {EXT_PROC: Any.pack(ExtProcPerRoute(overrides=ExtProcOverrides(processing_mode=mode)))}


def unrouted_routes(settings: XdsSettings, *, silent: bool) -> RouteConfiguration:
    """Routes before ext_proc has chosen a model: which paths exist, and how ext_proc handles each.

    ``silent``: some backend reports no usage. Which one answers is known when it does, so ext_proc is told of all.
    """
    nothing = {EXT_PROC: Any.pack(ExtProcPerRoute(disabled=True))}
    get = [_exactly(":method", "GET")]
    alive = json.dumps({"status": "ok", "service": settings.service_name, "version": VERSION})
    routes = [
        *_inference_routes(silent=silent),
        Route(match=RouteMatch(path=MODELS_PATH, headers=get), route=_UNDECIDED),
        Route(match=RouteMatch(prefix=f"{MODELS_PATH}/", headers=get), route=_UNDECIDED),
        *audit_routes(),
        Route(
            match=RouteMatch(path=READYZ_PATH, headers=get),
            route=RouteAction(cluster=names.CLUSTER_STATUS, timeout=seconds(STATUS_TIMEOUT_S)),
            typed_per_filter_config=nothing,
        ),
        Route(
            match=RouteMatch(path=HEALTHZ_PATH, headers=get),
            direct_response=DirectResponseAction(status=200, body=DataSource(inline_string=alive)),
            response_headers_to_add=[header("content-type", "application/json")],
            typed_per_filter_config=nothing,
        ),
        Route(
            match=RouteMatch(prefix="/"),
            direct_response=DirectResponseAction(status=404),
            typed_per_filter_config=nothing,
        ),
    ]
    host = VirtualHost(name="unrouted", domains=["*"], routes=routes, request_body_buffer_limit=settings.buffer_bytes)
    return RouteConfiguration(name=names.model_routes(names.SCOPE_UNROUTED), virtual_hosts=[host])


def _inference_routes(*, silent: bool) -> Iterator[Route]:
    translated = _answers_seen(ProcessingModeBodySendMode.BUFFERED)
    # An answer that may be asked for again is kept while it passes, part by part.
    kept = _answers_seen(ProcessingModeBodySendMode.STREAMED)
    # Their headers tell ext_proc which backend has answered; it asks for the body where it has to count.
    plain = _answers_seen(ProcessingModeBodySendMode.NONE) if silent else {}
    with_key = HeaderMatcher(name=names.HEADER_IDEMPOTENCY_KEY, present_match=True)
    for endpoint in POST_ENDPOINTS:
        method = _exactly(":method", endpoint.method)
        inference = endpoint.path == INFERENCE_PATH
        if not inference:
            yield Route(
                match=RouteMatch(path=endpoint.path, headers=[method, with_key]),
                route=_UNDECIDED,
                typed_per_filter_config=kept,
            )
        yield Route(
            match=RouteMatch(path=endpoint.path, headers=[method]),
            route=_UNDECIDED,
            typed_per_filter_config=translated if inference else plain,
        )


def scope(model: str) -> ScopedRouteConfiguration:
    """Which route configuration a value of the model header leads to."""
    return ScopedRouteConfiguration(
        name=names.model_routes(model),
        route_configuration_name=names.model_routes(model),
        key=ScopedRouteConfigurationKey(fragments=[ScopedRouteConfigurationKeyFragment(string_key=model)]),
    )
