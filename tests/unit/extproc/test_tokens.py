"""How many tokens a request will use: what of it counts, with which vocabulary, and how it is kept within a maximum."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rs_bpe import openai

from extproc.edit import edited, in_order
from extproc.json_body import places
from extproc.model_input import FILE_TOKENS, IMAGE_LOW_TOKENS, IMAGE_TOKENS, SMALL_MODEL_IMAGE_FACTOR
from extproc.tokens import OUTPUT_TOTAL_MAX, TURN_CHARS, Output, TokenCounter, clamp, output_asked, vocabulary
from extproc.validate import Ask, validate
from gateway.endpoints import Kind
from gateway.errors import Refused
from policies.limits import OUTPUT_TOKENS_MAX
from tests.unit.extproc.extproc_builders import ENDPOINTS, REQUEST_ID
from tests.unit.extproc.json_texts import NAMES, OBJECTS, RANDOMS, VALUES, text_of

KINDS = (Kind.CHAT, Kind.COMPLETION, Kind.EMBEDDING, Kind.RESPONSE)
SHORT = "How are you?"  # 4 tokens in either vocabulary


def asked(kind: Kind, text: str) -> Ask:
    return validate(ENDPOINTS[kind], text.encode(), body_max_bytes=10**9, payload_max_bytes=10**9)


def an_ask(kind: Kind, *, model: str = "gpt-4o", **members: Any) -> Ask:
    return asked(kind, json.dumps({"model": model, **members}))


def counted(kind: Kind, *, model: str = "gpt-4o", **members: Any) -> int:
    return TokenCounter().count(an_ask(kind, model=model, **members))


# --- The vocabulary.


@pytest.mark.parametrize(
    ("model", "older"),
    [
        ("gpt-4o", False),
        ("gpt-4o-mini-2024-07-18", False),
        ("chatgpt-4o-latest", False),
        ("gpt-4.1-nano", False),
        ("gpt-4.5-preview", False),
        ("gpt-5", False),
        ("o1", False),
        ("o3-mini", False),
        ("o4-mini", False),
        ("ft:gpt-4o:acme::x", False),
        ("llama-3.3-70b", False),
        ("my-gpt-4", False),
        ("gpt-4", True),
        ("gpt-4-0613", True),
        ("gpt-4-turbo-2024-04-09", True),
        ("gpt-4-32k", True),
        ("openai/gpt-4", True),
        ("ft:gpt-4:acme::x", True),
        ("gpt-3.5-turbo", True),
        ("gpt-35-turbo-16k", True),
        ("ft:gpt-3.5-turbo-0125:acme::x", True),
        ("text-embedding-3-small", True),
        ("text-embedding-ada-002", True),
        ("davinci-002", True),
    ],
)
def test_vocabulary_is_that_of_the_models_family(model: str, older: bool) -> None:
    text = "שלום עולם, привет мир"
    tokens = {False: openai.o200k_base().count(text), True: openai.cl100k_base().count(text)}
    assert tokens[False] != tokens[True]
    assert vocabulary(model).count(text) == tokens[older]


def test_warmed_up_counter_counts() -> None:
    counter = TokenCounter()
    counter.warm_up(("gpt-4o", "gpt-4"))
    assert counter.count(an_ask(Kind.COMPLETION, prompt=SHORT)) == 4


# --- What of the input counts.

USER = {"role": "user", "content": SHORT}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def json_tokens(value: Any) -> int:
    return int(openai.o200k_base().count(json.dumps(value, separators=(",", ":"))))


CHATS: dict[str, tuple[dict[str, Any], int]] = {
    # OpenAI's cookbook: 3 for each message, and role and content as text; 3 for the reply.
    "a message": ({"messages": [USER]}, 3 + (3 + 1 + 4)),
    "two": ({"messages": [USER, USER]}, 3 + 2 * (3 + 1 + 4)),
    "a name": ({"messages": [USER | {"name": "bob"}]}, 3 + (3 + 1 + 4) + 1 + 1),
    "no content": ({"messages": [{"role": "assistant", "content": None}]}, 3 + (3 + 1)),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": SHORT}] * 3}]},
        3 + (3 + 1 + 3 * 4),
    ),
    "tools": ({"messages": [USER], "tools": [TOOL]}, 11 + json_tokens(TOOL) + 2),
    "functions": ({"messages": [USER], "functions": [TOOL["function"]]}, 11 + json_tokens(TOOL["function"]) + 2),
    "a schema": (
        {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": TOOL}},
        11 + json_tokens({"type": "json_schema", "json_schema": TOOL}),
    ),
    "a call": (
        {"messages": [{"role": "assistant", "tool_calls": [TOOL]}]},
        3 + (3 + 1) + json_tokens(TOOL) + 2,
    ),
    "what is no input": ({"messages": [USER], "user": SHORT, "stop": [SHORT], "metadata": {"a": SHORT}}, 11),
}


@pytest.mark.parametrize(("members", "tokens"), CHATS.values(), ids=CHATS)
def test_chat_counts_what_the_model_reads(members: dict[str, Any], tokens: int) -> None:
    assert counted(Kind.CHAT, **members) == tokens


def image(**detail: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9000, **detail}}


PARTS: dict[str, tuple[dict[str, Any], int]] = {
    "an image": (image(), IMAGE_TOKENS),
    "an image in detail": (image(detail="high"), IMAGE_TOKENS),
    "an image in outline": (image(detail="low"), IMAGE_LOW_TOKENS),
    "an image of the responses API": ({"type": "input_image", "image_url": "https://a/b.png"}, IMAGE_TOKENS),
    "its outline": ({"type": "input_image", "image_url": "https://a/b.png", "detail": "low"}, IMAGE_LOW_TOKENS),
    "a recording": ({"type": "input_audio", "input_audio": {"data": "A" * 1600, "format": "wav"}}, 300),
    "a file": ({"type": "file", "file": {"file_data": "A" * 1600, "filename": "a.pdf"}}, 300),
    "a file of the responses API": ({"type": "input_file", "file_data": "A" * 1600}, 300),
    "a named file": ({"type": "file", "file": {"file_id": "file-1"}}, FILE_TOKENS),
    "a refusal": ({"type": "refusal", "refusal": SHORT}, 4),
    "what is not known yet": ({"type": "smell", "of": SHORT}, 4),
}


@pytest.mark.parametrize(("part", "tokens"), PARTS.values(), ids=PARTS)
def test_parts_that_are_no_text_have_an_estimate(part: dict[str, Any], tokens: int) -> None:
    message = {"role": "user", "content": [part]}
    assert counted(Kind.CHAT, messages=[message]) == 3 + 3 + 1 + tokens
    assert counted(Kind.RESPONSE, input=[message]) == 3 + 3 + 1 + tokens


def test_small_model_counts_more_for_an_image() -> None:
    message = {"role": "user", "content": [image()]}
    tokens = counted(Kind.CHAT, model="gpt-4o-mini", messages=[message])
    assert tokens == 3 + 3 + 1 + SMALL_MODEL_IMAGE_FACTOR * IMAGE_TOKENS
    assert tokens > 2833 + 8 * 5667


PROMPTS: dict[str, tuple[Any, int]] = {
    "a text": (SHORT, 4),
    "texts": ([SHORT, SHORT], 8),
    "tokens": ([1, 2, 3], 3),
    "lists of tokens": ([[1, 2, 3], [4]], 4),
    "half a character": ("\ud800", 1),
    "a special token is text": ("<|endoftext|>", 7),
}


@pytest.mark.parametrize(("prompt", "tokens"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_and_inputs_are_texts_or_tokens(prompt: Any, tokens: int) -> None:
    assert counted(Kind.COMPLETION, prompt=prompt) == tokens
    assert counted(Kind.EMBEDDING, input=prompt) == tokens


def test_completion_reads_its_suffix_too() -> None:
    assert counted(Kind.COMPLETION, prompt=SHORT, suffix=SHORT) == 8


RESPONSES: dict[str, tuple[dict[str, Any], int]] = {
    "a text": ({"input": SHORT}, 3 + 4),
    "instructions": ({"input": SHORT, "instructions": SHORT}, 3 + 4 + 4),
    "items": ({"input": [USER, {"type": "message", "id": "msg_1"} | USER]}, 3 + 2 * (3 + 1 + 4)),
    "parts": ({"input": [{"role": "user", "content": [{"type": "input_text", "text": SHORT}]}]}, 3 + 3 + 1 + 4),
    "what a tool said": (
        {"input": [{"type": "function_call_output", "call_id": "c1", "output": SHORT}]},
        3 + 3 + 4,
    ),
    "hidden reasoning": (
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "A" * 1600}]},
        3 + 3 + 300,
    ),
    "tools": ({"input": SHORT, "tools": [TOOL]}, 3 + 4 + json_tokens(TOOL) + 2),
    "a schema": ({"input": SHORT, "text": {"format": TOOL}}, 3 + 4 + json_tokens({"format": TOOL})),
    "a stored prompt": ({"prompt": {"id": "pmpt_1", "variables": {"a": SHORT, "b": image()}}}, 3 + 4 + IMAGE_TOKENS),
}


@pytest.mark.parametrize(("members", "tokens"), RESPONSES.values(), ids=RESPONSES)
def test_response_counts_what_the_model_reads(members: dict[str, Any], tokens: int) -> None:
    assert counted(Kind.RESPONSE, **members) == tokens


def test_inference_counts_as_the_call_it_becomes() -> None:
    def inference(**members: Any) -> int:
        text = json.dumps({"request_id": REQUEST_ID, "model": "gpt-4o", **members})
        return TokenCounter().count(asked(Kind.INFERENCE, text))

    chat = json.dumps({"messages": [USER]})
    assert inference(payload=SHORT) == 4
    assert inference(payload=chat, content_type="application/json") == 11


# --- Any body that validation lets through.

READ = ("messages", "prompt", "input", "instructions", "tools", "functions", "response_format", "suffix", "text")
FIELDS = ("role", "content", "name", "type", "text", "image_url", "detail", "input_audio", "data", "file", "file_data")
WORDS = st.sampled_from((*FIELDS, "image_url", "file", "output", "summary", "encrypted_content", "variables")) | NAMES
ODD = st.recursive(
    VALUES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner | WORDS, max_size=4)),
    max_leaves=10,
)
MESSAGES = st.dictionaries(WORDS, ODD).map(lambda message: message | {"role": "user"})
BODIES = st.fixed_dictionaries(
    {"model": st.sampled_from(["gpt-4o", "gpt-4o-mini", "gpt-4", "m"])},
    optional={name: ODD | st.lists(MESSAGES, min_size=1, max_size=3) for name in READ},
)


@given(st.sampled_from(KINDS), BODIES)
@example(Kind.COMPLETION, {"model": "m", "prompt": [1, "a", None, True, [2, [3]], {"a": 1}, 1.5]})
@example(Kind.CHAT, {"model": "m", "messages": [{"role": "user", "content": [{"type": ["image_url"]}, 7, None]}]})
@example(Kind.CHAT, {"model": "m", "messages": [{"role": "user", "content": [{"type": "file", "file": [1]}]}]})
@example(Kind.RESPONSE, {"model": "m", "input": ["a", 7, None, []], "prompt": "x", "text": "y"})
@example(Kind.RESPONSE, {"model": "m", "input": "a", "instructions": {"\ud800": ["\udfff"]}})
def test_every_sound_body_has_an_estimate(kind: Kind, members: dict[str, Any]) -> None:
    try:
        ask = asked(kind, json.dumps(members))
    except Refused:
        return
    counter = TokenCounter()
    tokens = counter.count(ask)
    assert tokens >= 0
    assert asyncio.run(counter.count_input(ask)) == tokens
    output = output_asked(kind, ask.document.members, model_max=None, assumed=4096)
    assert output.total >= output.choices >= 1 or (kind is Kind.EMBEDDING and output.total == 0)
    clamp(ask, 7)


# --- Long texts.

ENGLISH = "The quick brown fox jumps over the lazy dog. "


async def turns_of_others(ask: Ask) -> tuple[int, int]:
    """The estimate, and how often others got their turn while it was made."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    watching = asyncio.create_task(other())
    await asyncio.sleep(0)
    before = turns
    tokens = await TokenCounter().count_input(ask)
    watching.cancel()
    return tokens, turns - before


