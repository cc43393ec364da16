"""Strict JSON: agrees with the standard library on what is sound, refuses the rest, and knows where members stand."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.json_body import DEPTH_MAX, Document, parse, places, written
from gateway.errors import Reason, Refused
from tests.unit.extproc.json_texts import NAMES, OBJECTS, RANDOMS, VALUES, objects, text_of


def refusal(body: bytes | str) -> Refused:
    with pytest.raises(Refused) as raised:
        parse(body)
    assert raised.value.reason is Reason.MALFORMED_BODY
    return raised.value


@given(objects())
def test_every_sound_object_is_read_as_json_reads_it(case: tuple[dict[str, Any], str]) -> None:
    members, text = case
    assert parse(text.encode()).members == json.loads(text) == members
    assert parse(text.encode()).text == text


@given(objects(), st.data())
def test_damaged_text_is_never_read_otherwise_than_json_reads_it(
    case: tuple[dict[str, Any], str], data: st.DataObject
) -> None:
    _, text = case
    at = data.draw(st.integers(0, len(text)))
    damaged = (
        text[:at] + data.draw(st.text('{}[]",:\\0e.-x \n', max_size=2)) + text[at + data.draw(st.integers(0, 2)) :]
    )
    try:
        members = parse(damaged).members
    except Refused:
        return
    assert members == json.loads(damaged)


@given(st.binary(max_size=40))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    try:
        members = parse(body).members
    except Refused:
        refusal(body)
        return
    assert members == json.loads(body)


@given(objects())
def test_place_of_every_member_is_exactly_its_value(case: tuple[dict[str, Any], str]) -> None:
    members, text = case
    found = places(text)
    assert found.keys() == members.keys()
    for name, (start, end) in found.items():
        assert text[start:end] == text[start:end].strip()
        assert json.loads(text[start:end]) == members[name]


@given(objects(st.tuples(OBJECTS, VALUES).map(lambda pair: pair[0] | {"model": pair[1]})))
@example(({"model": 1}, '{"mod\\u0065l": 1}'))
@example(({"a": {"model": 1}, "model": 2}, '{"a":{"model":1},"model":2}'))
@example(({"a": "model", "model": 2}, '{"a":"model","model":2}'))
@example(({"a": {"model": 1}, "model": 2}, '{"a":{"model":1},"\\u006dodel":2}'))
@example(({'x"model': 1, "model": 2}, '{"x\\"model":1,"model":2}'))
def test_place_of_a_member_agrees_with_the_places_of_all(case: tuple[dict[str, Any], str]) -> None:
    members, text = case
    document = Document(text=text, members=members)
    assert document.place("model") == places(text)["model"]
    assert json.loads(document.raw("model")) == members["model"]


@given(objects())
def test_replacing_one_member_leaves_the_others(case: tuple[dict[str, Any], str]) -> None:
    members, text = case
    for name, (start, end) in places(text).items():
        assert json.loads(f"{text[:start]}null{text[end:]}") == members | {name: None}


@given(NAMES, VALUES, RANDOMS, st.lists(st.sampled_from(['{"in": %s}', '{"in": [1, %s]}']), max_size=3))
def test_key_that_stands_twice_is_refused_at_any_depth(
    name: str, value: Any, random: Random, wrappings: list[str]
) -> None:
    first, second = text_of({name: value}, random), text_of({name: value}, random)
    twice = f"{first.rstrip()[:-1]},{second.lstrip()[1:]}"
    for wrapping in wrappings:
        twice = wrapping.replace("%s", twice)
    refused = refusal(twice)
    assert "twice" in refused.text
    assert refused.param == name[:64]


@given(st.integers())
@example(2**63)
@example(2**64 - 1)
@example(2**64)
@example(-(2**63))
@example(-(2**63) - 1)
def test_integers_are_those_of_64_bits(number: int) -> None:
    text = f'{{"a": {number}}}'
    if -(2**63) <= number < 2**64:
        assert parse(text).members == {"a": number}
    else:
        assert "64 bits" in refusal(text).text


@given(st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,5})?([eE][+-]?[0-9]{1,4})?", fullmatch=True))
def test_numbers_in_any_spelling_are_read_or_refused_as_too_large(spelling: str) -> None:
    expected = json.loads(spelling)
    if abs(expected) == float("inf") or (isinstance(expected, int) and not -(2**63) <= expected < 2**64):
        assert "too large" in refusal(f'{{"a": {spelling}}}').text
    else:
        assert parse(f'{{"a": {spelling}}}').members == {"a": expected}


REFUSED = {
    "nothing": (b"", "empty"),
    "spaces": (b" \n", "empty"),
    "a list": (b"[]", "must be a JSON object"),
    "text": (b'"a"', "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "bad UTF-8": (b'{"a": "\xff"}', "byte 7"),
    "a surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid UTF-8"),
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"a": [Infinity]}', "Infinity is not"),
    "-Infinity": (b'{"a": -Infinity}', "-Infinity is not"),
    "1e999": (b'{"a": 1e999}', "too large"),
    "-1e999": (b'{"a": -1e999}', "too large"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "64 bits"),
    "a float of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b".0}", "too large"),
    "a comment": (b'{"a": 1 /* one */}', "not valid JSON"),
    "single quotes": (b"{'a': 1}", "line 1, column 2"),
    "a comma too many": (b'{"a": 1,}', "not valid JSON"),
    "something after it": (b'{"a": 1} x', "not valid JSON"),
    "two objects": (b'{"a": 1}{"a": 1}', "not valid JSON"),
    "a line break in a string": (b'{"a": "\n"}', "not valid JSON"),
    "a leading zero": (b'{"a": 01}', "not valid JSON"),
    "an unknown escape": (b'{"a": "\\x"}', "not valid JSON"),
    "an open string": (b'{"a": "', "not valid JSON"),
    "too many lists": (b'{"a": ' + b"[" * DEPTH_MAX + b"]" * DEPTH_MAX + b"}", "deeper than 64"),
    "too many objects": (b'{"a": ' * 65 + b"1" + b"}" * 65, "deeper than 64"),
    "a bomb": (b'{"a": ' + b"[" * 200_000, "deeper than 64"),
    "a bomb of objects": (b'{"a":' * 200_000, "deeper than 64"),
    "a bomb behind a string": (b'{"a": "]]]}\\"}", "b": ' + b"[" * 100_000, "deeper than 64"),
}


@pytest.mark.parametrize(("body", "said"), REFUSED.values(), ids=REFUSED)
def test_unsound_body_is_refused_with_what_is_wrong(body: bytes, said: str) -> None:
    assert said in refusal(body).text


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": ' + b"[" * (DEPTH_MAX - 1) + b"]" * (DEPTH_MAX - 1) + b"}",
        b'{"a": "' + b"[{" * 500 + b'"}',
        b'{"a": [' + b"[]," * 500 + b"[]]}",
        b'{"a": "\\ud800"}',
        b'{"a": 12345678901234567.5, "b": 1e308}',
        b"\r\n\t {}",
    ],
    ids=[
        "deepest",
        "brackets in a string",
        "many side by side",
        "lone surrogate in an escape",
        "long floats",
        "spaces",
    ],
)
def test_unusual_but_sound_body_is_taken(body: bytes) -> None:
    assert parse(body).members == json.loads(body)


@given(VALUES)
@example("\ud800")
@example({"\udfff": ["é", "\udc00\ud800"]})
def test_what_is_written_is_utf8_and_reads_as_the_value(value: Any) -> None:
    assert json.loads(written(value).encode()) == value


def test_text_without_surrogates_is_written_as_it_is() -> None:
    assert written({"模": "é\n"}) == '{"模": "é\\n"}'


def test_refusal_shows_no_more_of_a_key_than_64_characters() -> None:
    name = "x" * 500
    refused = refusal(f'{{"{name}": 1, "{name}": 2}}')
    assert len(refused.text) < 200
    assert refused.param == name[:64]
