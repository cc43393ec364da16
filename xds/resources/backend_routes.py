"""Routes of the internal listener: one virtual host for each backend, chosen by the backend header.

Here an attempt gets what is the backend's own: host, path prefix, model name and time limit.
"""

from __future__ import annotations

import json

from envoy_data_plane.envoy.config.route.v3 import (
    HeaderMatcher,
    RetryPolicy,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import LuaPerRoute
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from gateway import names
from gateway.settings import XdsSettings
from policies.model import Backend, Policy
from xds.resources.encode import seconds, struct
from xds.resources.filters import LUA

_NOT_FOR_BACKENDS = [
    names.HEADER_MODEL,
    names.HEADER_MODEL_SPAN,
    names.HEADER_BACKEND,
    names.HEADER_ENDPOINT,
    "accept-encoding",  # usage is read from the answer, and a compressed one cannot be read
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-envoy-internal",
    "x-envoy-external-address",
    "x-envoy-attempt-count",
    "x-envoy-expected-rq-timeout-ms",
]


def _action(backend: Backend) -> RouteAction:
    return RouteAction(
        cluster=names.backend_cluster(backend.id),
        host_rewrite_literal=backend.uri.authority,
        prefix_rewrite=f"{backend.uri.path_prefix}/" if backend.uri.path_prefix else "",
        # Never the route's own timeout: it would cut a stream that has begun.
        timeout=seconds(0),
        retry_policy=RetryPolicy(num_retries=0, per_try_timeout=seconds(backend.timeout_s)),
    )


def _routes(backend: Backend) -> list[Route]:
    plain = Route(match=RouteMatch(prefix="/"), route=_action(backend))
    if backend.model_variant is None:
        return [plain]
    own_name = HeaderMatcher(name=names.HEADER_MODEL, string_match=StringMatcher(exact=backend.model_variant))
    as_json = json.dumps(backend.model_variant)
    renamed = {LUA: Any.pack(LuaPerRoute(filter_context=struct({"model": as_json})))}
    return [
        Route(match=RouteMatch(prefix="/", headers=[own_name]), route=_action(backend)),
        Route(match=RouteMatch(prefix="/"), route=_action(backend), typed_per_filter_config=renamed),
    ]


def backend_routes(policy: Policy, settings: XdsSettings) -> RouteConfiguration:
    """Virtual hosts of all backends."""
    return RouteConfiguration(
        name=names.ROUTE_CONFIG_BACKENDS,
        vhost_header=names.HEADER_BACKEND,
        virtual_hosts=[
            VirtualHost(
                name=backend.id,
                domains=[backend.id],
                routes=_routes(backend),
                request_headers_to_remove=_NOT_FOR_BACKENDS,
                # A renamed body is held whole; without this an HTTP/2 stream may hold no more than its window.
                request_body_buffer_limit=settings.buffer_bytes,
            )
            for backend in sorted(policy.backends, key=lambda backend: backend.id)
        ],
    )
