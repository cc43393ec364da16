"""Strategies for JSON as clients write it: any spacing, any escapes, any spelling of numbers."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from hypothesis import strategies as st

_SPACES = ("", "", " ", "\n", "\t \r\n")
# Names that the router looks for, near misses, and names that have to be escaped.
NAMES = st.one_of(
    st.sampled_from(
        ["model", "stream_options", "stream", "a", '"model"', 'model":', "mod\\u0065l", "模型", "😀", "\\"]
    ),
    st.text(max_size=5),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    NAMES,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=5)
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f", "/": "\\/"}


def text_of(value: Any, random: Random) -> str:
    """A JSON text of ``value``: any spacing, and each character raw where it may be, or in an escape."""

    def space() -> str:
        return random.choice(_SPACES)

    def string(text: str) -> str:
        escaped = random.choice((0.0, 0.5, 1.0))
        return f'"{"".join(_character(c, escape=random.random() < escaped, random=random) for c in text)}"'

    def write(item: Any) -> str:
        match item:
            case str():
                return string(item)
            case dict():
                members = (f"{space()}{string(n)}{space()}:{space()}{write(v)}{space()}" for n, v in item.items())
                return f"{{{','.join(members) or space()}}}"
            case list():
                return f"[{','.join(f'{space()}{write(each)}{space()}' for each in item) or space()}]"
            case _:
                return json.dumps(item)

    return space() + write(value) + space()


def _character(character: str, *, escape: bool, random: Random) -> str:
    must = character in '"\\' or character < " " or "\ud800" <= character <= "\udfff"
    if not (must or escape):
        return character
    if character in _SHORT and random.random() < 0.5:
        return _SHORT[character]
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


RANDOMS = st.integers(0, 2**32).map(Random)


def objects(values: st.SearchStrategy[dict[str, Any]] = OBJECTS) -> st.SearchStrategy[tuple[dict[str, Any], str]]:
    """An object and a text of it."""
    return st.builds(lambda value, random: (value, text_of(value, random)), values, RANDOMS)
