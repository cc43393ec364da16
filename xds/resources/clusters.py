"""Clusters: ``be_`` entries that a model's route weighs, ``bk_`` clusters with the real endpoints, and the programs."""

from __future__ import annotations

from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterCommonLbConfig,
    ClusterDiscoveryType,
    ClusterDnsLookupFamily,
    ClusterEdsClusterConfig,
    OutlierDetection,
)
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation, HeaderMutationRemoveOnMatch
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    EnvoyInternalAddress,
    HealthCheck,
    HealthCheckGrpcHealthCheck,
    HealthCheckHttpHealthCheck,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    TransportSocket,
)
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.extensions.filters.http.credential_injector.v3 import CredentialInjector
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import HeaderMutation as HeaderMutationFilter
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import Mutations
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.http.injected_credentials.generic.v3 import Generic
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import SdsSecretConfig
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions,
    HttpProtocolOptionsExplicitHttpConfig,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.envoy.type.v3 import Percent
from envoy_data_plane.google.protobuf import Any

from gateway import names
from gateway.settings import AUDIT_SOCKET, STATUS_SOCKET, USAGE_SOCKET, XdsSettings
from policies.model import Backend, DefaultPolicy
from policies.model import HealthCheck as BackendHealthCheck
from xds.resources.encode import ads, extension, header, http_filter, metadata, pipe_address, seconds, socket_address
from xds.resources.endpoints import assignment, endpoints, is_address
from xds.resources.tls import upstream_tls

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNLIMITED = 1_000_000_000

# What a backend may not say to a client, or to the public listener.
_FOREIGN_PREFIXES = (names.INTERNAL_HEADER_PREFIX, "x-routing-", "x-ratelimit-", "x-envoy-")
_FOREIGN_HEADERS = (
    names.HEADER_REQUEST_ID,
    names.HEADER_WARNING,
    names.HEADER_IDEMPOTENT_REPLAY,
    "set-cookie",
    "openai-organization",
    "alt-svc",
)


def _http1() -> HttpProtocolOptionsExplicitHttpConfig:
    return HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=Http1ProtocolOptions())


def _http2() -> HttpProtocolOptionsExplicitHttpConfig:
    options = Http2ProtocolOptions(initial_stream_window_size=1 << 20, initial_connection_window_size=16 << 20)
    return HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=options)


def _protocol(http: HttpProtocolOptionsExplicitHttpConfig, *filters: HttpFilter) -> dict[str, Any]:
    chain = [*filters, http_filter("envoy.filters.http.upstream_codec", UpstreamCodec())] if filters else []
    return {_HTTP_OPTIONS: Any.pack(HttpProtocolOptions(explicit_http_config=http, http_filters=chain))}


def _wide_open() -> CircuitBreakers:
    """Nothing here may limit: max_retries of the first cluster picked would stop failover at 3."""
    return CircuitBreakers(
        thresholds=[
            CircuitBreakersThresholds(
                max_connections=_UNLIMITED,
                max_pending_requests=_UNLIMITED,
                max_requests=_UNLIMITED,
                max_retries=_UNLIMITED,
            )
        ]
    )


def entry_cluster(backend: Backend) -> Cluster:
    """``be_<id>``: the way into the internal listener, naming the backend."""
    name = names.entry_cluster(backend.id)
    address = Address(
        envoy_internal_address=EnvoyInternalAddress(
            server_listener_name=names.LISTENER_BACKENDS, endpoint_id=backend.id
        )
    )
    names_backend = http_filter(
        "envoy.filters.http.header_mutation",
        HeaderMutationFilter(
            mutations=Mutations(request_mutations=[HeaderMutation(append=header(names.HEADER_BACKEND, backend.id))])
        ),
    )
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(1),
        load_assignment=assignment(name, address),
        typed_extension_protocol_options=_protocol(_http2(), names_backend),
        metadata=metadata(names.METADATA_NAMESPACE, {names.CLUSTER_METADATA_BACKEND_ID: backend.id}),
        circuit_breakers=_wide_open(),
    )


def _outlier_detection(defaults: DefaultPolicy) -> OutlierDetection:
    return OutlierDetection(
        consecutive_5xx=defaults.failover_threshold,
        enforcing_consecutive_5xx=100,
        consecutive_gateway_failure=defaults.failover_threshold,
        enforcing_consecutive_gateway_failure=100,
        enforcing_success_rate=0,
        enforcing_failure_percentage=0,
        interval=seconds(min(1.0, defaults.ejection_s / 4)),
        base_ejection_time=seconds(defaults.ejection_s),
        max_ejection_time=seconds(defaults.ejection_s * 10),
        max_ejection_percent=100,
        always_eject_one_host=True,
        # Else a passing /health would bring a failing backend back at once.
        successful_active_health_check_uneject_host=False,
    )


def _health_check(check: BackendHealthCheck, authority: str) -> HealthCheck:
    interval = seconds(check.interval_s)
    return HealthCheck(
        timeout=seconds(check.timeout_s),
        interval=interval,
        no_traffic_interval=interval,
        no_traffic_healthy_interval=interval,
        unhealthy_threshold=2,
        healthy_threshold=1,
        http_health_check=HealthCheckHttpHealthCheck(host=authority, path=check.path),
    )


