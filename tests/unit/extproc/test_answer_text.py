"""Texts of answers in every format, and events of a stream wherever it is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.answer_text import EVENT_MAX_BYTES, EventReader, texts_of_answer, texts_of_event
from tests.unit.extproc.json_texts import OBJECTS, VALUES

CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ANSWERS: dict[str, tuple[Any, list[str]]] = {
    "chat": ({"choices": [{"message": {"role": "assistant", "content": "hi", "refusal": None}}]}, ["hi"]),
    "two choices": ({"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}, ["a", "b"]),
    "parts": ({"choices": [{"message": {"content": [{"type": "text", "text": "hi"}, {"type": "x"}]}}]}, ["hi"]),
    "refusal": ({"choices": [{"message": {"content": None, "refusal": "no"}}]}, ["no"]),
    "reasoning": ({"choices": [{"message": {"content": "hi", "reasoning_content": "hm"}}]}, ["hi", "hm"]),
    "reasoning by another name": ({"choices": [{"message": {"reasoning": "hm"}}]}, ["hm"]),
    "reasoning twice": ({"choices": [{"message": {"reasoning": "hm", "reasoning_content": "hm"}}]}, ["hm"]),
    "tool calls": ({"choices": [{"message": {"content": None, "tool_calls": [CALL]}}]}, ["f", "{}"]),
    "custom tool": (
        {"choices": [{"message": {"tool_calls": [{"custom": {"name": "c", "input": "in"}}]}}]},
        ["c", "in"],
    ),
    "function call": ({"choices": [{"message": {"function_call": CALL["function"]}}]}, ["f", "{}"]),
    "completion": ({"choices": [{"index": 0, "text": "hi", "logprobs": None}]}, ["hi"]),
    "text": ({"text": "hi", "tokens_used": 3}, ["hi"]),
    "responses": (
        {
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"type": "message", "content": [{"type": "output_text", "text": "hi"}, {"refusal": "no"}]},
                {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c1"},
                {"type": "code_interpreter_call", "code": "1 + 1"},
            ]
        },
        ["hm", "hi", "no", "f", "{}", "1 + 1"],
    ),
    "embedding": ({"data": [{"embedding": [0.1]}]}, []),
    "error": ({"error": {"message": "no"}}, []),
    "no object": ([1], []),
}


@pytest.mark.parametrize(("output", "texts"), ANSWERS.values(), ids=ANSWERS)
def test_texts_of_an_answer(output: Any, texts: list[str]) -> None:
    assert list(texts_of_answer(output)) == texts


EVENTS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "chat": ({"choices": [{"index": 1, "delta": {"content": "hi"}}]}, [("1 content", "hi")]),
    "start": ({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, [("0 content", "")]),
    "arguments": (
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 2, "function": {"arguments": "{"}}]}}]},
        [("0 call 2", "{")],
    ),
    "completion": ({"choices": [{"index": 0, "text": "hi"}]}, [("0 text", "hi")]),
    "response": (
        {"type": "response.output_text.delta", "output_index": 0, "content_index": 1, "delta": "hi"},
        [("0 1 response.output_text.delta", "hi")],
    ),
    "sound": ({"type": "response.audio.delta", "delta": "AAAA"}, []),
    "transcript": (
        {"type": "response.audio_transcript.delta", "delta": "hi"},
        [("None None response.audio_transcript.delta", "hi")],
    ),
    "done": ({"type": "response.output_text.done", "text": "hi"}, []),
    "usage": ({"choices": [], "usage": {"prompt_tokens": 1}}, []),
    "no object": (["x"], []),
}


@pytest.mark.parametrize(("event", "texts"), EVENTS.values(), ids=EVENTS)
def test_texts_of_an_event(event: Any, texts: list[tuple[str, str]]) -> None:
    assert list(texts_of_event(event)) == texts


@given(OBJECTS, VALUES, st.sampled_from(["choices", "output", "text", "delta", "type"]))
def test_nothing_in_an_answer_does_harm(output: dict[str, Any], value: Any, name: str) -> None:
    for each in (value, [value], [{"message": value, "delta": value, "content": value}]):
        list(texts_of_answer(output | {name: each}))
        list(texts_of_event(output | {name: each}))


# --- Streams.


def read(chunks: Iterable[bytes]) -> list[Any]:
    reader = EventReader()
    return [event for chunk in chunks for event in reader.feed(chunk)]


@given(st.lists(OBJECTS, max_size=4), st.sampled_from(["\n", "\r\n"]), st.data())
def test_events_are_the_same_wherever_the_stream_is_cut(events: list[Any], end: str, data: st.DataObject) -> None:
    lines = [f": a comment{end}event: x{end}data: {json.dumps(event)}{end}{end}" for event in events]
    stream = ("".join(lines) + f"data: [DONE]{end}{end}").encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    chunks = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(chunks) == events


def test_data_of_several_lines_is_one() -> None:
    assert read([b'data: {"a":\ndata: 1}\n\n']) == [{"a": 1}]


def test_event_that_has_not_ended_is_none_yet() -> None:
    assert read([b'data: {"a": 1}\n']) == []


def test_event_that_is_too_long_is_left_out_and_not_held() -> None:
    reader = EventReader()
    long = b'data: {"a": "' + b"x" * EVENT_MAX_BYTES
    assert list(reader.feed(b'data: {"b": 1}\n\n' + long)) == [{"b": 1}]
    assert len(reader._held) <= 3
    assert list(reader.feed(b'x"}\n')) == []
    assert list(reader.feed(b'\ndata: {"c": 1}\n\n')) == [{"c": 1}]
    assert list(reader.feed(b'data: {"d": "' + b"x" * EVENT_MAX_BYTES + b'"}\n\ndata: {"e": 1}\n\n')) == [{"e": 1}]
