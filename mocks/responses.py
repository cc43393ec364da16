"""Answers of /v1/responses, plain and as named events; see :mod:`mocks.answers`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from mocks.answers import Ask, Body, Reply, event, reply


def response(ask: Ask) -> Body:
    """Answer of /v1/responses."""
    return _response(ask, reply(ask, ask.body.get("input")), status="completed")


def response_events(ask: Ask) -> Iterator[bytes]:
    """Events of /v1/responses: created, one delta a word, and ``response.completed`` with the usage."""
    said = reply(ask, ask.body.get("input"))
    numbers = count()
    at = {"item_id": _item_id(ask), "output_index": 0, "content_index": 0}

    def named(name: str, **fields: Any) -> bytes:
        return event({"type": name, "sequence_number": next(numbers)} | fields, name=name)

    started = _response(ask, said, status="in_progress")
    yield named("response.created", response=started)
    yield named("response.in_progress", response=started)
    item = _item(ask, "", status="in_progress") | {"content": []}
    yield named("response.output_item.added", output_index=0, item=item)
    yield named("response.content_part.added", **at, part=_part(""))
    for piece in said.pieces():
        yield named("response.output_text.delta", **at, delta=piece, logprobs=[])
    yield named("response.output_text.done", **at, text=said.text, logprobs=[])
    yield named("response.content_part.done", **at, part=_part(said.text))
    yield named("response.output_item.done", output_index=0, item=_item(ask, said.text, status="completed"))
    yield named("response.completed", response=_response(ask, said, status="completed"))


def _response(ask: Ask, said: Reply, *, status: str) -> Body:
    done = status == "completed"
    usage = {
        "input_tokens": said.prompt_tokens,
        "input_tokens_details": {"cached_tokens": said.cached_tokens},
        "output_tokens": len(said.words),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": said.prompt_tokens + len(said.words),
    }
    return {
        "id": f"resp-{ask.backend_id}-{ask.number}",
        "object": "response",
        "created_at": ask.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": ask.model,
        "output": [_item(ask, said.text, status=status)] if done else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": usage if done else None,
    }


def _item_id(ask: Ask) -> str:
    return f"msg-{ask.backend_id}-{ask.number}"


def _item(ask: Ask, text: str, *, status: str) -> Body:
    return {"id": _item_id(ask), "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}


def _part(text: str) -> Body:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
