"""Header blocks against ``hpack`` itself: what is remembered is what would have been decoded."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from extproc.http2.frames import ConnectionFault, ErrorCode
from extproc.http2.headers import HeaderDecoder, encode

_NAMES = st.sampled_from([b":path", b"content-type", b"traceparent", b"x-a", b"x-b"])
_FIELDS = st.lists(st.tuples(_NAMES, st.binary(max_size=200)), max_size=6)


@given(
    blocks=st.lists(
        st.tuples(_FIELDS, st.booleans(), st.sampled_from([None, 0, 64, 300, 4096])), min_size=1, max_size=12
    ),
    order=st.lists(st.integers(0, 11), max_size=30),
)
def test_a_block_means_what_it_says_however_often_it_comes(
    blocks: list[tuple[list[tuple[bytes, bytes]], bool, int | None]], order: list[int]
) -> None:
    """The same fields again and again, with and without indexing, while the dynamic table is resized."""
    encoder, decoder, expected = Encoder(), HeaderDecoder(), Decoder()
    for index in order:
        fields, sensitive, table_bytes = blocks[index % len(blocks)]
        if table_bytes is not None:
            encoder.header_table_size = table_bytes
        block = encoder.encode([(name, value, sensitive) for name, value in fields])
        assert decoder.decode(block) == dict(expected.decode(block, raw=True))


def test_the_same_block_after_a_change_of_the_table_means_something_else() -> None:
    decoder, encoder = HeaderDecoder(), Encoder()
    decoder.decode(encoder.encode([("x-a", "1")]))
    newest = b"\xbe"  # entry 62, the first of the dynamic table
    assert decoder.decode(newest) == decoder.decode(newest) == {b"x-a": b"1"}
    decoder.decode(encoder.encode([("x-b", "2")]))
    assert decoder.decode(newest) == {b"x-b": b"2"}


def test_the_same_block_after_the_table_was_emptied_is_an_error() -> None:
    decoder = HeaderDecoder()
    decoder.decode(Encoder().encode([("x-a", "1")]))
    decoder.decode(b"\xbe")
    decoder.decode(b"\x20")  # table size 0
    with pytest.raises(ConnectionFault) as raised:
        decoder.decode(b"\xbe")
    assert raised.value.code is ErrorCode.COMPRESSION_ERROR


def test_the_same_block_after_the_table_was_given_room_is_put_into_it() -> None:
    decoder, block = HeaderDecoder(), b"\x40\x03x-a\x011"  # a literal with incremental indexing
    decoder.decode(b"\x20")  # table size 0
    assert decoder.decode(block) == decoder.decode(block) == {b"x-a": b"1"}
    decoder.decode(b"\x3f\xe1\x1f")  # table size 4096
    decoder.decode(block)
    assert decoder.decode(b"\xbe") == {b"x-a": b"1"}


@given(fields=_FIELDS, long=st.integers(0, 40_000))
def test_our_blocks_mean_the_same_to_every_decoder(fields: list[tuple[bytes, bytes]], long: int) -> None:
    fields = [(b":status", b"200"), *fields, (b":status", b"404"), (b"grpc-message", b"x" * long)]
    decoder = Decoder(max_header_list_size=100_000)
    before = len(decoder.header_table.dynamic_entries)
    assert [(bytes(n), bytes(v)) for n, v in decoder.decode(encode(fields), raw=True)] == fields
    assert len(decoder.header_table.dynamic_entries) == before


@given(block=st.binary(max_size=300))
def test_nonsense_is_a_fault_of_the_connection_and_nothing_else(block: bytes) -> None:
    with suppress(ConnectionFault):
        HeaderDecoder().decode(block)