LONG: dict[str, dict[str, Any]] = {
    "one text": {"messages": [{"role": "user", "content": ENGLISH * 20_000}]},
    "without a space": {"messages": [{"role": "user", "content": "模型" * 200_000}]},
    "many messages": {"messages": [USER] * 20_000},
    "many parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]},
}


@pytest.mark.parametrize("members", LONG.values(), ids=LONG)
async def test_others_get_their_turn_while_a_long_text_is_counted(members: dict[str, Any]) -> None:
    ask = an_ask(Kind.CHAT, **members)
    tokens, turns = await turns_of_others(ask)
    assert tokens == TokenCounter().count(ask)
    assert turns >= 50


async def test_short_text_is_counted_at_once() -> None:
    _, turns = await turns_of_others(an_ask(Kind.COMPLETION, prompt="x" * (TURN_CHARS - 100)))
    assert turns == 0


async def test_long_counts_take_turns() -> None:
    counter, done = TokenCounter(), []

    async def count(times: int) -> None:
        await counter.count_input(an_ask(Kind.COMPLETION, prompt=ENGLISH * times))
        done.append(times)

    await asyncio.gather(count(20_000), count(10_000), count(500))
    assert done == [500, 10_000, 20_000]


def test_counting_in_portions_is_close_to_counting_at_once() -> None:
    text = ENGLISH * 20_000
    exact = openai.o200k_base().count(text)
    portions = len(text) // TURN_CHARS
    assert exact <= counted(Kind.COMPLETION, prompt=text) <= exact + 3 * portions


