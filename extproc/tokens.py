"""How many tokens a request uses: texts as a tokenizer counts them, an answer still to come by the maximum asked for.

The tokenizer holds the interpreter's lock while it counts, so a thread would not help the event loop. Long texts are
counted in portions with the loop in between: 8 MB take 0.2 to 0.5 s of a processor, a portion at worst some ms.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol

from rs_bpe import openai

from extproc.edit import Edit, setting
from extproc.model_input import model_input
from extproc.validate import Ask
from gateway.endpoints import Kind
from policies.limits import OUTPUT_TOKENS_MAX

TURN_CHARS: Final = 8192
"""Counted at a time: 0.2 ms of English, at worst 2 ms."""
PART_CHARS: Final = 32
"""What one part costs besides its characters, in characters."""
OUTPUT_TOTAL_MAX: Final = 1_000_000_000
"""All answers of one request: more than that is not asked for in earnest, and sums with it stay exact."""

_CL100K: Final = re.compile(
    r"(?:.*/)?(?:ft:)?(?:gpt-4(?:[-:].*)?|gpt-3\.?5.*|text-embedding-.*|(?:davinci|babbage)-002.*)"
)
"""Models with the older vocabulary (tiktoken, model.py); every other has o200k_base, or is counted as if it had."""
_MAXIMA: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.CHAT: ("max_completion_tokens", "max_tokens"),
    Kind.COMPLETION: ("max_tokens",),
    Kind.RESPONSE: ("max_output_tokens",),
}
"""Members that bound an answer, the one to add where there is none first."""


class Vocabulary(Protocol):
    """What tokens of a text are counted with."""

    def count(self, text: str, /) -> int:
        """Tokens of a text. Raises UnicodeEncodeError for an unpaired surrogate."""
        ...


@lru_cache(maxsize=1024)
def vocabulary(model: str) -> Vocabulary:
    """The vocabulary of a model's family. The first use of each loads it, which takes about 0.1 s."""
    found: Vocabulary = openai.cl100k_base() if _CL100K.fullmatch(model) else openai.o200k_base()
    return found


class TokenCounter:
    """Counts the input of requests and the output of answers; one for each event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    def warm_up(self, models: Iterable[str]) -> None:
        """Load the vocabularies of these models, so that none of their requests waits for one.

        A vocabulary takes 30 (cl100k) or 65 MB (o200k), so one that no model needs is not loaded.
        """
        for model in models:
            vocabulary(model).count("warm")

    def count(self, ask: Ask) -> int:
        """Estimate of a sound request's input tokens, at once."""
        return sum(_turns(vocabulary(ask.model), model_input(ask)))

    async def count_input(self, ask: Ask) -> int:
        """As :meth:`count`; where the text is long others get their turn meanwhile, among them other long counts."""
        if len(ask.document.text) <= TURN_CHARS:
            return self.count(ask)
        return await self._in_turns(_turns(vocabulary(ask.model), model_input(ask)))

    async def count_output(self, model: str, texts: Sequence[str]) -> int:
        """Tokens of what a model has answered; long answers as long input."""
        turns = _turns(vocabulary(model), texts)
        return sum(turns) if sum(map(len, texts)) <= TURN_CHARS else await self._in_turns(turns)

    async def _in_turns(self, turns: Iterator[int]) -> int:
        total = 0
        while True:
            async with self._turn:
                portion = next(turns, None)
                await asyncio.sleep(0)
            if portion is None:
                return total
            total += portion


def _turns(words: Vocabulary, parts: Iterable[str | int]) -> Iterator[int]:
    """Tokens of the parts, in portions that take about as long each."""
    tokens = done_chars = 0
    for part in parts:
        done_chars += PART_CHARS
        if isinstance(part, int):
            tokens += part
        elif len(part) <= TURN_CHARS:
            tokens += _count(words, part)
            done_chars += len(part)
        else:
            for at in range(0, len(part), TURN_CHARS):
                yield _count(words, part[at : at + TURN_CHARS])
        if done_chars >= TURN_CHARS:
            yield tokens
            tokens = done_chars = 0
    yield tokens


def _count(words: Vocabulary, text: str) -> int:
    try:
        return words.count(text)
    except UnicodeEncodeError:  # JSON can write half a character, which no tokenizer takes
        return words.count(text.encode(errors="replace").decode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a request may be answered with, in tokens: ``choices`` answers of at most ``per_answer``, ``total`` in all.

    ``field`` is the member of the body that bounds an answer, or that would: ``assumed`` when there is none. All is 0
    and the field empty where no text is made.
    """

    per_answer: int
    choices: int
    total: int
    field: str
    assumed: bool


_NO_OUTPUT: Final = Output(per_answer=0, choices=1, total=0, field="", assumed=False)


def output_asked(kind: Kind, members: Mapping[str, Any], *, model_max: int | None, assumed: int) -> Output:
    """The most that a call may be answered with, as it asks or else as is assumed; never above ``model_max``.

    Of two maxima the larger counts: backends do not agree on which of them they read.
    """
    fields = _MAXIMA.get(kind)
    if fields is None:
        return _NO_OUTPUT
    named = {name: maximum for name in fields if (maximum := _whole(members.get(name))) is not None}
    per_answer = max(named.values()) if named else assumed if model_max is None else model_max
    per_answer = min(per_answer, OUTPUT_TOKENS_MAX if model_max is None else model_max)
    choices = min(_choices(kind, members), OUTPUT_TOTAL_MAX)
    return Output(
        per_answer=per_answer,
        choices=choices,
        total=min(per_answer * choices, OUTPUT_TOTAL_MAX),
        field=next(iter(named), fields[0]),
        assumed=not named,
    )


def clamp(ask: Ask, per_answer: int) -> tuple[Edit, ...]:
    """The edits after which no answer may have more tokens; none where that holds already."""
    fields = _MAXIMA.get(ask.kind, ())
    named = {name: maximum for name in fields if (maximum := _whole(ask.document.members.get(name))) is not None}
    wanted = str(max(1, per_answer))
    above = [name for name, maximum in named.items() if maximum > per_answer] if named else fields[:1]
    return tuple(setting(ask.document, name, wanted) for name in above)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 1 else None


def _choices(kind: Kind, members: Mapping[str, Any]) -> int:
    """How many answers are made; ``best_of`` are made and paid for even where only ``n`` are shown."""
    choices = _whole(members.get("n")) or 1
    if kind is Kind.COMPLETION:
        return max(choices, _whole(members.get("best_of")) or 1) * _prompts(members.get("prompt"))
    return choices


def _prompts(prompt: Any) -> int:
    """How many prompts there are: a list of tokens is one."""
    if not isinstance(prompt, list):
        return 1
    return max(1, sum(not isinstance(each, int) for each in prompt))
