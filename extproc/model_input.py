"""What a model reads of a call: texts whose tokens are to be counted, and token numbers where there is no text. Pure.

An estimate to reserve by, rather high than low: what a request really used settles it. Sources: OpenAI's cookbook,
"How to count tokens with tiktoken", for messages; OpenAI's guide to images, "Calculating costs", for images. Schemas
count as the JSON they are written in, though a backend words them in its own way. What ``previous_response_id`` or a
stored prompt brings along is not known here and not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from extproc.validate import Ask
from gateway.endpoints import Kind

MESSAGE_TOKENS: Final = 3
"""What marks the start and the end of a message."""
NAME_TOKENS: Final = 1
REPLY_TOKENS: Final = 3
"""Every reply is primed with the start of the assistant's message."""
IMAGE_LOW_TOKENS: Final = 85
IMAGE_TOKENS: Final = 85 + 8 * 170
"""An image is cut to 768 by 2048 pixels, which have at most 8 tiles; how large it is its address does not tell."""
SMALL_MODEL_IMAGE_FACTOR: Final = 34
"""gpt-4o-mini counts 2,833 tokens for an image and 5,667 for each tile."""
FILE_TOKENS: Final = 4096
"""A file or recording that is only named: about four pages."""
BYTES_PER_TOKEN: Final = 4
"""Of files and recordings: about what English text has; recordings have far fewer tokens."""

_MESSAGE_MARKS: Final = frozenset({"type", "id", "status", "call_id"})
_MESSAGE_CONTENT: Final = frozenset({"content", "output", "summary"})
_MESSAGE_DATA: Final = frozenset({"encrypted_content", "result"})
_IMAGE_TYPES: Final = frozenset({"image_url", "input_image", "image", "computer_screenshot"})
_FILE_TYPES: Final = frozenset({"file", "input_file", "input_audio", "audio", "input_video", "video_url", "document"})

Parts = Iterator[str | int]
"""Texts to be counted, and numbers of tokens."""


def model_input(ask: Ask) -> Parts:
    """What the model reads of a sound request. Never raises, whatever the members that validation leaves alone are."""
    members, image_factor = ask.document.members, _image_factor(ask.model)
    match ask.kind:
        case Kind.CHAT:
            yield REPLY_TOKENS
            for message in members["messages"]:
                yield from _message(message, image_factor)
            for name in ("tools", "functions", "response_format"):
                yield from _json(members.get(name))
        case Kind.COMPLETION:
            yield from _prompt(members["prompt"])
            yield from _json(members.get("suffix"))
        case Kind.EMBEDDING:
            yield from _prompt(members["input"])
        case Kind.RESPONSE:
            yield from _response(members, image_factor)
        case _:
            raise AssertionError(ask.kind)


def _image_factor(model: str) -> int:
    return SMALL_MODEL_IMAGE_FACTOR if "gpt-4o-mini" in model else 1


def _prompt(prompt: Any) -> Parts:
    """A text, tokens, or a list of either."""
    if not isinstance(prompt, list):
        yield from _json(prompt)
    elif set(map(type, prompt)) <= {int}:
        yield len(prompt)
    else:
        for each in prompt:
            if isinstance(each, int):
                yield 1
            else:
                yield from _prompt(each)


def _response(members: Mapping[str, Any], image_factor: int) -> Parts:
    yield REPLY_TOKENS
    yield from _content(members.get("instructions"), image_factor)
    asked = members.get("input")
    if isinstance(asked, list):
        for item in asked:
            yield from _message(item, image_factor)
    else:
        yield from _json(asked)
    stored = members.get("prompt")
    variables = stored.get("variables") if isinstance(stored, dict) else None
    if isinstance(variables, dict):
        for value in variables.values():
            yield from _content(value, image_factor)
    for name in ("tools", "text"):
        yield from _json(members.get(name))


def _message(message: Any, image_factor: int) -> Parts:
    """A message of a chat, or an item of a response's input."""
    yield MESSAGE_TOKENS
    if not isinstance(message, dict):
        yield from _json(message)
        return
    for name, value in message.items():
        if name in _MESSAGE_CONTENT:
            yield from _content(value, image_factor)
        elif name in _MESSAGE_DATA and isinstance(value, str):
            yield _data_tokens(value)
        elif name not in _MESSAGE_MARKS:
            if name == "name":
                yield NAME_TOKENS
            yield from _json(value)


def _content(content: Any, image_factor: int) -> Parts:
    """A text, or parts of which some may be no text."""
    if isinstance(content, list):
        for part in content:
            yield from _part(part, image_factor)
    else:
        yield from _part(content, image_factor)


def _part(part: Any, image_factor: int) -> Parts:
    if not isinstance(part, dict):
        yield from _json(part)
        return
    kind = part.get("type")
    if not isinstance(kind, str):
        yield from _json(part)
    elif kind in _IMAGE_TYPES:
        yield image_factor * (IMAGE_LOW_TOKENS if _detail(part) == "low" else IMAGE_TOKENS)
    elif kind in _FILE_TYPES:
        yield _file_tokens(part)
    else:
        for name, value in part.items():
            if name != "type":
                yield from _json(value)


def _detail(part: Mapping[str, Any]) -> Any:
    nested = part.get("image_url")
    return nested.get("detail") if isinstance(nested, dict) else part.get("detail")


def _file_tokens(part: Mapping[str, Any]) -> int:
    """Tokens of the data that a part, or the object in it, carries; a flat number where it is only named."""
    tokens = 0
    for holder in (part, *part.values()):
        if isinstance(holder, dict):
            tokens += sum(
                _data_tokens(value)
                for name, value in holder.items()
                if name in ("data", "file_data") and isinstance(value, str)
            )
    return tokens or FILE_TOKENS


def _data_tokens(base64: str) -> int:
    return -(-len(base64) * 3 // (4 * BYTES_PER_TOKEN))


def _json(value: Any) -> Parts:
    """A text as it is, anything else as the JSON it is written in."""
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield 1
        for each in value:
            yield 1
            yield from _json(each)
    else:
        yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
