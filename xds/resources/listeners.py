"""Listeners: where clients enter, and the internal hop that makes each attempt its own request.

Nothing here depends on a policy, because a changed listener drains every open connection.
"""

from __future__ import annotations

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLog,
    AccessLogFilter,
    AndFilter,
    ComparisonFilter,
    ComparisonFilterOp,
    LogTypeFilter,
    OrFilter,
    ResponseFlagFilter,
    StatusCodeFilter,
)
from envoy_data_plane.envoy.config.core.v3 import (
    ApiVersion,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    Http2ProtocolOptions,
    HttpProtocolOptions,
    HttpProtocolOptionsHeadersWithUnderscoresAction,
    RuntimeUInt32,
    SubstitutionFormatString,
)
from envoy_data_plane.envoy.config.listener.v3 import (
    Filter,
    FilterChain,
    Listener,
    ListenerInternalListenerConfig,
)
from envoy_data_plane.envoy.config.trace.v3 import OpenTelemetryConfig, TracingHttp
from envoy_data_plane.envoy.data.accesslog.v3 import AccessLogType
from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
from envoy_data_plane.envoy.extensions.access_loggers.grpc.v3 import (
    CommonGrpcAccessLogConfig,
    HttpGrpcAccessLogConfig,
)
from envoy_data_plane.envoy.extensions.access_loggers.stream.v3 import StdoutAccessLog
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerCodecType,
    HttpConnectionManagerHcmAccessLogOptions,
    HttpConnectionManagerPathWithEscapedSlashesAction,
    HttpConnectionManagerTracing,
    Rds,
    ScopedRds,
    ScopedRoutes,
    ScopedRoutesScopeKeyBuilder,
    ScopedRoutesScopeKeyBuilderFragmentBuilder,
    ScopedRoutesScopeKeyBuilderFragmentBuilderHeaderValueExtractor,
)
from envoy_data_plane.google.protobuf import Any

from gateway import names
from gateway.settings import JOURNAL, XdsSettings
from xds.resources.encode import ads, seconds, socket_address, struct
from xds.resources.filters import early_header_mutation, internal_filters, public_filters
from xds.resources.local_replies import internal_replies, public_replies

HCM = "envoy.filters.network.http_connection_manager"
STREAM_IDLE_S = 900.0
"""A stream without a byte for so long is over; reasoning models are silent for minutes."""
LEDGER_DELAY_S = 0.02
"""Until the ledger is told of a request's end: only then is its place among those allowed at once free again."""
PATH = "%PATH(NQ:ORIG_OR_PATH)%"
"""Without the query, which some clients put a key in. Envoy docs: "Access log format", PATH."""
_WHEN_ENDED = AccessLogFilter(log_type_filter=LogTypeFilter(types=[AccessLogType.DownstreamEnd]))


def log_of_requests() -> AccessLog:
    """One JSON object a request on Envoy's standard output."""
    usage, router = f"DYNAMIC_METADATA({names.USAGE_NAMESPACE}:", f"DYNAMIC_METADATA({names.METADATA_NAMESPACE}:"
    fields = {
        "timestamp": "%START_TIME%",
        "program": "envoy",
        "event": "request",
        "request_id": f"%REQ({names.HEADER_REQUEST_ID})%",
        "trace_id": "%TRACE_ID%",
        "method": "%REQ(:METHOD)%",
        "path": PATH,
        "status": "%RESPONSE_CODE%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "duration_ms": "%DURATION%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "backend": f"%RESP({names.HEADER_ROUTING_BACKEND})%",
        "decision": f"%RESP({names.HEADER_ROUTING_DECISION})%",
        "organization_id": f"%{router}{names.METADATA_ORGANIZATION})%",
        "api_key_id": f"%{router}{names.METADATA_KEY})%",
        "model": f"%{router}{names.METADATA_MODEL})%",
        "tokens_input": f"%{usage}tokens_input)%",
        "tokens_output": f"%{usage}tokens_output)%",
    }
    return AccessLog(
        name="envoy.access_loggers.stdout",
        filter=_WHEN_ENDED,
        typed_config=Any.pack(StdoutAccessLog(log_format=SubstitutionFormatString(json_format=struct(fields)))),
    )


