"""The codec: its own round trip, and the same meaning as envoy-data-plane's messages in both directions."""

from __future__ import annotations

from typing import Any

import pytest
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderMap,
    HeaderValue,
    HeaderValueOptionHeaderAppendAction,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    BodyMutation,
    CommonResponse,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)
from hypothesis import given
from hypothesis import strategies as st

from extproc.exchange import (
    Continue,
    Event,
    Forward,
    Pass,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Rewrite,
)
from extproc.wire import WireError, decode, encode, message
from gateway import names

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
LATIN = st.text(st.characters(max_codepoint=255, min_codepoint=32, exclude_characters="\x7f"), max_size=12)
HEADERS = st.dictionaries(NAMES, LATIN, max_size=5)
BODIES = st.binary(max_size=200)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(RequestHeaders, headers=HEADERS, ends=st.booleans()),
    st.builds(RequestBody, body=BODIES),
    st.builds(ResponseHeaders, headers=HEADERS, ends=st.booleans()),
    st.builds(ResponseBody, body=BODIES, ends=st.booleans()),
)
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
PAIRS = st.lists(st.tuples(NAMES, ASCII), max_size=4, unique_by=lambda pair: pair[0]).map(tuple)
METADATA = st.lists(
    st.tuples(NAMES, LATIN | st.booleans()), min_size=1, max_size=4, unique_by=lambda pair: pair[0]
).map(tuple)
LIMITS = st.lists(st.tuples(NAMES, ASCII), max_size=4, unique_by=lambda pair: pair[0]).map(tuple)
FORWARDS = st.builds(Forward, headers=PAIRS, body=st.none() | BODIES, metadata=METADATA, limits=LIMITS)
REWRITES = st.builds(Rewrite, body=BODIES, status=st.none() | st.integers(400, 599), counted=LIMITS)
REPLIES = st.builds(
    Reply,
    status=st.sampled_from([200, 401, 503]),
    body=BODIES,
    headers=PAIRS,
    metadata=st.just(()) | METADATA,
    limits=LIMITS,
)
PASSES = st.builds(Pass, headers=PAIRS, metadata=METADATA)
REQUEST_HEADERS = RequestHeaders(headers={}, ends=False)
REQUEST_BODY = RequestBody(body=b"")
RESPONSE_BODY = ResponseBody(body=b"")


def _map(headers: dict[str, str]) -> HttpHeaders:
    values = [HeaderValue(key=key, raw_value=value.encode("latin-1")) for key, value in headers.items()]
    return HttpHeaders(headers=HeaderMap(headers=values))


def request_of(event: Event) -> ProcessingRequest:
    """The message by which Envoy tells of an event."""
    match event:
        case RequestHeaders():
            said = _map(dict(event.headers))
            said.end_of_stream = event.ends
            return ProcessingRequest(request_headers=said)
        case RequestBody():
            return ProcessingRequest(request_body=HttpBody(body=event.body, end_of_stream=True))
        case ResponseHeaders():
            said = _map(dict(event.headers))
            said.end_of_stream = event.ends
            return ProcessingRequest(response_headers=said)
        case ResponseBody():
            return ProcessingRequest(response_body=HttpBody(body=event.body, end_of_stream=event.ends))


def response_to(command: Any, event: Event) -> ProcessingResponse:
    """What Envoy reads of a command."""
    # By way of protobuf itself: betterproto2 does not merge the parts of a message, as the specification says.
    merged = message("envoy.service.ext_proc.v3.ProcessingResponse").FromString(encode(command, event))
    return ProcessingResponse.parse(merged.SerializeToString())


def headers_of(mutation: Any) -> dict[str, str]:
    assert all(
        option.append_action is HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
        for option in mutation.set_headers
    )
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def metadata_of(said: ProcessingResponse, namespace: str) -> dict[str, Any]:
    """Dynamic metadata of a namespace."""
    if said.dynamic_metadata is None or namespace not in said.dynamic_metadata.fields:
        return {}
    fields = said.dynamic_metadata.fields[namespace].struct_value
    assert fields is not None
    return {
        key: value.bool_value if value.bool_value is not None else value.string_value
        for key, value in fields.fields.items()
    }


@given(EVENTS)
def test_event_comes_out_of_envoys_message_as_it_was(event: Event) -> None:
    assert decode(bytes(request_of(event))) == event


@given(EVENTS)
def test_both_codecs_read_and_write_the_same_requests(event: Event) -> None:
    theirs = request_of(event)
    ours = message("envoy.service.ext_proc.v3.ProcessingRequest").FromString(bytes(theirs))
    assert ProcessingRequest.parse(ours.SerializeToString()) == theirs
    assert decode(ours.SerializeToString()) == event


@given(FORWARDS | PASSES | REWRITES | REPLIES)
def test_both_codecs_read_and_write_the_same_responses(command: Forward | Pass | Rewrite | Reply) -> None:
    events: dict[type, Event] = {Rewrite: RESPONSE_BODY, Pass: REQUEST_HEADERS}
    event = events.get(type(command), REQUEST_BODY)
    ours = message("envoy.service.ext_proc.v3.ProcessingResponse").FromString(encode(command, event))
    theirs = ProcessingResponse.parse(ours.SerializeToString())
    assert message("envoy.service.ext_proc.v3.ProcessingResponse").FromString(bytes(theirs)) == ours


