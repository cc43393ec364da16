"""Routes of the public listener to the ledger: receipts and audit events. ext_proc says for whom it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from envoy_data_plane.envoy.config.route.v3 import (
    HeaderMatcher,
    RetryPolicy,
    RetryPolicyRetryBackOff,
    Route,
    RouteAction,
    RouteMatch,
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
from gateway.endpoints import AUDIT_PATH
from xds.resources.encode import header, seconds
from xds.resources.filters import EXT_PROC

TIMEOUT_S = 5.0
_SECRET_HEADERS = [
    names.HEADER_AUTHORIZATION,
    names.HEADER_API_KEY,
    names.HEADER_SIGNATURE,
    "proxy-authorization",
    "api-key",
    "cookie",
]


def audit_routes() -> Iterator[Route]:
    """These paths and no others: the ledger's server has some that are for the machine's operator alone."""
    get = [HeaderMatcher(name=":method", string_match=StringMatcher(exact="GET"))]
    headers_alone = ProcessingMode(
        request_header_mode=ProcessingModeHeaderSendMode.SEND,
        request_body_mode=ProcessingModeBodySendMode.NONE,
        response_header_mode=ProcessingModeHeaderSendMode.SKIP,
        response_body_mode=ProcessingModeBodySendMode.NONE,
        request_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
        response_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
    )
    per_route = ExtProcPerRoute(overrides=ExtProcOverrides(processing_mode=headers_alone))
    for match in (RouteMatch(path=AUDIT_PATH, headers=get), RouteMatch(prefix=f"{AUDIT_PATH}/", headers=get)):
        yield Route(
            match=match,
            route=RouteAction(
                cluster=names.CLUSTER_AUDIT,
                timeout=seconds(TIMEOUT_S),
                # A connection that the ledger has closed because it was idle is no reason to fail.
                retry_policy=RetryPolicy(
                    retry_on="connect-failure,reset",
                    num_retries=1,
                    retry_back_off=RetryPolicyRetryBackOff(base_interval=seconds(0.001), max_interval=seconds(0.002)),
                ),
            ),
            request_headers_to_remove=list(_SECRET_HEADERS),
            response_headers_to_add=[header(*names.NO_STORE)],
            typed_per_filter_config={EXT_PROC: Any.pack(per_route)},
        )