def log_for_ledger(listener: str, only: AccessLogFilter | None = None) -> AccessLog:
    """What becomes of requests, to the ledger by gRPC.

    Nothing waits for the ledger: what it does not take is lost here, and found in the journal.
    """
    config = HttpGrpcAccessLogConfig(
        common_config=CommonGrpcAccessLogConfig(
            log_name=listener,
            grpc_service=GrpcService(
                envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=names.CLUSTER_USAGE, skip_envoy_headers=True)
            ),
            transport_api_version=ApiVersion.V3,
            buffer_flush_interval=seconds(LEDGER_DELAY_S),
        ),
        additional_response_headers_to_log=[names.HEADER_ROUTING_BACKEND, names.HEADER_ROUTING_DECISION],
    )
    return AccessLog(name="envoy.access_loggers.http_grpc", filter=only, typed_config=Any.pack(config))


def journal(settings: XdsSettings, listener: str, only: AccessLogFilter) -> AccessLog:
    """The same, a JSON line each, in a file that the ledger reads and removes."""
    metadata = (names.METADATA_NAMESPACE, names.LIMITS_NAMESPACE, names.USAGE_NAMESPACE, names.COUNTED_NAMESPACE)
    fields = {
        "listener": listener,
        "request_id": f"%REQ({names.HEADER_REQUEST_ID})%",
        "started": "%START_TIME(%s.%f)%",
        "duration_ms": "%DURATION%",
        "path": PATH,
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "body_bytes": "%BYTES_SENT%",
        "cluster": "%UPSTREAM_CLUSTER_RAW%",
        "backend": f"%RESP({names.HEADER_ROUTING_BACKEND})%",
        "decision": f"%RESP({names.HEADER_ROUTING_DECISION})%",
        **{namespace: f"%DYNAMIC_METADATA({namespace})%" for namespace in metadata},
    }
    return AccessLog(
        name="envoy.access_loggers.file",
        filter=only,
        typed_config=Any.pack(
            FileAccessLog(
                path=str(settings.state_path.absolute() / JOURNAL),
                log_format=SubstitutionFormatString(json_format=struct(fields), omit_empty_values=True),
            )
        ),
    )


def _failed() -> AccessLogFilter:
    """Requests that have ended without an answer below 400, or not as they should."""
    status = ComparisonFilter(
        op=ComparisonFilterOp.GE, value=RuntimeUInt32(default_value=400, runtime_key="router.failed_from")
    )
    bad = OrFilter(
        filters=[
            AccessLogFilter(status_code_filter=StatusCodeFilter(comparison=status)),
            AccessLogFilter(response_flag_filter=ResponseFlagFilter()),
        ]
    )
    return AccessLogFilter(and_filter=AndFilter(filters=[_WHEN_ENDED, AccessLogFilter(or_filter=bad)]))


def _tracing(settings: XdsSettings) -> HttpConnectionManagerTracing | None:
    if not settings.otel_exporter_otlp_endpoint:
        return None
    provider = OpenTelemetryConfig(
        grpc_service=GrpcService(
            envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=names.CLUSTER_TRACING), timeout=seconds(1)
        ),
        service_name=settings.service_name,
    )
    return HttpConnectionManagerTracing(
        provider=TracingHttp(name="envoy.tracers.opentelemetry", typed_config=Any.pack(provider)),
        spawn_upstream_span=True,
    )