@given(FORWARDS)
def test_forward_says_headers_body_and_metadata(command: Forward) -> None:
    said = response_to(command, REQUEST_BODY)
    assert said.request_body is not None
    common = said.request_body.response
    assert isinstance(common, CommonResponse)
    assert common.clear_route_cache
    length = {} if command.body is None else {"content-length": str(len(command.body))}
    assert headers_of(common.header_mutation) == dict(command.headers) | length
    assert common.body_mutation == (None if command.body is None else BodyMutation(body=command.body))
    assert metadata_of(said, names.METADATA_NAMESPACE) == dict(command.metadata)
    assert metadata_of(said, names.LIMITS_NAMESPACE) == dict(command.limits)


@given(PASSES)
def test_pass_says_headers_and_metadata_and_leaves_the_route(command: Pass) -> None:
    said = response_to(command, REQUEST_HEADERS)
    assert said.request_headers is not None
    common = said.request_headers.response
    assert isinstance(common, CommonResponse)
    assert not common.clear_route_cache
    assert headers_of(common.header_mutation) == dict(command.headers)
    assert metadata_of(said, names.METADATA_NAMESPACE) == dict(command.metadata)


@given(REWRITES)
def test_rewrite_says_body_length_and_status(command: Rewrite) -> None:
    said = response_to(command, RESPONSE_BODY)
    assert said.response_body is not None
    common = said.response_body.response
    assert common is not None
    assert common.body_mutation == BodyMutation(body=command.body)
    status = {} if command.status is None else {":status": str(command.status)}
    expected = {"content-type": "application/json", "content-length": str(len(command.body))} | status
    assert headers_of(common.header_mutation) == expected
    assert metadata_of(said, names.COUNTED_NAMESPACE) == dict(command.counted)


@given(REPLIES, EVENTS)
def test_reply_is_an_immediate_response_to_any_event(command: Reply, event: Event) -> None:
    said = response_to(command, event).immediate_response
    assert said is not None
    assert said.status is not None
    assert (int(said.status.code), said.body, said.details) == (command.status, command.body, names.DECIDED_DETAILS)
    assert headers_of(said.headers) == {"content-type": "application/json"} | dict(command.headers)
    assert metadata_of(response_to(command, event), names.METADATA_NAMESPACE) == dict(command.metadata)
    assert metadata_of(response_to(command, event), names.LIMITS_NAMESPACE) == dict(command.limits)


def test_reply_may_be_of_another_type_than_json() -> None:
    stream = (("content-type", "text/event-stream"),)
    said = response_to(Reply(status=200, body=b"data: x\n\n", headers=stream), REQUEST_BODY).immediate_response
    assert said is not None
    assert headers_of(said.headers) == dict(stream)
    assert said.headers is not None
    assert len(said.headers.set_headers) == 1


@given(METADATA)
def test_continue_may_carry_metadata(metadata: Any) -> None:
    said = response_to(Continue(metadata=metadata), REQUEST_HEADERS)
    assert said.request_headers is not None
    assert metadata_of(said, names.METADATA_NAMESPACE) == dict(metadata)


@given(LIMITS)
def test_continue_may_carry_counts(counted: Any) -> None:
    said = response_to(Continue(counted=counted), RESPONSE_BODY)
    assert said.response_body is not None
    assert metadata_of(said, names.COUNTED_NAMESPACE) == dict(counted)
    assert said.mode_override is None


def test_wanted_body_is_asked_for_as_it_comes() -> None:
    said = response_to(Continue(body_wanted=True), ResponseHeaders(headers={}, ends=False))
    assert said.response_headers is not None
    assert said.mode_override is not None
    assert said.mode_override.response_body_mode is ProcessingModeBodySendMode.STREAMED
    assert said.mode_override.response_trailer_mode is ProcessingModeHeaderSendMode.SKIP


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (REQUEST_HEADERS, "request_headers"),
        (REQUEST_BODY, "request_body"),
        (ResponseHeaders(headers={}, ends=False), "response_headers"),
        (RESPONSE_BODY, "response_body"),
    ],
)
def test_continue_answers_the_event_that_was_told(event: Event, field: str) -> None:
    said = response_to(Continue(), event)
    assert getattr(said, field) is not None
    assert said.immediate_response is None


def test_repeated_header_is_joined_by_a_comma() -> None:
    values = [HeaderValue(key="authorization", raw_value=value) for value in (b"Bearer a", b"Bearer b")]
    request = ProcessingRequest(request_headers=HttpHeaders(headers=HeaderMap(headers=values)))
    event = decode(bytes(request))
    assert isinstance(event, RequestHeaders)
    assert event.headers == {"authorization": "Bearer a,Bearer b"}


def test_header_in_the_text_field_is_read_too() -> None:
    request = ProcessingRequest(
        request_headers=HttpHeaders(headers=HeaderMap(headers=[HeaderValue(key="a", value="b")]))
    )
    event = decode(bytes(request))
    assert isinstance(event, RequestHeaders)
    assert event.headers == {"a": "b"}


@pytest.mark.parametrize(
    "request_", [ProcessingRequest(), ProcessingRequest(request_trailers=HttpTrailers(trailers=HeaderMap()))]
)
def test_message_that_the_mode_does_not_lead_to_is_an_error(request_: ProcessingRequest) -> None:
    with pytest.raises(WireError):
        decode(bytes(request_))


@pytest.mark.parametrize("model", ["модель", "模型é"])
def test_model_name_of_any_script_stays_what_it_is(model: str) -> None:
    command = Forward(headers=((names.HEADER_MODEL, model),), body=None, metadata=())
    said = response_to(command, REQUEST_BODY).request_body
    assert said is not None
    assert said.response is not None
    assert said.response.header_mutation is not None
    assert said.response.header_mutation.set_headers[0].header.raw_value.decode() == model
