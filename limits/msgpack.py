"""Values for the scripts as MessagePack, as far as they need it. Pure. Specification: msgpack.org."""

from __future__ import annotations

import struct
from typing import Final

INTEGER: Final = 0xD3
"""What stands before an integer of 64 bits, big-endian: for those who pack many of them in one go."""


def encode(*values: str | int | bool | None) -> bytes:
    """Values one after the other; integers have 64 bits."""
    return b"".join(map(_encode, values))


def _encode(value: str | int | bool | None) -> bytes:
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return struct.pack(">Bq", INTEGER, value)
    text = value.encode()
    return struct.pack(">BI", 0xDB, len(text)) + text