def _upstream_filters(backend: Backend) -> list[HttpFilter]:
    mutations = [
        HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)))
        for prefix in _FOREIGN_PREFIXES
    ]
    mutations += [HeaderMutation(remove=name) for name in _FOREIGN_HEADERS]
    filters = [
        http_filter(
            "envoy.filters.http.header_mutation",
            HeaderMutationFilter(mutations=Mutations(response_mutations=mutations)),
        )
    ]
    if backend.credential is not None:
        secret = SdsSecretConfig(name=names.credential_secret(backend.id), sds_config=ads())
        generic = Generic(credential=secret, header=backend.credential.header)
        filters.append(
            http_filter(
                "envoy.filters.http.credential_injector",
                CredentialInjector(
                    overwrite=True,
                    allow_request_without_credential=False,
                    credential=extension("envoy.http.injected_credentials.generic", generic),
                ),
            )
        )
    return filters


def backend_cluster(backend: Backend, defaults: DefaultPolicy, settings: XdsSettings) -> Cluster:
    """``bk_<id>``: the real endpoints.

    Its bytes change only with what the policy says of this backend, because an update resets ejections.
    """
    name = names.backend_cluster(backend.id)
    by_address = is_address(backend.uri.host)
    tls: TransportSocket | None = upstream_tls(backend.uri, settings) if backend.uri.scheme == "https" else None
    checks = [_health_check(backend.health_check, backend.uri.authority)] if backend.health_check else []
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.EDS if by_address else ClusterDiscoveryType.STRICT_DNS,
        eds_cluster_config=ClusterEdsClusterConfig(eds_config=ads()) if by_address else None,
        load_assignment=None if by_address else endpoints(backend),
        # DNS is asked every 5 s whatever the records' TTL: Docker's is ten minutes, and a backend may move.
        respect_dns_ttl=False,
        # By itself Envoy takes IPv6 first, and then never tries IPv4: localhost would mean ::1 alone.
        dns_lookup_family=ClusterDnsLookupFamily.V4_PREFERRED,
        connect_timeout=seconds(min(2.0, backend.timeout_s)),
        transport_socket=tls,
        health_checks=checks,
        outlier_detection=_outlier_detection(defaults),
        common_lb_config=ClusterCommonLbConfig(healthy_panic_threshold=Percent(value=0)),
        circuit_breakers=_wide_open(),
        typed_extension_protocol_options=_protocol(_http1(), *_upstream_filters(backend)),
    )


def extproc_cluster(settings: XdsSettings) -> Cluster:
    """The ext_proc workers, each on its own unix socket; a dead one gets no traffic."""
    name = names.CLUSTER_EXTPROC
    sockets = [
        pipe_address(str(settings.run_dir.absolute() / settings.worker_socket(worker)))
        for worker in range(settings.extproc_workers)
    ]
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(0.5),
        load_assignment=assignment(name, *sockets),
        typed_extension_protocol_options=_protocol(_http2()),
        circuit_breakers=_wide_open(),
        common_lb_config=ClusterCommonLbConfig(healthy_panic_threshold=Percent(value=0)),
        health_checks=[_serving(names.EXTPROC_SERVICE)],
    )


def usage_cluster(settings: XdsSettings) -> Cluster:
    """The ledger. One that is not well is tried all the same: the sooner it is back, the less of the log is lost."""
    name = names.CLUSTER_USAGE
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(0.5),
        load_assignment=assignment(name, pipe_address(str(settings.run_dir.absolute() / USAGE_SOCKET))),
        typed_extension_protocol_options=_protocol(_http2()),
        health_checks=[_serving(names.ACCESS_LOG_SERVICE)],
    )


def _serving(service: str) -> HealthCheck:
    """Asks a program of ours by gRPC whether it serves, more often while it does not."""
    return HealthCheck(
        timeout=seconds(1),
        interval=seconds(1),
        no_traffic_interval=seconds(1),
        unhealthy_edge_interval=seconds(0.2),
        unhealthy_interval=seconds(0.25),
        unhealthy_threshold=1,
        healthy_threshold=1,
        grpc_health_check=HealthCheckGrpcHealthCheck(service_name=service),
    )


def status_cluster(settings: XdsSettings) -> Cluster:
    """The status server of the ext_proc supervisor, beside its workers."""
    name = names.CLUSTER_STATUS
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(0.5),
        load_assignment=assignment(name, pipe_address(str(settings.run_dir.absolute() / STATUS_SOCKET))),
        typed_extension_protocol_options=_protocol(_http1()),
    )


def audit_cluster(settings: XdsSettings) -> Cluster:
    """The ledger's HTTP server. It has more to do than to answer: not many ask at once, the others are turned away."""
    name = names.CLUSTER_AUDIT
    few = CircuitBreakersThresholds(max_connections=16, max_pending_requests=64, max_requests=64, max_retries=16)
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(0.5),
        load_assignment=assignment(name, pipe_address(str(settings.run_dir.absolute() / AUDIT_SOCKET))),
        typed_extension_protocol_options=_protocol(_http1()),
        circuit_breakers=CircuitBreakers(thresholds=[few]),
    )


def unrouted_cluster() -> Cluster:
    """No endpoints: nothing is sent anywhere before ext_proc has decided."""
    name = names.CLUSTER_UNROUTED
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(1),
        load_assignment=ClusterLoadAssignment(cluster_name=name),
    )


def tracing_cluster(host: str, port: int) -> Cluster:
    """Where Envoy sends its spans by OTLP over gRPC."""
    name = names.CLUSTER_TRACING
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STATIC if is_address(host) else ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=seconds(1),
        load_assignment=assignment(name, socket_address(host, port)),
        typed_extension_protocol_options=_protocol(_http2()),
    )
