"""Header blocks: those that come are decoded by ``hpack``, those that go are constants (RFC 7541)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from hpack import Decoder, HPACKError

from extproc.http2.frames import ConnectionFault, ErrorCode

Fields = Mapping[bytes, bytes]

MAX_LIST_BYTES: Final = 65_536
"""SETTINGS_MAX_HEADER_LIST_SIZE; a block that is longer before it is decoded is refused too."""
_KNOWN_MAX: Final = 64
NO_TABLE: Final = b"\x20"
"""Dynamic table size update to 0 (RFC 7541, 6.3): blocks made here use no table, whatever the peer allows for it."""
_STATUS_200: Final = b"\x88"
_STATIC_NAMES: Final = {b":status": b"\x08", b"content-type": b"\x0f\x10"}
_LENGTH_MAX: Final = 0x7F


class HeaderDecoder:
    """Decodes the blocks of one connection, in the order they come.

    Envoy opens every stream by the same bytes, so what they mean is remembered for as long as the dynamic table,
    which they refer to, stays as it is.
    """

    __slots__ = ("_decoder", "_known")

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_LIST_BYTES)
        self._known: dict[bytes, Fields] = {}

    def decode(self, block: bytes) -> Fields:
        """Values by name; of a name that is repeated the last.

        Raises:
            ConnectionFault: the block cannot be decoded; from there on no other can (RFC 9113, 4.3).
        """
        known = self._known.get(block)
        if known is not None:
            return known
        before = self._table()
        try:
            fields = {bytes(name): bytes(value) for name, value in self._decoder.decode(block, raw=True)}
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, str(error)) from error
        after = self._table()
        if after[0] is not before[0] or after[1:] != before[1:]:
            self._known.clear()
        elif len(self._known) < _KNOWN_MAX:
            self._known[block] = fields
        return fields

    def _table(self) -> tuple[object, int, int]:
        """The dynamic table's newest entry, length and limit: one of them changes with the table."""
        table = self._decoder.header_table
        entries = table.dynamic_entries
        return (entries[0] if entries else None), len(entries), table.maxsize


def encode(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block of literals without indexing (RFC 7541, 6.2.2): it means the same on every connection, at any time."""
    return b"".join(_field(name, value) for name, value in fields)


def _field(name: bytes, value: bytes) -> bytes:
    if (name, value) == (b":status", b"200"):
        return _STATUS_200
    return (_STATIC_NAMES.get(name) or b"\x00" + _string(name)) + _string(value)


def _string(text: bytes) -> bytes:
    """A string that is not Huffman coded, behind its length (RFC 7541, 5.1 and 5.2)."""
    size = len(text)
    if size < _LENGTH_MAX:
        return bytes((size,)) + text
    length, rest = bytearray((_LENGTH_MAX,)), size - _LENGTH_MAX
    while rest > _LENGTH_MAX:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    length.append(rest)
    return bytes(length) + text
