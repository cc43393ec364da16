"""The access log's codec against Envoy's own messages, as another protobuf library has them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from envoy_data_plane.envoy.data.accesslog.v3 import TcpAccessLogEntry
from envoy_data_plane.envoy.service.accesslog.v3 import (
    StreamAccessLogsMessage,
    StreamAccessLogsMessageTcpAccessLogEntries,
)
from hypothesis import given
from hypothesis import strategies as st

from gateway import names
from policies.model import ModelName, Price
from tests.unit.usage.usage_builders import a_finished, a_message, a_usage, an_entry, metadata_of
from usage.access_log import TOKENS_MAX, Finished, decode, message
from xds.resources.encode import Json

IDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12)
SIMPLE_IDS = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
COUNTS = st.integers(0, TOKENS_MAX)
MICRO_USD = st.integers(0, 10**9)
PRICES = st.builds(
    Price,
    input_micro_usd_per_1k=MICRO_USD,
    output_micro_usd_per_1k=MICRO_USD,
    cached_input_micro_usd_per_1k=st.none() | MICRO_USD,
)
FINISHED = st.builds(
    Finished,
    request_id=IDS,
    organization_id=IDS,
    key_id=IDS,
    model=IDS,
    backend=st.just("") | SIMPLE_IDS,
    status=st.sampled_from([0, 200, 402, 429, 503]),
    flags=st.sampled_from([(), ("downstream_connection_termination",), ("no_healthy_upstream", "upstream_overflow")]),
    attempts=st.integers(0, 5),
    started_s=st.integers(0, 2**32),
    body_bytes=st.integers(0, 2**40),
    stream=st.booleans(),
    closed=st.booleans(),
    usage=st.none() | st.builds(a_usage, COUNTS, COUNTS, cached=COUNTS),
    tokens_input=st.integers(0, 2**60),
    tokens_output=st.integers(0, 2**60),
    prices=st.dictionaries(SIMPLE_IDS, PRICES, max_size=3),
    charge_to=st.sampled_from(["", "org:DAILY org:MONTHLY", "org:DAILY org:MONTHLY key/a b:DAILY"]),
)


def finished_of(**usage: Json) -> Finished:
    """What becomes of a request of which the filters wrote this usage."""
    metadata = {**metadata_of(a_finished()), names.USAGE_NAMESPACE: usage}
    [finished] = decode(bytes(a_message(an_entry(metadata=metadata)))).finished
    return finished


@given(st.lists(FINISHED, max_size=4))
def test_requests_come_out_of_envoys_message_as_they_were(ended: list[Finished]) -> None:
    batch = decode(bytes(a_message(*map(an_entry, ended))))
    assert (batch.finished, batch.malformed) == (tuple(ended), ())


@given(st.lists(FINISHED, max_size=3))
def test_both_codecs_read_and_write_the_same_messages(ended: list[Finished]) -> None:
    theirs = a_message(*map(an_entry, ended))
    ours = message("envoy.service.accesslog.v3.StreamAccessLogsMessage").FromString(bytes(theirs))
    assert StreamAccessLogsMessage.parse(ours.SerializeToString()) == theirs
    assert decode(ours.SerializeToString()).finished == tuple(ended)


@pytest.mark.parametrize(
    ("written", "usage"),
    [
        ({}, None),
        ({"tokens_input": 3, "tokens_output": 4}, a_usage(3, 4)),
        ({"tokens_input": 3, "tokens_output": 4, "tokens_input_cached": 2}, a_usage(3, 4, cached=2)),
        ({"tokens_input": 3}, a_usage(3, 0)),
        ({"tokens_output": 4}, a_usage(0, 4)),
        ({"tokens_input": 0, "tokens_output": 0}, a_usage(0, 0)),
        ({"tokens_input_cached": 2}, None),
        ({"tokens_input": "3", "tokens_output": True}, None),
        ({"tokens_input": -1, "tokens_output": 4}, a_usage(0, 4)),
        ({"tokens_input": float("nan"), "tokens_output": float("inf")}, None),
        ({"tokens_input": 1e300, "tokens_output": TOKENS_MAX + 1}, None),
        ({"tokens_input": TOKENS_MAX, "tokens_output": 4.0}, a_usage(TOKENS_MAX, 4)),
    ],
    ids=str,
)
def test_usage_is_what_a_backend_can_have_counted(written: dict[str, Json], usage: object) -> None:
    assert finished_of(**written).usage == usage


@pytest.mark.parametrize(
    ("namespace", "key", "value"),
    [
        (names.METADATA_NAMESPACE, names.METADATA_ORGANIZATION, ""),
        (names.METADATA_NAMESPACE, names.METADATA_PRICES, "a=5000"),
        (names.METADATA_NAMESPACE, names.METADATA_PRICES, "a=5000,x,"),
        (names.LIMITS_NAMESPACE, names.METADATA_TOKENS_INPUT, "ten"),
        (names.LIMITS_NAMESPACE, names.METADATA_TOKENS_OUTPUT, "-1"),
        (names.LIMITS_NAMESPACE, names.METADATA_TOKENS_OUTPUT, "1" * 5000),
        (names.LIMITS_NAMESPACE, names.METADATA_TOKENS_OUTPUT, "٣"),
    ],
)
def test_entry_that_cannot_be_used_costs_no_other(namespace: str, key: str, value: str) -> None:
    good = a_finished(request_id="good")
    metadata = metadata_of(a_finished())
    bad = an_entry(metadata={**metadata, namespace: {**metadata[namespace], key: value}})
    batch = decode(bytes(a_message(bad, an_entry(good), bad)))
    assert batch.finished == (good,)
    assert len(batch.malformed) == 2
    assert a_finished().request_id in batch.malformed[0]


def test_entry_without_a_request_id_or_metadata_is_malformed() -> None:
    batch = decode(bytes(a_message(an_entry(a_finished(request_id="")), an_entry(metadata={}))))
    assert (len(batch.finished), len(batch.malformed)) == (0, 2)


def test_request_that_ended_before_its_decision_has_no_more_than_its_caller() -> None:
    told = {names.METADATA_ORGANIZATION: "acme", names.METADATA_KEY: "k-1"}
    gone = a_finished(status=0, backend="")
    [finished] = decode(bytes(a_message(an_entry(gone, metadata={names.METADATA_NAMESPACE: told})))).finished
    assert finished == replace(gone, model=ModelName(""), tokens_input=0, tokens_output=0, prices={}, charge_to="")


@pytest.mark.parametrize("data", [b"\xff", b"\x12\x05abc", bytes(range(200))])
def test_bytes_that_are_no_message_are_malformed(data: bytes) -> None:
    batch = decode(data)
    assert (batch.finished, len(batch.malformed)) == ((), 1)


def test_message_of_nothing_tells_nothing() -> None:
    for nothing in (StreamAccessLogsMessage(), a_message()):
        assert decode(bytes(nothing)) == decode(b"")
        assert decode(bytes(nothing)).malformed == ()


def test_entry_of_a_connection_is_malformed() -> None:
    told = StreamAccessLogsMessage(
        tcp_logs=StreamAccessLogsMessageTcpAccessLogEntries(log_entry=[TcpAccessLogEntry(), TcpAccessLogEntry()])
    )
    assert len(decode(bytes(told)).malformed) == 2
