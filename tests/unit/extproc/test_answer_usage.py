"""What an answer says of its use, in every format; that Envoy reads the same is an integration test."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from extproc.answer_usage import Usage, reported
from tests.unit.extproc.json_texts import OBJECTS, VALUES


def of(tokens_input: int, tokens_output: int, **details: int) -> Usage:
    return Usage(tokens_input=tokens_input, tokens_output=tokens_output, **details)


DETAILS = {"tokens_input_cached": 2, "tokens_output_reasoning": 4}
USAGES: dict[str, tuple[dict[str, Any], Usage | None]] = {
    "OpenAI": ({"usage": {"prompt_tokens": 3, "completion_tokens": 5}}, of(3, 5)),
    "responses": ({"usage": {"input_tokens": 3, "output_tokens": 5}}, of(3, 5)),
    "details of OpenAI": (
        {
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 2},
                "completion_tokens_details": {"reasoning_tokens": 4},
            }
        },
        of(3, 5, **DETAILS),
    ),
    "details of responses": (
        {
            "usage": {
                "input_tokens": 3,
                "output_tokens": 5,
                "input_tokens_details": {"cached_tokens": 2},
                "output_tokens_details": {"reasoning_tokens": 4},
            }
        },
        of(3, 5, **DETAILS),
    ),
    "text": ({"text": "hi", "tokens_used": 5}, of(0, 5)),
    "both": ({"usage": {"prompt_tokens": 3, "completion_tokens": 5}, "tokens_used": 8}, of(3, 5)),
    "one alone": ({"usage": {"prompt_tokens": 3}}, of(3, 0)),
    "texts": ({"usage": {"prompt_tokens": " 3", "completion_tokens": "5"}}, of(3, 5)),
    "a fraction": ({"usage": {"prompt_tokens": 3.7, "completion_tokens": 5}}, of(3, 5)),
    "negative": ({"usage": {"prompt_tokens": -3, "completion_tokens": 5}}, of(0, 5)),
    "too many": ({"usage": {"prompt_tokens": 10**400, "completion_tokens": 10**9 + 1}}, None),
    "words": ({"usage": {"prompt_tokens": "3_0", "completion_tokens": "five"}}, None),
    "no number": ({"usage": {"prompt_tokens": "nan", "completion_tokens": "inf"}}, None),
    "details alone": ({"usage": {"prompt_tokens_details": {"cached_tokens": 2}}}, None),
    "none": ({}, None),
    "null": ({"usage": None}, None),
    "no object": ({"usage": [1]}, None),
}


@pytest.mark.parametrize(("output", "usage"), USAGES.values(), ids=USAGES)
def test_tokens_are_found_in_every_format(output: dict[str, Any], usage: Usage | None) -> None:
    assert reported(output) == usage


@given(OBJECTS, VALUES, VALUES)
def test_whatever_stands_there_is_a_count_or_nothing(output: dict[str, Any], usage: Any, tokens: Any) -> None:
    for found in (reported(output | {"usage": usage}), reported(output | {"usage": {"prompt_tokens": tokens}})):
        assert found is None or (0 <= found.tokens_input <= 10**9 and 0 <= found.tokens_output <= 10**9)
