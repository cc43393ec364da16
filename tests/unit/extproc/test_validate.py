"""What a body asks for: each unsound field is a refusal that names it, and everything else passes as it is."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.validate import METADATA_ENTRIES_MAX, METADATA_VALUE_MAX, Ask, validate
from gateway.endpoints import POST_ENDPOINTS, Endpoint, Kind
from gateway.errors import Reason, Refused
from tests.unit.extproc.json_texts import OBJECTS, RANDOMS, text_of

ENDPOINTS: dict[Kind, Endpoint] = {endpoint.kind: endpoint for endpoint in POST_ENDPOINTS}
CALLS: dict[Kind, dict[str, Any]] = {
    Kind.INFERENCE: {"request_id": "123e4567-e89b-12d3-a456-426614174000", "model": "m", "payload": "hi"},
    Kind.CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    Kind.COMPLETION: {"model": "m", "prompt": "hi"},
    Kind.EMBEDDING: {"model": "m", "input": "hi"},
    Kind.RESPONSE: {"model": "m", "input": "hi"},
}
OPENAI = [Kind.CHAT, Kind.COMPLETION, Kind.EMBEDDING, Kind.RESPONSE]
ABSENT = object()


def ask(kind: Kind, body: bytes, *, body_max_bytes: int = 100_000, payload_max_bytes: int = 1000) -> Ask:
    return validate(ENDPOINTS[kind], body, body_max_bytes=body_max_bytes, payload_max_bytes=payload_max_bytes)


def ask_of(kind: Kind, **changes: Any) -> Ask:
    """A sound call with some members changed or, when ABSENT, left out."""
    members = {name: value for name, value in (CALLS[kind] | changes).items() if value is not ABSENT}
    return ask(kind, json.dumps(members).encode())


def refusal(kind: Kind, **changes: Any) -> tuple[Reason, str | None]:
    with pytest.raises(Refused) as raised:
        ask_of(kind, **changes)
    return raised.value.reason, raised.value.param


MISSING, INVALID, MALFORMED = Reason.MISSING_FIELD, Reason.INVALID_FIELD, Reason.MALFORMED_BODY
LONG = {"a" * 24: "x" * (METADATA_VALUE_MAX - 23)}

# Kinds, members, reason and param.
REFUSED: list[tuple[list[Kind], dict[str, Any], Reason, str]] = [
    ([*Kind][:5], {"model": ABSENT}, MISSING, "model"),
    ([*Kind][:5], {"model": None}, MISSING, "model"),
    ([*Kind][:5], {"model": 5}, INVALID, "model"),
    ([*Kind][:5], {"model": ["m"]}, INVALID, "model"),
    ([*Kind][:5], {"model": ""}, INVALID, "model"),
    *((OPENAI, {"stream": value}, INVALID, "stream") for value in ("yes", 1, {}, [])),
    *((OPENAI, {"stream_options": value}, INVALID, "stream_options") for value in (True, "x", [])),
    (OPENAI, {"stream_options": {"include_usage": 1}}, INVALID, "stream_options.include_usage"),
    *(
        (OPENAI, {name: value}, INVALID, name)
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n")
        for value in (0, -1, 1.5, "7", True)
    ),
    *((OPENAI, {name: value}, INVALID, name) for name in ("temperature", "top_p") for value in ("hot", True, [])),
    ([Kind.CHAT], {"messages": ABSENT}, MISSING, "messages"),
    ([Kind.CHAT], {"messages": []}, INVALID, "messages"),
    ([Kind.CHAT], {"messages": "hi"}, INVALID, "messages"),
    ([Kind.CHAT], {"messages": {}}, INVALID, "messages"),
    ([Kind.CHAT], {"messages": ["hi"]}, INVALID, "messages[0]"),
    ([Kind.CHAT], {"messages": [{"role": "user"}, None]}, INVALID, "messages[1]"),
    ([Kind.CHAT], {"messages": [{"content": "hi"}]}, MISSING, "messages[0].role"),
    ([Kind.CHAT], {"messages": [{"role": None}]}, MISSING, "messages[0].role"),
    ([Kind.CHAT], {"messages": [{"role": 1}]}, INVALID, "messages[0].role"),
    ([Kind.CHAT], {"messages": [{"role": ""}]}, INVALID, "messages[0].role"),
    ([Kind.CHAT], {"messages": [{"role": "user", "content": 1}]}, INVALID, "messages[0].content"),
    ([Kind.CHAT], {"messages": [{"role": "user", "content": {}}]}, INVALID, "messages[0].content"),
    ([Kind.COMPLETION], {"prompt": ABSENT}, MISSING, "prompt"),
    *(([Kind.COMPLETION], {"prompt": value}, INVALID, "prompt") for value in ("", [], 1, {}, True)),
    ([Kind.EMBEDDING], {"input": ABSENT}, MISSING, "input"),
    *(([Kind.EMBEDDING, Kind.RESPONSE], {"input": value}, INVALID, "input") for value in ("", [], 1, {})),
    ([Kind.RESPONSE], {"input": ABSENT}, MISSING, "input"),
    ([Kind.INFERENCE], {"request_id": ABSENT}, MISSING, "request_id"),
    *(
        ([Kind.INFERENCE], {"request_id": value}, INVALID, "request_id")
        for value in (7, "", "7", "123e4567e89b12d3a456426614174000", "{123e4567-e89b-12d3-a456-426614174000}")
    ),
    ([Kind.INFERENCE], {"request_id": "123e4567-e89b-12d3-a456-426614174000\n"}, INVALID, "request_id"),
    ([Kind.INFERENCE], {"payload": ABSENT}, MISSING, "payload"),
    *(([Kind.INFERENCE], {"payload": value}, INVALID, "payload") for value in ("", 1, {}, "\ud800")),
    ([Kind.INFERENCE], {"payload": "é" * 501}, Reason.PAYLOAD_TOO_LARGE, "payload"),
    ([Kind.INFERENCE], {"hmac_signature": 1}, INVALID, "hmac_signature"),
    ([Kind.INFERENCE], {"content_type": "text/html"}, INVALID, "content_type"),
    ([Kind.INFERENCE], {"content_type": 1}, INVALID, "content_type"),
    ([Kind.INFERENCE], {"parameters": []}, INVALID, "parameters"),
    *(([Kind.INFERENCE], {"parameters": {n: 1}}, INVALID, f"parameters.{n}") for n in ("model", "prompt", "messages")),
    ([Kind.INFERENCE], {"parameters": {"stream": True}}, INVALID, "parameters.stream"),
    ([Kind.INFERENCE], {"parameters": {"max_tokens": 0}}, INVALID, "parameters.max_tokens"),
    ([Kind.INFERENCE], {"metadata": "x"}, INVALID, "metadata"),
    ([Kind.INFERENCE], {"metadata": {"team": 1}}, INVALID, "metadata.team"),
    ([Kind.INFERENCE], {"metadata": LONG}, INVALID, f"metadata.{'a' * 24}"),
    ([Kind.INFERENCE], {"metadata": {str(n): "" for n in range(METADATA_ENTRIES_MAX + 1)}}, INVALID, "metadata"),
]
CASES = [
    pytest.param(kind, members, reason, param, id=f"{kind.value}-{number}-{param}")
    for number, (kinds, members, reason, param) in enumerate(REFUSED)
    for kind in kinds
]


@pytest.mark.parametrize(("kind", "members", "reason", "param"), CASES)
def test_unsound_field_is_named(kind: Kind, members: dict[str, Any], reason: Reason, param: str) -> None:
    assert refusal(kind, **members) == (reason, param)


# What a JSON payload of /v1/inference holds, and what is said of it.
PAYLOADS: dict[str, tuple[Any, Reason, str]] = {
    "no JSON": ("{", MALFORMED, "payload"),
    "a list": ("[]", MALFORMED, "payload"),
    "a key twice": ('{"prompt": 1, "prompt": 1}', MALFORMED, "payload"),
    "no prompt": ("{}", MISSING, "payload.prompt"),
    "empty messages": ('{"messages": []}', INVALID, "payload.messages"),
    "no role": ('{"messages": [{}]}', MISSING, "payload.messages[0].role"),
    "a stream": ('{"prompt": "hi", "stream": true}', INVALID, "payload.stream"),
    "a bad count": ('{"prompt": "hi", "n": 0}', INVALID, "payload.n"),
}


@pytest.mark.parametrize(("payload", "reason", "param"), PAYLOADS.values(), ids=PAYLOADS)
def test_unsound_payload_is_named(payload: str, reason: Reason, param: str) -> None:
    assert refusal(Kind.INFERENCE, payload=payload, content_type="application/json") == (reason, param)


SOUND: list[tuple[list[Kind], dict[str, Any]]] = [
    (OPENAI, {"stream": None, "stream_options": None, "max_tokens": None, "temperature": None}),
    (OPENAI, {"stream": True, "stream_options": {"include_usage": False, "theirs": 1}}),
    (OPENAI, {"temperature": 0, "top_p": 0.5, "n": 1, "max_tokens": 2**40}),
    (OPENAI, {"tools": [{"type": "function"}], "unknown": {"model": 1}}),
    ([Kind.CHAT], {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}),
    ([Kind.CHAT], {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ([Kind.COMPLETION], {"prompt": [1, 2]}),
    ([Kind.EMBEDDING], {"input": [[1], [2]]}),
    ([Kind.RESPONSE], {"input": ABSENT, "prompt": {"id": "p"}}),
    ([Kind.RESPONSE], {"input": ABSENT, "previous_response_id": "r"}),
    ([Kind.INFERENCE], {"hmac_signature": None, "metadata": None, "parameters": None, "content_type": None}),
    ([Kind.INFERENCE], {"request_id": "123E4567-E89B-12D3-A456-426614174000"}),
    ([Kind.INFERENCE], {"metadata": {"a": "x" * (METADATA_VALUE_MAX - 1)}}),
    ([Kind.INFERENCE], {"payload": "é" * 500}),
    ([Kind.INFERENCE], {"unknown": 1}),
]


@pytest.mark.parametrize(
    ("kind", "members"),
    [pytest.param(k, m, id=f"{k.value}-{i}") for i, (kinds, m) in enumerate(SOUND) for k in kinds],
)
def test_sound_call_is_taken(kind: Kind, members: dict[str, Any]) -> None:
    asked = ask_of(kind, **members)
    assert asked.model == "m"
    assert asked.stream is (members.get("stream") is True)


@given(st.sampled_from(OPENAI), OBJECTS, RANDOMS)
def test_openai_body_passes_byte_for_byte(kind: Kind, unknown: dict[str, Any], random: Random) -> None:
    members = {f"x{name}": value for name, value in unknown.items()} | CALLS[kind]
    text = text_of(members, random)
    asked = ask(kind, text.encode())
    assert (asked.document.text, asked.path, asked.inference) == (text, None, None)
    assert asked.document.members == members


def test_body_is_measured_before_it_is_read() -> None:
    with pytest.raises(Refused) as raised:
        ask(Kind.CHAT, b"{" * 11, body_max_bytes=10)
    assert raised.value.reason is Reason.BODY_TOO_LARGE


def test_payload_is_measured_in_bytes_not_characters() -> None:
    with pytest.raises(Refused) as raised:
        ask(Kind.INFERENCE, json.dumps(CALLS[Kind.INFERENCE] | {"payload": "模" * 4}).encode(), payload_max_bytes=11)
    assert "12 bytes" in raised.value.text


def test_text_payload_becomes_a_completion() -> None:
    asked = ask_of(Kind.INFERENCE, payload="héllo", parameters={"max_tokens": 3, "stop": ["\n"]})
    assert asked.path == "/v1/completions"
    assert json.loads(asked.document.text) == {"model": "m", "prompt": "héllo", "max_tokens": 3, "stop": ["\n"]}
    assert asked.document.members == json.loads(asked.document.text)


@pytest.mark.parametrize(
    ("call", "path"),
    [
        ({"prompt": "hi"}, "/v1/completions"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "/v1/chat/completions"),
    ],
    ids=["completion", "chat"],
)
def test_json_payload_is_the_call_itself(call: dict[str, Any], path: str) -> None:
    payload = json.dumps(call | {"model": "another", "n": 2})
    asked = ask_of(Kind.INFERENCE, payload=payload, content_type="application/json", parameters={"n": 1})
    assert asked.path == path
    assert json.loads(asked.document.text) == call | {"model": "m", "n": 1}


def test_inference_keeps_what_the_router_needs() -> None:
    asked = ask_of(Kind.INFERENCE, metadata={"team": "é"}, hmac_signature="ab")
    assert asked.inference is not None
    assert asked.inference.request_id == CALLS[Kind.INFERENCE]["request_id"]
    assert (asked.inference.payload, asked.inference.signature_hex) == ("hi", "ab")
    assert asked.inference.metadata == {"team": "é"}


@given(st.dictionaries(st.text(max_size=4).map("x".__add__), st.text(max_size=4), max_size=3))
def test_inference_call_is_text_that_utf8_carries(parameters: dict[str, str]) -> None:
    asked = ask_of(Kind.INFERENCE, parameters=parameters)
    assert json.loads(asked.document.text.encode()) == {"model": "m", "prompt": "hi", **parameters}


@given(OBJECTS)
def test_any_object_is_taken_or_refused_with_a_field_that_is_named(members: dict[str, Any]) -> None:
    for kind, call in CALLS.items():
        found: Refused | None = None
        try:
            ask(kind, json.dumps(call | members).encode())
        except Refused as refused:
            found = refused
        if found and found.reason in {MISSING, INVALID}:
            assert found.param
            assert found.param in found.text