# --- The output.


def output(kind: Kind, *, model_max: int | None = None, assumed: int = 4096, **members: Any) -> Output:
    return output_asked(kind, members, model_max=model_max, assumed=assumed)


ASKED: dict[str, tuple[Kind, dict[str, Any], int | None, tuple[int, int, int, str, bool]]] = {
    "nothing": (Kind.CHAT, {}, None, (4096, 1, 4096, "max_completion_tokens", True)),
    "nulls": (
        Kind.CHAT,
        {"max_tokens": None, "max_completion_tokens": None, "n": None},
        None,
        (4096, 1, 4096, "max_completion_tokens", True),
    ),
    "the model's maximum": (Kind.CHAT, {}, 100, (100, 1, 100, "max_completion_tokens", True)),
    "the old name": (Kind.CHAT, {"max_tokens": 7}, None, (7, 1, 7, "max_tokens", False)),
    "the new name": (Kind.CHAT, {"max_completion_tokens": 7}, None, (7, 1, 7, "max_completion_tokens", False)),
    "both": (
        Kind.CHAT,
        {"max_tokens": 9, "max_completion_tokens": 7},
        None,
        (9, 1, 9, "max_completion_tokens", False),
    ),
    "a name of another endpoint": (
        Kind.CHAT,
        {"max_output_tokens": 1},
        None,
        (4096, 1, 4096, "max_completion_tokens", True),
    ),
    "more than the model has": (Kind.CHAT, {"max_tokens": 500}, 100, (100, 1, 100, "max_tokens", False)),
    "more than there is": (
        Kind.CHAT,
        {"max_tokens": 10**12},
        None,
        (OUTPUT_TOKENS_MAX, 1, OUTPUT_TOKENS_MAX, "max_tokens", False),
    ),
    "several": (Kind.CHAT, {"max_tokens": 7, "n": 3}, None, (7, 3, 21, "max_tokens", False)),
    "several of an assumed length": (Kind.CHAT, {"n": 3}, 100, (100, 3, 300, "max_completion_tokens", True)),
    "a completion": (Kind.COMPLETION, {"prompt": "a", "max_tokens": 7}, None, (7, 1, 7, "max_tokens", False)),
    "a completion without": (Kind.COMPLETION, {"prompt": "a"}, None, (4096, 1, 4096, "max_tokens", True)),
    "best of": (
        Kind.COMPLETION,
        {"prompt": "a", "max_tokens": 7, "n": 2, "best_of": 5},
        None,
        (7, 5, 35, "max_tokens", False),
    ),
    "a best of that is none": (
        Kind.COMPLETION,
        {"prompt": "a", "max_tokens": 7, "best_of": "5"},
        None,
        (7, 1, 7, "max_tokens", False),
    ),
    "prompts": (
        Kind.COMPLETION,
        {"prompt": ["a", "b"], "max_tokens": 7, "n": 2},
        None,
        (7, 4, 28, "max_tokens", False),
    ),
    "a prompt of tokens": (Kind.COMPLETION, {"prompt": [1, 2], "max_tokens": 7}, None, (7, 1, 7, "max_tokens", False)),
    "prompts of tokens": (
        Kind.COMPLETION,
        {"prompt": [[1, 2], [3]], "max_tokens": 7},
        None,
        (7, 2, 14, "max_tokens", False),
    ),
    "a response": (Kind.RESPONSE, {"max_output_tokens": 7}, None, (7, 1, 7, "max_output_tokens", False)),
    "a response without": (Kind.RESPONSE, {"max_tokens": 1}, None, (4096, 1, 4096, "max_output_tokens", True)),
    "an embedding": (Kind.EMBEDDING, {"input": ["a"], "max_tokens": 7, "n": 3}, None, (0, 1, 0, "", False)),
    "more answers than there are": (
        Kind.CHAT,
        {"max_tokens": 7, "n": 2**63},
        None,
        (7, OUTPUT_TOTAL_MAX, OUTPUT_TOTAL_MAX, "max_tokens", False),
    ),
}


