"""Where a request goes, and that its body changes by no more than the usage that is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.edit import Edit, setting
from extproc.exchange import Forward
from extproc.json_body import parse, places
from extproc.route import Choice, choose, route, tells_usage
from gateway import names
from gateway.endpoints import Kind
from gateway.errors import Reason, Refused
from policies.candidates import PolicyIndex
from policies.model import BackendId, Policy
from tests.unit.extproc.extproc_builders import ENDPOINTS, a_caller, an_ask
from tests.unit.extproc.json_texts import NAMES, OBJECTS, RANDOMS, VALUES, text_of
from tests.unit.policies.policy_builders import a_model, a_policy, a_share

EVERY = Choice(variant=None, reports_usage=True)
OPTIONS = st.none() | st.dictionaries(st.sampled_from(["include_usage", "x", "model"]), st.booleans() | st.text())


def sent(
    text: str, *, kind: Kind = Kind.CHAT, choice: Choice = EVERY, path: str | None = None, edits: Sequence[Edit] = ()
) -> tuple[Forward, bytes]:
    """The command, and the body that the backend gets."""
    command = route(a_caller(), an_ask(text, path=path), choice, ENDPOINTS[kind], edits)
    return command, text.encode() if command.body is None else command.body


def header(command: Forward, name: str) -> str | None:
    return dict(command.headers).get(name)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], Random]:
    """Members in any order, ``model`` among them, maybe a stream with options."""
    members = draw(OBJECTS)
    members["model"] = draw(NAMES)
    members["stream"] = draw(st.booleans())
    if draw(st.booleans()):
        members["stream_options"] = draw(OPTIONS)
    else:
        members.pop("stream_options", None)
    order = draw(st.permutations(sorted(members)))
    return {name: members[name] for name in order}, draw(RANDOMS)


@given(calls(), st.sampled_from([Kind.CHAT, Kind.COMPLETION, Kind.EMBEDDING, Kind.RESPONSE]), st.booleans())
@example(({"stream_options": {"a": "é"}, "model": "m", "stream": True}, Random(1)), Kind.CHAT, True)
@example(({"x": "模型", "model": "😀", "stream": True}, Random(1)), Kind.CHAT, True)
def test_span_is_the_models_string_in_the_bytes_that_are_sent(
    call: tuple[dict[str, Any], Random], kind: Kind, reports: bool
) -> None:
    members, random = call
    command, body = sent(text_of(members, random), kind=kind, choice=Choice(variant=None, reports_usage=reports))
    offset, length = map(int, (header(command, names.HEADER_MODEL_SPAN) or "").split(":"))
    span = body[offset : offset + length]
    assert json.loads(span) == members["model"]
    assert span[:1] == span[-1:] == b'"'
    renamed = body[:offset] + b'"the-backends-own"' + body[offset + length :]
    assert json.loads(renamed) == json.loads(body) | {"model": "the-backends-own"}


@given(calls(), st.sampled_from([Kind.CHAT, Kind.COMPLETION]))
def test_asking_for_usage_changes_no_other_byte(call: tuple[dict[str, Any], Random], kind: Kind) -> None:
    members, random = call
    text = text_of(members, random)
    command, body = sent(text, kind=kind)
    options = members.get("stream_options")
    if not members["stream"] or (options and options.get("include_usage")):
        assert command.body is None
        return
    assert json.loads(body) == members | {"stream_options": {**(options or {}), "include_usage": True}}
    if "stream_options" in members:
        start, end = places(text)["stream_options"]
    else:
        start = end = text.index("{") + 1
    before, after = text[:start].encode(), text[end:].encode()
    assert body.startswith(before)
    assert body.endswith(after)


MAXIMA = st.dictionaries(st.sampled_from(["max_tokens", "max_completion_tokens"]), st.integers(1, 10**6))


@given(calls(), MAXIMA, MAXIMA)
@example(({"a": "é", "model": "模", "max_tokens": 7, "stream": True}, Random(1)), {}, {"max_tokens": 1, "n": 2})
def test_edits_and_the_usage_asked_for_go_together(
    call: tuple[dict[str, Any], Random], named: dict[str, int], wanted: dict[str, int]
) -> None:
    members, random = call
    members |= named
    text = text_of(members, random)
    document = parse(text)
    command, body = sent(text, edits=[setting(document, name, str(value)) for name, value in wanted.items()])
    _, unedited = sent(text)
    assert json.loads(body) == json.loads(unedited) | wanted
    offset, length = map(int, (header(command, names.HEADER_MODEL_SPAN) or "").split(":"))
    assert body[offset : offset + length] == document.raw("model").encode()
    for name, (start, end) in places(body.decode()).items():
        if name in members and name not in {*wanted, "stream_options"}:
            assert body.decode()[start:end] == document.raw(name)


def test_body_of_an_inference_is_edited_too() -> None:
    text = '{"model": "m", "prompt": "é", "max_tokens": 9}'
    edits = [setting(parse(text), "max_tokens", "3")]
    _, body = sent(text, kind=Kind.INFERENCE, path="/v1/completions", edits=edits)
    assert body == '{"model": "m", "prompt": "é", "max_tokens": 3}'.encode()


def test_what_goes_along_is_in_the_metadata() -> None:
    command = route(
        a_caller(),
        an_ask('{"model": "m"}'),
        EVERY,
        ENDPOINTS[Kind.CHAT],
        metadata=(("charge_to", "org:DAILY"),),
        figures=(("tokens_input", "7"),),
    )
    assert ("charge_to", "org:DAILY") in command.metadata
    assert command.limits == (("tokens_input", "7"),)


@given(calls(), VALUES)
def test_bodies_of_other_endpoints_are_never_touched(call: tuple[dict[str, Any], Random], value: Any) -> None:
    members, random = call
    for kind in (Kind.EMBEDDING, Kind.RESPONSE):
        command, _ = sent(text_of(members | {"input": value}, random), kind=kind)
        assert command.body is None
        streamed = kind is Kind.RESPONSE and members.get("stream") is True
        assert dict(command.metadata).get(names.METADATA_STREAM, False) is streamed
        assert names.METADATA_STRIP_USAGE not in dict(command.metadata)


STREAM = '{"model": "m", "stream": true}'


def test_stream_is_watched_and_its_added_usage_taken_out() -> None:
    command, body = sent(STREAM)
    assert body == b'{"stream_options":{"include_usage":true},"model": "m", "stream": true}'
    assert dict(command.metadata) == {
        names.METADATA_MODEL: "m",
        names.METADATA_STREAM: True,
        names.METADATA_STRIP_USAGE: True,
    }


def test_usage_that_the_client_asked_for_stays() -> None:
    text = '{"model": "m", "stream": true, "stream_options": {"include_usage": true}}'
    command, _ = sent(text)
    assert command.body is None
    assert dict(command.metadata)[names.METADATA_STRIP_USAGE] is False


def test_silent_backends_are_not_asked_for_usage() -> None:
    command, _ = sent(STREAM, choice=Choice(variant=None, reports_usage=False))
    assert command.body is None
    assert dict(command.metadata)[names.METADATA_STRIP_USAGE] is False


def test_unpaired_surrogate_beside_the_usage_is_carried() -> None:
    _, body = sent('{"model": "m", "stream": true, "stream_options": {"x": "\\ud800"}}')
    assert json.loads(body)["stream_options"] == {"x": "\ud800", "include_usage": True}


def test_headers_are_what_routes_decide_by() -> None:
    variant = frozenset({BackendId("b"), BackendId("a")})
    command, _ = sent('{"model": "m"}', choice=Choice(variant=variant, reports_usage=True))
    assert dict(command.headers) == {
        names.HEADER_ORGANIZATION: "acme",
        names.HEADER_MODEL: "m",
        names.HEADER_MODEL_SPAN: "10:3",
        names.HEADER_VARIANT: "a,b",
    }


def test_inference_goes_to_its_new_path_with_its_new_body() -> None:
    command, body = sent('{"model": "m", "prompt": "é"}', kind=Kind.INFERENCE, path="/v1/completions")
    assert header(command, ":path") == "/v1/completions"
    assert command.body == body == '{"model": "m", "prompt": "é"}'.encode()


# --- The choice.

POLICY = a_policy(
    a_model(a_share("a"), a_share("b"), model="open"),
    a_model(a_share("a"), a_share("b", allow=["bob"]), model="partly"),
    a_model(a_share("b", allow=["bob"]), model="closed"),
    a_model(a_share("dead"), model="killed"),
    a_model(a_share("a"), a_share("dead"), model="half"),
    a_model(a_share("dead"), a_share("b", allow=["bob"]), model="left-with-dead"),
    a_model(a_share("a"), model="theirs", organization="globex"),
    killed=["dead"],
)


def chosen(model: str, policy: Policy = POLICY, *, silent: tuple[str, ...] = (), **caller: Any) -> Choice:
    ask = an_ask(json.dumps({"model": model}))
    return choose(a_caller(**caller), ask, PolicyIndex(policy), frozenset(map(BackendId, silent)))


@pytest.mark.parametrize(
    ("model", "key", "variant"),
    [
        ("open", "alice", None),
        ("partly", "alice", {"a"}),
        ("partly", "bob", None),
        ("closed", "bob", None),
        ("half", "alice", None),
    ],
)
def test_variant_is_there_only_where_lists_leave_a_part(model: str, key: str, variant: set[str] | None) -> None:
    assert chosen(model, id=key).variant == (None if variant is None else frozenset(variant))


@pytest.mark.parametrize(
    ("model", "caller", "reason"),
    [
        ("nope", {}, Reason.MODEL_UNKNOWN),
        ("*", {}, Reason.MODEL_UNKNOWN),
        ("theirs", {}, Reason.MODEL_UNKNOWN),
        ("nope", {"allowed_models": frozenset({"open"})}, Reason.MODEL_UNKNOWN),
        ("open", {"allowed_models": frozenset({"other"})}, Reason.MODEL_FORBIDDEN),
        ("open", {"allowed_models": frozenset()}, Reason.MODEL_FORBIDDEN),
        ("closed", {}, Reason.BACKENDS_FORBIDDEN),
        ("killed", {}, Reason.BACKENDS_KILLED),
        ("left-with-dead", {}, Reason.BACKENDS_KILLED),
    ],
)
def test_no_way_is_refused_with_its_reason(model: str, caller: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(Refused) as raised:
        chosen(model, **caller)
    assert raised.value.reason is reason


@given(st.text())
def test_any_model_name_may_be_asked_for(model: str) -> None:
    with pytest.raises(Refused) as raised:
        chosen(model)
    assert len(raised.value.text.encode()) < 4096


@pytest.mark.parametrize(("silent", "reports"), [((), True), (("b",), False), (("c",), True)])
def test_one_silent_backend_keeps_usage_from_being_asked_for(silent: tuple[str, ...], reports: bool) -> None:
    assert chosen("open", silent=silent).reports_usage is reports


@pytest.mark.parametrize(
    ("text", "kind", "reports", "told"),
    [
        (STREAM, Kind.CHAT, True, True),
        (STREAM, Kind.CHAT, False, False),
        ('{"model": "m", "stream": true, "stream_options": {"include_usage": true}}', Kind.CHAT, False, True),
        ('{"model": "m", "stream": true, "stream_options": null}', Kind.COMPLETION, False, False),
        ('{"model": "m"}', Kind.CHAT, False, True),
        (STREAM, Kind.RESPONSE, False, True),
    ],
    ids=["the router asks", "nobody asks", "the client asks", "null", "no stream", "a response"],
)
def test_streams_tell_their_usage_where_somebody_asks(text: str, kind: Kind, reports: bool, told: bool) -> None:
    ask = replace(an_ask(text), kind=kind)
    assert tells_usage(ask, Choice(variant=None, reports_usage=reports)) == told
