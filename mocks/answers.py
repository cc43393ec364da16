"""What a mock backend answers, in OpenAI's formats: pure functions of the request.

An answer repeats the last text it was sent behind the backend's id. A token is a word. The request may
carry ``mock_events`` (exactly so many words, one a stream event) and ``mock_cached_tokens``; ``max_tokens``,
``max_completion_tokens`` and ``max_output_tokens`` cut the answer as they do for a real model.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final

Body = dict[str, Any]

DIMENSIONS: Final = 8
LIMIT_FIELDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What an answer depends on."""

    backend_id: str
    number: int
    """Of this request at this backend; makes ids."""
    created: int
    body: Body
    text_format: bool = False
    """/v1/completions answers ``{"text", "tokens_used"}``."""

    @property
    def model(self) -> str:
        """The model asked for, which the answer names."""
        return str(self.body["model"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The words of an answer and the numbers of its usage."""

    words: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int

    @property
    def text(self) -> str:
        """The words as one text."""
        return " ".join(self.words)

    def pieces(self) -> Iterator[str]:
        """The text in one piece a word, for a stream."""
        for index, word in enumerate(self.words):
            yield word if index == 0 else f" {word}"

    def usage(self) -> Body:
        """Usage in the form of chat and completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.words),
            "total_tokens": self.prompt_tokens + len(self.words),
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def texts(value: object) -> list[str]:
    """Every text in a prompt, an input or a list of messages, in order."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    if isinstance(value, dict):
        return texts(value.get("content", value.get("text")))
    return []


def reply(ask: Ask, heard: object) -> Reply:
    """Words that answer ``heard``: messages, a prompt or an input."""
    said = texts(heard)
    prompt_tokens = sum(len(text.split()) for text in said)
    words = [ask.backend_id, "heard", str(prompt_tokens), "tokens:", *(said[-1].split() if said else ())]
    finish_reason = "stop"
    events = ask.body.get("mock_events")
    limit = next((ask.body[name] for name in LIMIT_FIELDS if isinstance(ask.body.get(name), int)), None)
    if isinstance(events, int):
        words = list(islice(cycle(words), events))
    elif limit is not None and limit < len(words):
        words, finish_reason = words[:limit], "length"
    return Reply(
        words=tuple(words),
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        cached_tokens=int(ask.body.get("mock_cached_tokens") or 0),
    )


def event(data: object, *, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


DONE: Final = event("[DONE]")


def chat(ask: Ask) -> Body:
    """Answer of /v1/chat/completions."""
    said = reply(ask, ask.body.get("messages"))
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said.text, "refusal": None},
        "logprobs": None,
        "finish_reason": said.finish_reason,
    }
    return _head(ask, "chatcmpl", "chat.completion") | {"choices": [choice], "usage": said.usage()}


def chat_events(ask: Ask) -> Iterator[bytes]:
    """Events of /v1/chat/completions: one a word, the finish, usage if asked for, ``[DONE]``."""
    said = reply(ask, ask.body.get("messages"))

    def choices(piece: str | None) -> list[Body]:
        delta = {} if piece is None else {"role": "assistant", "content": piece}
        finish = said.finish_reason if piece is None else None
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

    return _chunks(ask, _head(ask, "chatcmpl", "chat.completion.chunk"), said, choices)


def completion(ask: Ask) -> Body:
    """Answer of /v1/completions."""
    said = reply(ask, ask.body.get("prompt"))
    if ask.text_format:
        return {"text": said.text, "tokens_used": said.prompt_tokens + len(said.words)}
    choice = {"index": 0, "text": said.text, "logprobs": None, "finish_reason": said.finish_reason}
    return _head(ask, "cmpl", "text_completion") | {"choices": [choice], "usage": said.usage()}


def completion_events(ask: Ask) -> Iterator[bytes]:
    """Events of /v1/completions."""
    said = reply(ask, ask.body.get("prompt"))

    def choices(piece: str | None) -> list[Body]:
        finish = said.finish_reason if piece is None else None
        return [{"index": 0, "text": piece or "", "logprobs": None, "finish_reason": finish}]

    return _chunks(ask, _head(ask, "cmpl", "text_completion"), said, choices)


def _head(ask: Ask, prefix: str, kind: str) -> Body:
    return {"id": f"{prefix}-{ask.backend_id}-{ask.number}", "object": kind, "created": ask.created, "model": ask.model}


def _chunks(ask: Ask, head: Body, said: Reply, choices: Any) -> Iterator[bytes]:
    options = ask.body.get("stream_options")
    with_usage = isinstance(options, dict) and options.get("include_usage") is True
    tail = {"usage": None} if with_usage else {}
    for piece in (*said.pieces(), None):
        yield event(head | {"choices": choices(piece)} | tail)
    if with_usage:
        yield event(head | {"choices": [], "usage": said.usage()})
    yield DONE


def embeddings(ask: Ask) -> Body:
    """Answer of /v1/embeddings: a vector drawn from the digest of each input."""
    inputs = ask.body.get("input")
    items = inputs if isinstance(inputs, list) and not all(isinstance(i, int) for i in inputs) else [inputs]
    size = ask.body.get("dimensions") or DIMENSIONS
    base64_form = ask.body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(item, size, base64_form=base64_form)}
        for index, item in enumerate(items)
    ]
    tokens = sum(len(item.split()) if isinstance(item, str) else len(item or ()) for item in items)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": ask.model, "usage": usage}


def _vector(item: object, size: int, *, base64_form: bool) -> str | list[float]:
    digest = hashlib.shake_256(json.dumps(item).encode()).digest(size)
    vector = [(byte - 128) / 128 for byte in digest]
    return base64.b64encode(struct.pack(f"<{size}f", *vector)).decode() if base64_form else vector