def _scoped_routes() -> ScopedRoutes:
    fragment = ScopedRoutesScopeKeyBuilderFragmentBuilder(
        header_value_extractor=ScopedRoutesScopeKeyBuilderFragmentBuilderHeaderValueExtractor(
            name=names.HEADER_MODEL, index=0
        )
    )
    return ScopedRoutes(
        name="models",
        scope_key_builder=ScopedRoutesScopeKeyBuilder(fragments=[fragment]),
        rds_config_source=ads(),
        scoped_rds=ScopedRds(scoped_rds_config_source=ads()),
    )


def public_listener(settings: XdsSettings) -> Listener:
    """Where clients enter. Its routes are scoped by model, so that an edit pushes one model only."""
    manager = HttpConnectionManager(
        stat_prefix=names.LISTENER_PUBLIC,
        codec_type=HttpConnectionManagerCodecType.AUTO,
        scoped_routes=_scoped_routes(),
        http_filters=public_filters(),
        early_header_mutation_extensions=[early_header_mutation()],
        local_reply_config=public_replies(),
        access_log=[
            log_of_requests(),
            log_for_ledger(names.LISTENER_PUBLIC),
            journal(settings, names.LISTENER_PUBLIC, _WHEN_ENDED),
        ],
        access_log_options=HttpConnectionManagerHcmAccessLogOptions(
            access_log_flush_interval=seconds(settings.sign_of_life_s)
        ),
        tracing=_tracing(settings),
        use_remote_address=True,
        generate_request_id=True,
        always_set_request_id_in_response=True,
        normalize_path=True,
        merge_slashes=True,
        # Models have slashes in their names, and clients escape them in /v1/models/{id}.
        path_with_escaped_slashes_action=HttpConnectionManagerPathWithEscapedSlashesAction.KEEP_UNCHANGED,
        server_name=settings.service_name,
        request_headers_timeout=seconds(10),
        request_timeout=seconds(120),
        stream_idle_timeout=seconds(STREAM_IDLE_S),
        common_http_protocol_options=HttpProtocolOptions(
            idle_timeout=seconds(3600),
            headers_with_underscores_action=HttpProtocolOptionsHeadersWithUnderscoresAction.DROP_HEADER,
        ),
        http2_protocol_options=Http2ProtocolOptions(
            max_concurrent_streams=1000, initial_stream_window_size=1 << 20, initial_connection_window_size=16 << 20
        ),
    )
    return Listener(
        name=names.LISTENER_PUBLIC,
        address=socket_address(settings.http_host, settings.http_port),
        per_connection_buffer_limit_bytes=settings.buffer_bytes,
        filter_chains=[FilterChain(filters=[Filter(name=HCM, typed_config=Any.pack(manager))])],
    )


def backends_listener(settings: XdsSettings) -> Listener:
    """The internal listener that ``be_`` clusters lead to: one virtual host a backend."""
    manager = HttpConnectionManager(
        stat_prefix=names.LISTENER_BACKENDS,
        codec_type=HttpConnectionManagerCodecType.HTTP2,
        rds=Rds(config_source=ads(), route_config_name=names.ROUTE_CONFIG_BACKENDS),
        http_filters=internal_filters(),
        local_reply_config=internal_replies(),
        generate_request_id=False,
        # Of the attempts at backends those that failed; of the one that answered the public listener tells.
        access_log=[
            log_for_ledger(names.LISTENER_BACKENDS, _failed()),
            journal(settings, names.LISTENER_BACKENDS, _failed()),
        ],
        tracing=_tracing(settings),
        stream_idle_timeout=seconds(STREAM_IDLE_S),
        http2_protocol_options=Http2ProtocolOptions(
            initial_stream_window_size=1 << 20, initial_connection_window_size=16 << 20
        ),
    )
    return Listener(
        name=names.LISTENER_BACKENDS,
        internal_listener=ListenerInternalListenerConfig(),
        ignore_global_conn_limit=True,
        per_connection_buffer_limit_bytes=settings.buffer_bytes,
        filter_chains=[FilterChain(filters=[Filter(name=HCM, typed_config=Any.pack(manager))])],
    )
