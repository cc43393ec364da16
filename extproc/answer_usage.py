"""What a JSON answer says of its use, read as Envoy's json_to_metadata does and as the ledger takes it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway import names
from gateway.answer_usage import TOKENS_MAX, USAGE_PATHS


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens; cached ones are part of the input, reasoning ones of the output."""

    tokens_input: int
    tokens_output: int
    tokens_input_cached: int = 0
    tokens_output_reasoning: int = 0


def reported(output: Mapping[str, Any]) -> Usage | None:
    """The backend's own counts, one that is left out being 0; None where it says neither of input nor of output."""
    found: dict[str, float] = {}
    for path, key in USAGE_PATHS:
        number = _number(_at(output, path))
        if number is not None:
            found[key] = number
    counts = {key: int(number) for key, number in found.items() if 0 <= number <= TOKENS_MAX}
    if names.METADATA_TOKENS_INPUT not in counts and names.METADATA_TOKENS_OUTPUT not in counts:
        return None
    return Usage(
        tokens_input=counts.get(names.METADATA_TOKENS_INPUT, 0),
        tokens_output=counts.get(names.METADATA_TOKENS_OUTPUT, 0),
        tokens_input_cached=counts.get(names.METADATA_TOKENS_INPUT_CACHED, 0),
        tokens_output_reasoning=counts.get(names.METADATA_TOKENS_OUTPUT_REASONING, 0),
    )


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        if not isinstance(value, dict):
            return None
        value = value.get(step)
    return value


def _number(value: Any) -> float | None:
    """As Envoy converts it: a text that is a number counts too."""
    if isinstance(value, str):
        try:
            return float(value) if value.isascii() and "_" not in value else None
        except ValueError:
            return None
    return value if isinstance(value, int | float) else None
