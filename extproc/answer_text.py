"""Texts of an answer that a model has made, whole or event by event. Pure; never raises, whatever the answer holds.

Sources: OpenAI API reference, chat completions, completions and responses and their streaming events; ``reasoning`` and
``reasoning_content`` are vLLM's and others'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

EVENT_MAX_BYTES: Final = 1024 * 1024
"""A longer event is not looked at."""
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n")
_REASONING: Final = ("reasoning_content", "reasoning")
"""Two names of the same text; some backends send both."""
_ITEM_TEXTS: Final = ("name", "arguments", "input", "code", "text", "refusal")

Text = tuple[str, str]
"""What a text is part of, such as ``0 content``, and the text: deltas of one whole are read together."""


def texts_of_answer(output: Any) -> Iterator[str]:
    """Texts of a JSON answer in any of the formats that backends have."""
    if not isinstance(output, dict):
        return
    for choice in _objects(output.get("choices")):
        for _, text in _choice(choice, "message"):
            yield text
    for item in _objects(output.get("output")):
        yield from _item(item)
    if isinstance(output.get("text"), str):
        yield output["text"]


def texts_of_event(event: Any) -> Iterator[Text]:
    """Texts that an event of a stream adds."""
    if not isinstance(event, dict):
        return
    for choice in _objects(event.get("choices")):
        yield from _choice(choice, "delta")
    kind, delta = event.get("type"), event.get("delta")
    # Of a response the deltas count; what is done is told once more as a whole. Sound is no text.
    if isinstance(kind, str) and isinstance(delta, str) and kind.endswith(".delta") and "audio.delta" not in kind:
        yield f"{event.get('output_index')} {event.get('content_index')} {kind}", delta


class EventReader:
    """Cuts a stream into events, wherever its chunks begin and end; holds at most one event."""

    __slots__ = ("_held", "_skipping")

    def __init__(self) -> None:
        self._held = b""
        self._skipping = False

    def feed(self, chunk: bytes) -> Iterator[Any]:
        """The JSON data of each event that the chunk completes; anything else is left out."""
        *complete, rest = _EVENT_END.split(self._held + chunk)
        if complete and self._skipping:
            self._skipping, complete = False, complete[1:]
        if len(rest) > EVENT_MAX_BYTES:
            # Its end may be cut in two, so what could be a part of that stays.
            self._skipping, rest = True, rest[-3:]
        self._held = rest
        for event in complete:
            data = b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
            if len(data) > EVENT_MAX_BYTES:
                continue
            try:
                yield json.loads(data)
            except (ValueError, RecursionError):
                continue


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for each in value:
            if isinstance(each, dict):
                yield each


def _choice(choice: dict[str, Any], part: str) -> Iterator[Text]:
    index = choice.get("index")
    if isinstance(choice.get("text"), str):
        yield f"{index} text", choice["text"]
    message = choice.get(part)
    if not isinstance(message, dict):
        return
    reasoning = next((name for name in _REASONING if message.get(name)), _REASONING[0])
    for name in ("content", "refusal", reasoning):
        for text in _content(message.get(name)):
            yield f"{index} {name}", text
    for at, call in enumerate(_objects(message.get("tool_calls"))):
        number = call.get("index", at)
        for text in (*_function(call.get("function")), *_function(call.get("custom"))):
            yield f"{index} call {number}", text
    for text in _function(message.get("function_call")):
        yield f"{index} call", text


def _function(function: Any) -> Iterator[str]:
    if isinstance(function, dict):
        for name in ("name", "arguments", "input"):
            if isinstance(function.get(name), str):
                yield function[name]


def _content(content: Any) -> Iterator[str]:
    """A text, or parts that may have one."""
    if isinstance(content, str):
        yield content
    for part in _objects(content):
        for name in ("text", "refusal"):
            if isinstance(part.get(name), str):
                yield part[name]


def _item(item: dict[str, Any]) -> Iterator[str]:
    """An item of a response's output: a message, a call, or reasoning."""
    for name in ("content", "summary"):
        yield from _content(item.get(name))
    for name in _ITEM_TEXTS:
        if isinstance(item.get(name), str):
            yield item[name]
