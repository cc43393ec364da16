"""gRPC's own framing: messages out of data, statuses into trailers."""

from __future__ import annotations

from itertools import pairwise
from urllib.parse import unquote

import pytest
from hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st

from extproc.http2.grpc import GrpcError, MessageReader, Status, framed, trailers, trailers_only

MAX_BYTES = 1_000


def _fields(block: bytes) -> dict[str, str]:
    return {str(name): str(value) for name, value in Decoder().decode(block)}


@given(messages=st.lists(st.binary(max_size=300), max_size=6), cuts=st.lists(st.integers(0, 2_000), max_size=30))
def test_messages_are_the_same_however_the_data_is_cut(messages: list[bytes], cuts: list[int]) -> None:
    data, reader = b"".join(map(framed, messages)), MessageReader(MAX_BYTES)
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found = [message for start, end in pairwise(bounds) for message in reader.feed(data[start:end])]
    assert found == messages
    assert not reader.in_message


def test_a_message_that_is_not_complete_shows() -> None:
    reader = MessageReader(MAX_BYTES)
    for byte in framed(b"ab")[:-1]:
        assert list(reader.feed(bytes((byte,)))) == []
        assert reader.in_message
    assert list(reader.feed(b"b")) == [b"ab"]
    assert not reader.in_message


@pytest.mark.parametrize(
    ("prefix", "status"),
    [
        pytest.param(b"\x00\x00\x00\x03\xe9", Status.RESOURCE_EXHAUSTED, id="one byte too long"),
        pytest.param(b"\x00\xff\xff\xff\xff", Status.RESOURCE_EXHAUSTED, id="4 GiB"),
        pytest.param(b"\x01\x00\x00\x00\x01", Status.UNIMPLEMENTED, id="compressed"),
    ],
)
def test_what_cannot_be_read_is_said_before_it_has_come(prefix: bytes, status: Status) -> None:
    reader = MessageReader(MAX_BYTES)
    messages = reader.feed(framed(b"before") + prefix)
    assert next(messages) == b"before"
    with pytest.raises(GrpcError) as raised:
        next(messages)
    assert raised.value.status is status


def test_the_longest_message_is_read() -> None:
    assert list(MessageReader(MAX_BYTES).feed(framed(b"x" * MAX_BYTES))) == [b"x" * MAX_BYTES]


@given(text=st.text(max_size=200))
def test_a_status_keeps_its_text_in_printable_ascii(text: str) -> None:
    fields = _fields(trailers(GrpcError(Status.INTERNAL, text)))
    assert fields["grpc-status"] == "13"
    assert fields["grpc-message"].isascii()
    assert all(character.isprintable() for character in fields["grpc-message"])
    assert unquote(fields["grpc-message"], errors="strict") == text


def test_a_long_text_fits_into_one_frame() -> None:
    assert len(trailers_only(GrpcError(Status.INTERNAL, "\N{SNOWMAN}" * 100_000))) < 16_384


def test_trailers_alone_have_the_response_headers_too() -> None:
    assert _fields(trailers_only(None)) == {":status": "200", "content-type": "application/grpc", "grpc-status": "0"}
    assert _fields(trailers(None)) == {"grpc-status": "0"}
