"""JSON as the ledger keeps it: text that every reader can read."""

from __future__ import annotations

import json
from typing import Any, Final

import orjson

_dump: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def json_text(value: Any) -> str:
    """Compact JSON that UTF-8 can carry.

    Half a surrogate pair, which a client's JSON can escape though it is no character, becomes U+FFFD.
    """
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # half a pair, or a number of more than 64 bits
        return _dump(value).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def from_json(text: str | bytes) -> Any:
    """What JSON says. ValueError: it is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # numbers of more than 64 bits, half a pair in escapes: json reads them
        return json.loads(text)
