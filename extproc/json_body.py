"""Strict JSON (RFC 8259) that can tell where a member of the top-level object stands.

The places make it possible to replace one value and pass every other byte through as it came. Duplicate
keys at any depth, NaN, numbers no backend can hold and deep nesting are refused, because two parsers that
disagree about a body are a way around validation.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from gateway.errors import Reason, Refused

DEPTH_MAX: Final = 64
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_INT_MAX: Final = 2**63
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A parsed body: its text and the members of its top-level object."""

    text: str
    members: dict[str, Any]

    def place(self, name: str) -> tuple[int, int]:
        """Where the value of a top-level member stands in the text: first character and the one after the last."""
        key = f'"{name}"'
        # Written once and nothing is written in escapes: then this is the member, not a nested one or a value.
        if self.text.count(key) == 1 and "\\u" not in self.text:
            colon = _skip(self.text, self.text.index(key) + len(key))
            start = _skip(self.text, colon + 1)
            return start, _ANY.raw_decode(self.text, start)[1]
        return places(self.text)[name]

    def raw(self, name: str) -> str:
        """A top-level member's value as it was written."""
        start, end = self.place(name)
        return self.text[start:end]


def written(value: Any) -> str:
    """JSON text of a value that UTF-8 can carry: with an unpaired surrogate in it, all of it in escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _SURROGATE.search(text) is None else json.dumps(value)


def _malformed(text: str, param: str | None = None) -> Refused:
    return Refused(Reason.MALFORMED_BODY, text, param=param)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _malformed(f"The key {_shown(name)} stands twice in one object.", name[:64])
            seen.add(name)
    return found


def _no_constant(constant: str) -> NoReturn:
    raise _malformed(f"{constant} is not a JSON number.")


def _bounded_int(digits: str) -> int:
    if len(digits) < 19:  # noqa: PLR2004 - every such number has at most 64 bits
        return int(digits)
    if len(digits) > 20 or not -_INT_MAX <= (number := int(digits)) < 2 * _INT_MAX:  # noqa: PLR2004
        raise _malformed("A number is too large: integers have at most 64 bits.")
    return number


def _bounded_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _malformed("A number is too large for a 64-bit float.")
    return number


_ANY: Final = json.JSONDecoder()
_STRICT: Final = json.JSONDecoder(
    object_pairs_hook=_no_duplicates,
    parse_constant=_no_constant,
    parse_int=_bounded_int,
    parse_float=_bounded_float,
)


def _shown(name: str) -> str:
    return json.dumps(name[:64])


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= DEPTH_MAX:
        return
    depth = 0
    for bracket in re.finditer(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', text, re.DOTALL):
        match text[bracket.start()]:
            case "[" | "{":
                depth += 1
                if depth > DEPTH_MAX:
                    raise _malformed(f"The body is nested deeper than {DEPTH_MAX} levels.")
            case "]" | "}":
                depth -= 1
            case _:
                pass


def parse(body: bytes | str) -> Document:
    """Parse a body that must be one JSON object.

    Raises:
        Refused: MALFORMED_BODY, saying what is wrong and where.
    """
    if isinstance(body, str):
        text = body
    else:
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _malformed(f"The body is not valid UTF-8 (byte {error.start}).") from error
    _check_depth(text)
    if not text.strip(" \t\n\r"):
        raise _malformed("The body is empty; send a JSON object.")
    try:
        return _object(text)
    except json.JSONDecodeError as error:
        raise _malformed(
            f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from error


def _object(text: str) -> Document:
    value = _STRICT.decode(text)
    if not isinstance(value, dict):
        raise _malformed("The body must be a JSON object.")
    return Document(text=text, members=value)


def places(text: str) -> dict[str, tuple[int, int]]:
    """Where the value of every top-level member of a valid JSON object stands in its text."""
    found: dict[str, tuple[int, int]] = {}
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] != "}":
        name, at = _ANY.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        _, end = _ANY.raw_decode(text, start)
        found[name] = (start, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found
