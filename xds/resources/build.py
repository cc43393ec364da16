"""A policy as the complete set of Envoy resources, encoded. Pure but for the credentials it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import betterproto2

from gateway import names
from gateway.settings import SettingsError, XdsSettings
from policies.model import ModelName, Policy
from xds import snapshot
from xds.resources import backend_routes, clusters, endpoints, listeners, routes, secrets

Reference = tuple[str, str]
"""Type URL and name of a resource."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Encoded messages by type URL and name, and which other resources each one needs."""

    bodies: Mapping[str, Mapping[str, bytes]]
    references: Mapping[Reference, frozenset[Reference]]


class ResourceBuilder:
    """Builds resources and keeps the encoded bytes, because encoding one takes milliseconds.

    Resources are kept by the values they were made of, so that a policy edit encodes what it changed.
    """

    def __init__(self, settings: XdsSettings) -> None:
        self._settings = settings
        self._kept: dict[object, bytes] = {}
        self._used: dict[object, bytes] = {}

    def _encoded(self, key: object, make: Callable[[], betterproto2.Message]) -> bytes:
        body = self._kept.get(key)
        if body is None:
            body = bytes(make())
        self._used[key] = body
        return body

    def build(self, policy: Policy, credentials: Mapping[str, str]) -> Resources:
        """All resources of ``policy``.

        Raises:
            SettingsError: tracing or TLS settings cannot be used.
        """
        self._used = {}
        settings = self._settings
        models = routes.by_model(policy)
        bodies: dict[str, dict[str, bytes]] = {
            snapshot.SECRET: {
                names.credential_secret(backend_id): bytes(secrets.secret(backend_id, credential))
                for backend_id, credential in sorted(credentials.items())
            },
            snapshot.CLUSTER: self._clusters(policy),
            snapshot.ENDPOINTS: {
                names.backend_cluster(b.id): self._encoded(("endpoints", b), lambda b=b: endpoints.endpoints(b))  # type: ignore[misc]
                for b in policy.backends
                if endpoints.is_address(b.uri.host)
            },
            snapshot.LISTENER: {
                names.LISTENER_BACKENDS: self._encoded("backends", lambda: listeners.backends_listener(settings)),
                names.LISTENER_PUBLIC: self._encoded("public", lambda: listeners.public_listener(settings)),
            },
            snapshot.SCOPED_ROUTE: {
                names.model_routes(model): self._encoded(("scope", model), lambda model=model: routes.scope(model))  # type: ignore[misc]
                for model in [*models, names.SCOPE_UNROUTED]
            },
            snapshot.ROUTE: self._routes(policy, models),
        }
        self._kept = self._used
        return Resources(bodies=bodies, references=_references(policy, models))

    def _clusters(self, policy: Policy) -> dict[str, bytes]:
        settings, defaults = self._settings, policy.default_policy
        built = {
            names.CLUSTER_EXTPROC: self._encoded("extproc", lambda: clusters.extproc_cluster(settings)),
            names.CLUSTER_STATUS: self._encoded("status", lambda: clusters.status_cluster(settings)),
            names.CLUSTER_AUDIT: self._encoded("audit", lambda: clusters.audit_cluster(settings)),
            names.CLUSTER_UNROUTED: self._encoded("unrouted", clusters.unrouted_cluster),
            names.CLUSTER_USAGE: self._encoded("usage", lambda: clusters.usage_cluster(settings)),
        }
        if settings.otel_exporter_otlp_endpoint:
            built[names.CLUSTER_TRACING] = self._encoded("tracing", lambda: _tracing(settings))
        for backend in policy.backends:
            entry, own = names.entry_cluster(backend.id), names.backend_cluster(backend.id)
            built[entry] = self._encoded(("entry", backend.id), lambda b=backend: clusters.entry_cluster(b))  # type: ignore[misc]
            built[own] = self._encoded(
                ("backend", backend, defaults),
                lambda b=backend: clusters.backend_cluster(b, defaults, settings),  # type: ignore[misc]
            )
        return built

    def _routes(self, policy: Policy, models: Mapping[ModelName, Policy]) -> dict[str, bytes]:
        silent = not all(backend.reports_usage for backend in policy.backends)
        built = {
            names.ROUTE_CONFIG_BACKENDS: self._encoded(
                ("backend routes", policy.backends), lambda: backend_routes.backend_routes(policy, self._settings)
            ),
            names.model_routes(names.SCOPE_UNROUTED): self._encoded(
                ("unrouted routes", silent), lambda: routes.unrouted_routes(self._settings, silent=silent)
            ),
        }
        for model, part in models.items():
            built[names.model_routes(model)] = self._encoded(
                routes.what_decides(part, model),
                lambda model=model, part=part: routes.model_routes(part, model, self._settings),  # type: ignore[misc]
            )
        return built


def _tracing(settings: XdsSettings) -> betterproto2.Message:
    url = urlsplit(settings.otel_exporter_otlp_endpoint)
    if url.scheme != "http" or not url.hostname:
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT: {settings.otel_exporter_otlp_endpoint!r} is not of the form "
            "http://host:4317 (OTLP over gRPC without TLS; put a collector beside the router for anything else)"
        )
    return clusters.tracing_cluster(url.hostname, url.port or 4317)


def _references(policy: Policy, models: Mapping[ModelName, Policy]) -> dict[Reference, frozenset[Reference]]:
    def cluster(name: str) -> Reference:
        return (snapshot.CLUSTER, name)

    unrouted = names.model_routes(names.SCOPE_UNROUTED)
    own = frozenset(cluster(names.backend_cluster(b.id)) for b in policy.backends)
    needs: dict[Reference, frozenset[Reference]] = {
        (snapshot.ROUTE, names.ROUTE_CONFIG_BACKENDS): own,
        (snapshot.ROUTE, unrouted): frozenset(
            map(cluster, (names.CLUSTER_UNROUTED, names.CLUSTER_STATUS, names.CLUSTER_AUDIT))
        ),
        (snapshot.SCOPED_ROUTE, unrouted): frozenset({(snapshot.ROUTE, unrouted)}),
        (snapshot.LISTENER, names.LISTENER_PUBLIC): frozenset(
            {cluster(names.CLUSTER_EXTPROC), cluster(names.CLUSTER_USAGE)}
        ),
        (snapshot.LISTENER, names.LISTENER_BACKENDS): frozenset({(snapshot.ROUTE, names.ROUTE_CONFIG_BACKENDS)}),
    }
    for model, part in models.items():
        route = (snapshot.ROUTE, names.model_routes(model))
        needs[route] = frozenset(cluster(names.entry_cluster(b)) for b in routes.backends_of(part, model))
        needs[(snapshot.SCOPED_ROUTE, names.model_routes(model))] = frozenset({route})
    for backend in policy.backends:
        needed: set[Reference] = set()
        if endpoints.is_address(backend.uri.host):
            needed.add((snapshot.ENDPOINTS, names.backend_cluster(backend.id)))
        if backend.credential is not None:
            needed.add((snapshot.SECRET, names.credential_secret(backend.id)))
        needs[cluster(names.backend_cluster(backend.id))] = frozenset(needed)
    return needs
