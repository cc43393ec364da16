"""Output tokens as they are counted while an answer passes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.counting import ANSWER_MAX_BYTES, PROGRESS_EVENTS, CountedJson, CountedStream
from extproc.tokens import TURN_CHARS, TokenCounter, vocabulary

MODEL = "gpt-4o"


def tokens(text: str) -> int:
    return vocabulary(MODEL).count(text)


def event(text: str, *, index: int = 0) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': index, 'delta': {'content': text}}]})}\n\n".encode()


async def total(*parts: bytes) -> int | None:
    counting = CountedJson(MODEL, TokenCounter())
    for part in parts:
        await counting.add(part)
        assert await counting.progress() is None
    return await counting.total()


def chat(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


async def test_json_answer_is_counted_when_it_is_whole() -> None:
    whole = chat("How are you?")
    assert await total(whole[:10], whole[10:]) == tokens("How are you?")


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff"], ids=["nothing", "half", "deep", "no text"])
async def test_answer_that_is_no_json_is_not_counted(body: bytes) -> None:
    assert await total(body) is None


async def test_answer_that_is_too_long_is_not_counted_and_not_held() -> None:
    counting = CountedJson(MODEL, TokenCounter())
    for _ in range(3):
        await counting.add(b"x" * (ANSWER_MAX_BYTES // 2))
    assert counting._parts == []
    assert await counting.total() is None


async def test_stream_is_counted_as_the_text_it_adds_up_to() -> None:
    counting = CountedStream(MODEL, TokenCounter())
    for piece in ("Tok", "en", "iz", "ation"):
        await counting.add(event(piece))
    assert await counting.total() == tokens("Tokenization") < sum(map(tokens, ("Tok", "en", "iz", "ation")))


async def test_choices_of_a_stream_are_texts_of_their_own() -> None:
    counting = CountedStream(MODEL, TokenCounter())
    for piece in ("Tok", "en"):
        await counting.add(event(piece, index=0) + event(piece, index=1))
    assert await counting.total() == 2 * tokens("Token")


async def test_long_stream_holds_no_more_than_a_portion() -> None:
    counting, word = CountedStream(MODEL, TokenCounter()), " word" * 100
    for _ in range(100):
        await counting.add(event(word))
        assert counting._chars < TURN_CHARS
    assert await counting.total() == pytest.approx(tokens(word * 100), abs=10)


async def test_progress_is_told_at_once_then_at_growing_intervals() -> None:
    counting, told = CountedStream(MODEL, TokenCounter()), []
    for number in range(1, 1001):
        await counting.add(event(" word"))
        if (so_far := await counting.progress()) is not None:
            assert so_far == number
            told.append(number)
    assert told[:5] == [1, 2, 3, 4, 5]
    gaps = [later - earlier for earlier, later in pairwise(told)]
    assert max(gaps) == PROGRESS_EVENTS
    assert all(gap <= max(1, earlier // 4) for earlier, gap in zip(told, gaps, strict=False))


@given(st.lists(st.text(max_size=20), max_size=20))
async def test_events_without_text_are_no_progress(texts: list[str]) -> None:
    counting = CountedStream(MODEL, TokenCounter())
    for text in texts:
        await counting.add(event(text) + b"data: [DONE]\n\n: ping\n\n")
    assert (await counting.progress() is None) == (not any(texts))