@pytest.mark.parametrize(("kind", "members", "model_max", "expected"), ASKED.values(), ids=ASKED)
def test_output_is_the_most_that_may_come(
    kind: Kind, members: dict[str, Any], model_max: int | None, expected: tuple[int, int, int, str, bool]
) -> None:
    found = output(kind, model_max=model_max, **members)
    assert (found.per_answer, found.choices, found.total, found.field, found.assumed) == expected


# --- Keeping it within a maximum.


def clamped(ask: Ask, per_answer: int) -> str:
    return edited(ask.document.text, in_order(clamp(ask, per_answer)))


MAXIMUM_NAMES = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MAXIMA = st.dictionaries(st.sampled_from(MAXIMUM_NAMES), st.none() | st.integers(1, 10**6))
CALL = {"model": "m", "messages": [USER], "prompt": "é", "input": "模"}
CHECKED = dict.fromkeys(("stream", "stream_options", "temperature", "top_p", "n"))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """A call with any maxima, its members in any order."""
    odd = {name: value for name, value in draw(OBJECTS).items() if name not in MAXIMUM_NAMES}
    members = {**odd, **CHECKED, **CALL, **draw(MAXIMA)}
    order = draw(st.permutations(sorted(members)))
    return members, text_of({name: members[name] for name in order}, draw(RANDOMS))


