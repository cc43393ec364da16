"""HTTP filters of the two listeners, in the order a request meets them."""

from __future__ import annotations

from functools import cache
from importlib import resources

from envoy_data_plane.envoy.config.common.mutation_rules.v3 import (
    HeaderMutation,
    HeaderMutationRemoveOnMatch,
    HeaderMutationRules,
)
from envoy_data_plane.envoy.config.core.v3 import (
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    RetryPolicy,
    RetryPolicyRetryHostPredicate,
    TypedExtensionConfig,
)
from envoy_data_plane.envoy.extensions.content_parsers.json.v3 import JsonContentParser, JsonContentParserRuleConfig
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    ExternalProcessorRouteCacheAction,
    HeaderForwardingRules,
    MetadataOptions,
    MetadataOptionsMetadataNamespaces,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.json_to_metadata.v3 import (
    JsonToMetadata,
    JsonToMetadataKeyValuePair,
    JsonToMetadataMatchRules,
    JsonToMetadataRule,
    JsonToMetadataSelector,
    JsonToMetadataValueType,
)
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.http.sse_to_metadata.v3 import (
    SseToMetadata,
    SseToMetadataProcessingRules,
)
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyHeaderMutation,
)
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import ListStringMatcher, RegexMatcher, StringMatcher
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Any

from gateway import names
from gateway.answer_usage import USAGE_PATHS
from gateway.endpoints import Kind
from gateway.errors import REFUSALS, Reason
from xds.resources.encode import extension, header, http_filter, seconds
from xds.resources.local_replies import backend_errors, error_body

EXT_PROC = "envoy.filters.http.ext_proc"
LUA = "envoy.filters.http.lua"
CUSTOM_RESPONSE = "envoy.filters.http.custom_response"
ROUTER = "envoy.filters.http.router"
MAX_EVENT_BYTES = 1024 * 1024


@cache
def script(name: str) -> str:
    """A Lua script with the names that it shares with the other programs filled in."""
    source = (resources.files("xds.resources") / "lua" / name).read_text()
    error = error_body(Reason.BACKEND_ERROR, openai=True, trace_id="")
    for mark, text in {
        "@NAMESPACE@": names.METADATA_NAMESPACE,
        "@STREAM@": names.METADATA_STREAM,
        "@STRIP_USAGE@": names.METADATA_STRIP_USAGE,
        "@USAGE_NAMESPACE@": names.USAGE_NAMESPACE,
        "@EVENTS@": names.METADATA_EVENTS,
        "@ENDPOINT@": names.METADATA_ENDPOINT,
        "@RESPONSE@": Kind.RESPONSE.value,
        "@MODEL_SPAN@": names.HEADER_MODEL_SPAN,
        "@ERROR_EVENT@": f"data: {error}\\n\\n".replace("'", "\\'"),
    }.items():
        source = source.replace(mark, text)
    return source


def early_header_mutation() -> TypedExtensionConfig:
    """Removes what only the router may say, before any route is chosen."""
    forbidden = (names.INTERNAL_HEADER_PREFIX, "x-envoy-")
    return extension(
        "envoy.http.early_header_mutation.header_mutation",
        EarlyHeaderMutation(
            mutations=[
                *(
                    HeaderMutation(
                        remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix))
                    )
                    for prefix in forbidden
                ),
                HeaderMutation(remove=names.HEADER_REQUEST_ID),
                HeaderMutation(append=header(names.HEADER_MODEL, names.SCOPE_UNROUTED)),
            ]
        ),
    )


def _workers() -> GrpcService:
    return GrpcService(
        envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=names.CLUSTER_EXTPROC, skip_envoy_headers=True),
        retry_policy=RetryPolicy(
            retry_on="connect-failure,refused-stream,reset-before-request",
            num_retries=2,
            # Not the dead worker again, which load balancing would offer until its health check has failed.
            retry_host_predicate=[
                RetryPolicyRetryHostPredicate(
                    name="envoy.retry_host_predicates.previous_hosts",
                    typed_config=Any.pack(PreviousHostsPredicate()),
                )
            ],
            host_selection_retry_max_attempts=5,
        ),
    )


