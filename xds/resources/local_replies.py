"""What Envoy answers by itself, in the error format of the contract.

The public listener answers for failures before a backend is involved. The internal listener answers for
one attempt at one backend: its replies, and a backend's own 5xx, 401, 402, 403 and 429, become a JSON error
that names no backend, and the public listener's route tries the next backend on them.

Envoy docs: "Local reply modification", "Custom Response Filter".
"""

from __future__ import annotations

from collections.abc import Iterator

import betterproto2
from envoy_data_plane.envoy.config.accesslog.v3 import AccessLogFilter, ExtensionFilter
from envoy_data_plane.envoy.config.core.v3 import DataSource, SubstitutionFormatString
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.filters.http.custom_response.v3 import CustomResponse
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    LocalReplyConfig,
    ResponseMapper,
)
from envoy_data_plane.envoy.extensions.http.custom_response.local_response_policy.v3 import LocalResponsePolicy
from envoy_data_plane.envoy.type.matcher.v3 import (
    HttpResponseHeaderMatchInput,
    HttpResponseLocalReplyMatchInput,
    HttpResponseStatusCodeClassMatchInput,
    HttpResponseStatusCodeMatchInput,
)
from envoy_data_plane.google.protobuf import Any
from envoy_data_plane.xds.core.v3 import TypedExtensionConfig
from envoy_data_plane.xds.type.matcher.v3 import (
    Matcher,
    MatcherMatcherList,
    MatcherMatcherListFieldMatcher,
    MatcherMatcherListPredicate,
    MatcherMatcherListPredicatePredicateList,
    MatcherMatcherListPredicateSinglePredicate,
    MatcherOnMatch,
    StringMatcher,
)

from gateway import names
from gateway.endpoints import AUDIT_PATH, OPENAI_PREFIXES, STATUS_PREFIX
from gateway.errors import REFUSALS, Reason, openai_body, router_body
from xds.resources.encode import header

JSON = "application/json"

# Evaluated in order; the first expression that holds decides. Attributes: Envoy docs, "Attributes".
_PUBLIC: tuple[tuple[str, Reason], ...] = (
    ("response.code == 413", Reason.BODY_TOO_LARGE),
    ("response.code == 408", Reason.REQUEST_TIMEOUT),
    ("response.code == 404", Reason.PATH_UNKNOWN),
    *(
        (f"response.code == 504 && request.path.startsWith('{prefix}')", Reason.SERVICE_DOWN)
        for prefix in (STATUS_PREFIX, AUDIT_PATH)
    ),
    ("response.code == 504", Reason.BACKEND_TIMEOUT),
    ("response.code == 503 && response.code_details == 'direct_response'", Reason.NO_BACKEND),
    # A JSON answer is held until its usage has been read, and this one is larger than the buffers.
    ("response.code_details == 'response_payload_too_large'", Reason.BACKEND_ERROR),
    # It was held, and its end never came.
    ("response.code_details.startsWith('upstream_reset_after_response_started')", Reason.BACKEND_ERROR),
    ("response.code >= 500", Reason.SERVICE_DOWN),
    ("response.code >= 400", Reason.MALFORMED_REQUEST),
)
_INTERNAL: tuple[tuple[str, Reason], ...] = (
    ("response.code == 504", Reason.BACKEND_TIMEOUT),
    ("response.code_details == 'no_healthy_upstream'", Reason.NO_BACKEND),
    ("response.code_details == 'cluster_not_found'", Reason.NO_BACKEND),
    ("response.code_details.contains('overflow')", Reason.BACKEND_BUSY),
    ("response.code >= 400", Reason.BACKEND_ERROR),
)


def _when(expression: str) -> AccessLogFilter:
    return AccessLogFilter(
        extension_filter=ExtensionFilter(
            name="envoy.access_loggers.extension_filters.cel",
            typed_config=Any.pack(ExpressionFilter(expression=expression)),
        )
    )


def error_body(reason: Reason, *, openai: bool, trace_id: str) -> str:
    """JSON text of a refusal in the format of the endpoint."""
    refusal = REFUSALS[reason]
    if openai:
        return openai_body(message=refusal.text, kind=refusal.openai_type, code=refusal.openai_code).decode()
    return router_body(code=refusal.code, text=refusal.text, trace_id=trace_id).decode()


def _format(reason: Reason, *, openai: bool, trace_id: str) -> SubstitutionFormatString:
    body = error_body(reason, openai=openai, trace_id=trace_id)
    return SubstitutionFormatString(text_format_source=DataSource(inline_string=body), content_type=JSON)


def _mapper(expression: str, reason: Reason, *, openai: bool, trace_id: str) -> ResponseMapper:
    return ResponseMapper(
        filter=_when(expression),
        status_code=REFUSALS[reason].status,
        body_format_override=_format(reason, openai=openai, trace_id=trace_id),
    )