@given(st.sampled_from(KINDS), calls(), st.integers(1, 10**6))
def test_clamped_body_asks_for_no_more_and_is_else_the_same(
    kind: Kind, call: tuple[dict[str, Any], str], per_answer: int
) -> None:
    members, written = call
    ask = asked(kind, written)
    text = clamped(ask, per_answer)
    after = json.loads(text)
    found = output_asked(kind, after, model_max=None, assumed=4096)
    assert found.per_answer <= per_answer
    assert not found.assumed
    changed = {name for name in after if name not in members or after[name] != members[name]}
    assert changed <= set(MAXIMUM_NAMES)
    asked_before = output_asked(kind, members, model_max=None, assumed=10**9)
    assert bool(changed) == (asked_before.per_answer > per_answer)
    for name, (start, end) in places(text).items():
        if name not in changed:
            assert text[start:end] == ask.document.raw(name)


CLAMPS: dict[str, tuple[Kind, str, str]] = {
    "named": (
        Kind.CHAT,
        '{"model": "m", "max_tokens" : 99 , "messages": [{"role": "user"}]}',
        '{"model": "m", "max_tokens" : 5 , "messages": [{"role": "user"}]}',
    ),
    "both": (
        Kind.CHAT,
        '{"max_tokens":9,"model":"é","messages":[{"role":"user"}],"max_completion_tokens":6}',
        '{"max_tokens":5,"model":"é","messages":[{"role":"user"}],"max_completion_tokens":5}',
    ),
    "one of both": (
        Kind.CHAT,
        '{"max_tokens":9,"model":"m","messages":[{"role":"user"}],"max_completion_tokens":2}',
        '{"max_tokens":5,"model":"m","messages":[{"role":"user"}],"max_completion_tokens":2}',
    ),
    "added": (
        Kind.CHAT,
        '\n{ "model": "m", "messages": [{"role": "user"}]}',
        '\n{"max_completion_tokens":5, "model": "m", "messages": [{"role": "user"}]}',
    ),
    "null": (
        Kind.CHAT,
        '{"model": "m", "max_completion_tokens": null, "messages": [{"role": "user"}]}',
        '{"model": "m", "max_completion_tokens": 5, "messages": [{"role": "user"}]}',
    ),
    "in escapes": (
        Kind.COMPLETION,
        '{"model": "m", "max\\u005ftokens": 99, "prompt": "\\"max_tokens\\": 99"}',
        '{"model": "m", "max\\u005ftokens": 5, "prompt": "\\"max_tokens\\": 99"}',
    ),
    "a response": (
        Kind.RESPONSE,
        '{"model": "m", "input": "a"}',
        '{"max_output_tokens":5,"model": "m", "input": "a"}',
    ),
    "an embedding": (Kind.EMBEDDING, '{"model": "m", "input": "a"}', '{"model": "m", "input": "a"}'),
    "little enough": (
        Kind.COMPLETION,
        '{"model": "m", "prompt": "a", "max_tokens": 5}',
        '{"model": "m", "prompt": "a", "max_tokens": 5}',
    ),
}


@pytest.mark.parametrize(("kind", "before", "after"), CLAMPS.values(), ids=CLAMPS)
def test_maximum_is_written_where_it_is_read(kind: Kind, before: str, after: str) -> None:
    assert clamped(asked(kind, before), 5) == after


def test_no_answer_is_cut_to_nothing() -> None:
    assert '"max_tokens": 1' in clamped(an_ask(Kind.COMPLETION, prompt="a", max_tokens=9), 0)
