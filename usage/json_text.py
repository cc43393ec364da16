"""JSON as the ledger keeps it: text that every reader can read."""

from __future__ import annotations

import json
from typing import Any, Final

_dump: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def json_text(value: Any) -> str:
    """Compact JSON that UTF-8 can carry.

    Half a surrogate pair, which a client's JSON can escape though it is no character, becomes U+FFFD.
    """
    text = _dump(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