def _unread_mappers() -> Iterator[ResponseMapper]:
    """Answers to what could not be read as a request, and so has got no id: it gets one here."""
    unread = f"!('{names.HEADER_REQUEST_ID}' in request.headers)"
    its_id = f"%RESP({names.HEADER_REQUEST_ID})%"
    for expression, reason in (
        ("response.code == 408", Reason.REQUEST_TIMEOUT),
        ("response.code >= 400", Reason.MALFORMED_REQUEST),
    ):
        mapper = _mapper(f"{unread} && {expression}", reason, openai=False, trace_id=its_id)
        mapper.headers_to_add = [header(names.HEADER_REQUEST_ID, "%UNIQUE_ID%")]
        yield mapper


def _public_mappers(trace_id: str) -> Iterator[ResponseMapper]:
    yield from _unread_mappers()
    decided = f"response.code_details.contains('{names.DECIDED_DETAILS}')"
    openai_path = " || ".join(f"request.path.startsWith('{prefix}')" for prefix in OPENAI_PREFIXES)
    # /v1/inference becomes an OpenAI path once it is decided.
    is_openai = f"!('{names.HEADER_ENDPOINT}' in request.headers) && ({openai_path})"
    for expression, reason in _PUBLIC:
        yield _mapper(f"!{decided} && {expression} && ({is_openai})", reason, openai=True, trace_id=trace_id)
        yield _mapper(f"!{decided} && {expression}", reason, openai=False, trace_id=trace_id)


def public_replies() -> LocalReplyConfig:
    """Local replies of the public listener.

    Their trace id is the request id, which spans carry too: Envoy has no span at hand where it formats them.
    """
    return LocalReplyConfig(mappers=list(_public_mappers(f"%REQ({names.HEADER_REQUEST_ID})%")))


def internal_replies() -> LocalReplyConfig:
    """Local replies of the internal listener: one attempt at one backend failed inside Envoy."""
    return LocalReplyConfig(
        mappers=[_mapper(expression, reason, openai=True, trace_id="") for expression, reason in _INTERNAL]
    )


def _typed(name: str, message: betterproto2.Message) -> TypedExtensionConfig:
    return TypedExtensionConfig(name=name, typed_config=Any.pack(message))


def _response_is(name: str, message: betterproto2.Message, expected: str) -> MatcherMatcherListPredicate:
    return MatcherMatcherListPredicate(
        single_predicate=MatcherMatcherListPredicateSinglePredicate(
            input=_typed(name, message),
            value_match=StringMatcher(exact=expected),
        )
    )


def _is_json() -> MatcherMatcherListPredicate:
    return MatcherMatcherListPredicate(
        single_predicate=MatcherMatcherListPredicateSinglePredicate(
            input=_typed("content_type", HttpResponseHeaderMatchInput(header_name="content-type")),
            value_match=StringMatcher(prefix=JSON, ignore_case=True),
        )
    )


def backend_errors() -> CustomResponse:
    """Replaces a backend's own error by ours: its text may name hosts, accounts or a masked credential.

    A 4xx in JSON is the client's fault and passes; any other 4xx is a page of some server in front of the backend.
    """
    reason = Reason.BACKEND_ERROR
    failed = [_response_is("class", HttpResponseStatusCodeClassMatchInput(), kind) for kind in ("3xx", "5xx")]
    failed += [_response_is("code", HttpResponseStatusCodeMatchInput(), code) for code in ("401", "402", "403", "429")]
    failed.append(
        MatcherMatcherListPredicate(
            and_matcher=MatcherMatcherListPredicatePredicateList(
                predicate=[
                    _response_is("class", HttpResponseStatusCodeClassMatchInput(), "4xx"),
                    MatcherMatcherListPredicate(not_matcher=_is_json()),
                ]
            )
        )
    )
    from_backend = _response_is("local_reply", HttpResponseLocalReplyMatchInput(), "false")
    policy = LocalResponsePolicy(
        status_code=REFUSALS[reason].status,
        body_format=_format(reason, openai=True, trace_id=""),
    )
    any_failed = MatcherMatcherListPredicate(or_matcher=MatcherMatcherListPredicatePredicateList(predicate=failed))
    return CustomResponse(
        custom_response_matcher=Matcher(
            matcher_list=MatcherMatcherList(
                matchers=[
                    MatcherMatcherListFieldMatcher(
                        predicate=MatcherMatcherListPredicate(
                            and_matcher=MatcherMatcherListPredicatePredicateList(predicate=[from_backend, any_failed])
                        ),
                        on_match=MatcherOnMatch(action=_typed("backend_error", policy)),
                    )
                ]
            )
        )
    )
