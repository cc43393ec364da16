"""Output tokens of an answer whose backend does not report them, counted while it passes."""

from __future__ import annotations

import json
from typing import Final, Protocol

from extproc.answer_text import EventReader, texts_of_answer, texts_of_event
from extproc.tokens import TURN_CHARS, TokenCounter

ANSWER_MAX_BYTES: Final = 2 * 1024 * 1024
"""Of a longer JSON answer nothing is counted: the ledger estimates it by its size."""
PROGRESS_EVENTS: Final = 50
"""So many events at most go by until the next count; fewer at the start of a stream."""


class Counting(Protocol):
    """Takes the parts of one answer."""

    async def add(self, part: bytes) -> None:
        """One more part."""

    async def progress(self) -> int | None:
        """Output tokens so far; None while there is nothing new worth telling."""
        ...

    async def total(self) -> int | None:
        """Output tokens of the answer, which is complete; None where they cannot be counted."""
        ...


class CountedJson:
    """A JSON answer: nothing can be said of it before its end."""

    __slots__ = ("_model", "_parts", "_size", "_tokens")

    def __init__(self, model: str, tokens: TokenCounter) -> None:
        self._model = model
        self._tokens = tokens
        self._parts: list[bytes] = []
        self._size = 0

    async def add(self, part: bytes) -> None:
        """One more part."""
        self._size += len(part)
        if self._size > ANSWER_MAX_BYTES:
            self._parts.clear()
        else:
            self._parts.append(part)

    async def progress(self) -> int | None:
        """Never."""
        return None

    async def total(self) -> int | None:
        """Tokens of its texts; None where it is too long or no JSON."""
        if self._size > ANSWER_MAX_BYTES:
            return None
        try:
            output = json.loads(b"".join(self._parts))
        except (ValueError, RecursionError):
            return None
        return await self._tokens.count_output(self._model, tuple(texts_of_answer(output)))


class CountedStream:
    """An event stream. Its texts are counted and forgotten as soon as they are a tokenizer's portion."""

    __slots__ = ("_chars", "_counted", "_due", "_events", "_model", "_reader", "_texts", "_tokens")

    def __init__(self, model: str, tokens: TokenCounter) -> None:
        self._model = model
        self._tokens = tokens
        self._reader = EventReader()
        self._texts: dict[str, list[str]] = {}
        self._chars = 0
        self._counted = 0
        self._events = 0
        self._due = 1

    async def add(self, part: bytes) -> None:
        """One more part."""
        for event in self._reader.feed(part):
            before = self._chars
            for whole, text in texts_of_event(event):
                self._texts.setdefault(whole, []).append(text)
                self._chars += len(text)
            self._events += self._chars > before
            if self._chars >= TURN_CHARS:
                self._counted += await self._pending()
                self._texts.clear()
                self._chars = 0

    async def progress(self) -> int | None:
        """Tokens so far, once there are about a quarter more events than the last time, or fifty."""
        if self._events < self._due:
            return None
        self._due = self._events + max(1, min(PROGRESS_EVENTS, self._events // 4))
        return await self.total()

    async def total(self) -> int:
        """Tokens of all texts."""
        return self._counted + await self._pending()

    async def _pending(self) -> int:
        return await self._tokens.count_output(self._model, tuple(map("".join, self._texts.values())))