def ext_proc() -> HttpFilter:
    """Two messages a request: headers, then the whole body. Fails closed.

    Of answers a route may have it see the headers, on which it says whether it is to see the body too.

    Envoy docs: "External Processing".
    """
    return http_filter(
        EXT_PROC,
        ExternalProcessor(
            grpc_service=_workers(),
            processing_mode=ProcessingMode(
                request_header_mode=ProcessingModeHeaderSendMode.SEND,
                request_body_mode=ProcessingModeBodySendMode.BUFFERED,
                response_header_mode=ProcessingModeHeaderSendMode.SKIP,
                response_body_mode=ProcessingModeBodySendMode.NONE,
                request_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
                response_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
            ),
            message_timeout=seconds(5),
            status_on_error=HttpStatus(code=StatusCode(REFUSALS[Reason.SERVICE_DOWN].status)),
            failure_mode_allow=False,
            allow_mode_override=True,
            mutation_rules=HeaderMutationRules(allow_all_routing=True),
            metadata_options=MetadataOptions(
                receiving_namespaces=MetadataOptionsMetadataNamespaces(
                    untyped=[names.METADATA_NAMESPACE, names.LIMITS_NAMESPACE, names.COUNTED_NAMESPACE]
                )
            ),
            forward_rules=HeaderForwardingRules(
                allowed_headers=ListStringMatcher(
                    patterns=[StringMatcher(exact=name) for name in names.FORWARDED_HEADERS]
                )
            ),
            route_cache_action=ExternalProcessorRouteCacheAction.DEFAULT,
        ),
    )


def _usage_rule(path: tuple[str, ...], key: str) -> JsonToMetadataRule:
    return JsonToMetadataRule(
        selectors=[JsonToMetadataSelector(key=step) for step in path],
        on_present=JsonToMetadataKeyValuePair(
            metadata_namespace=names.USAGE_NAMESPACE, key=key, type=JsonToMetadataValueType.NUMBER
        ),
    )


def usage_of_streams() -> HttpFilter:
    """Token counts out of SSE events into dynamic metadata; the last event that has them wins."""
    rules = [JsonContentParserRuleConfig(rule=_usage_rule(path, key)) for path, key in USAGE_PATHS]
    return http_filter(
        "envoy.filters.http.sse_to_metadata",
        SseToMetadata(
            response_rules=SseToMetadataProcessingRules(
                content_parser=extension("envoy.content_parsers.json", JsonContentParser(rules=rules)),
                max_event_size=MAX_EVENT_BYTES,
            )
        ),
    )


def usage_of_json() -> HttpFilter:
    """Token counts out of a JSON answer into dynamic metadata."""
    return http_filter(
        "envoy.filters.http.json_to_metadata",
        JsonToMetadata(
            response_rules=JsonToMetadataMatchRules(
                rules=[_usage_rule(path, key) for path, key in USAGE_PATHS],
                allow_content_types_regex=RegexMatcher(regex="(?i)application/json.*"),
            )
        ),
    )


def lua(source: str, *, disabled: bool = False) -> HttpFilter:
    """A Lua script as a filter."""
    return http_filter(LUA, Lua(default_source_code=DataSource(inline_string=script(source))), disabled=disabled)


def router() -> HttpFilter:
    """The router filter, last in every chain."""
    return http_filter(ROUTER, Router(suppress_envoy_headers=True))


def public_filters() -> list[HttpFilter]:
    """Filters of the public listener; a response meets them in reverse order.

    So usage is read before Lua takes its event out. Lua comes after ext_proc on the way back: where it changes a chunk
    while ext_proc still holds the headers, Envoy gives the answer that chunk's length.
    """
    return [lua("strip_usage.lua"), ext_proc(), usage_of_streams(), usage_of_json(), router()]


def internal_filters() -> list[HttpFilter]:
    """Filters of the internal listener: one attempt at one backend."""
    return [
        http_filter(CUSTOM_RESPONSE, backend_errors()),
        lua("rename_model.lua", disabled=True),
        router(),
    ]
