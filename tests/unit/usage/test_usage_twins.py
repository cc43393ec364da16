"""Envoy tells of a request twice, by gRPC and in the journal: both come to the same, whatever a client has chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import names
from tests.unit.usage.usage_builders import FLAG_FIELDS, REQUEST_ID, START_S, Told, line_of, message_of
from usage.access_log import Batch, decode
from usage.finished import FailedAttempt, Finished, Malformed
from usage.journal import BEGINS, decode_line, is_attempt, last_of, request_id_of
from usage.record import kind_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NASTY = st.sampled_from(
    [
        '"}{"attempts":1,"request_id":"stolen',
        "?api_key=secret",
        '","request_id":"stolen',
        '"listener":"backends"',
        "\n",
        "\r\n",
        "\u2028",
        "\\",
        '\\"request_id\\":\\"x',
        "\x00é",
    ]
)
CHOSEN = st.one_of(TEXTS, NASTY, st.builds(lambda a, b: a + b, NASTY, TEXTS))
"""What a client can choose: a path, a model, labels."""
DECIMALS = st.integers(0, 10**12).map(str)
NUMBERS = st.one_of(
    st.integers(-5, 2**53), st.floats(-10, 1e18, allow_nan=False), st.booleans(), st.none(), st.just("7")
)
ENDINGS = st.lists(st.sampled_from(list(FLAG_FIELDS)), unique=True, max_size=3).map(
    lambda flags: tuple(sorted(flags, key=list(FLAG_FIELDS).index))
)


def _some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


SAID = _some(
    {
        names.METADATA_ORGANIZATION: TEXTS,
        names.METADATA_KEY: TEXTS,
        names.METADATA_MODEL: CHOSEN,
        names.METADATA_ENDPOINT: st.just("chat"),
        names.METADATA_STREAM: st.booleans(),
        names.METADATA_CLOSED: st.booleans(),
        names.METADATA_PRICES: TEXTS,
        names.METADATA_CHARGE_TO: TEXTS,
        names.METADATA_POLICY: TEXTS,
        names.METADATA_REASON: TEXTS,
    }
)
LIMITS = _some(
    {
        names.METADATA_TOKENS_INPUT: DECIMALS,
        names.METADATA_TOKENS_OUTPUT: DECIMALS,
        names.METADATA_ADMITTED_MS: st.integers(0, 10**17).map(str),
        names.METADATA_FIGURES: TEXTS,
        names.METADATA_TRACE: TEXTS,
        names.METADATA_CLIENT_REQUEST_ID: TEXTS,
        names.METADATA_LABELS: CHOSEN,
    }
)
USAGE = _some(
    dict.fromkeys(
        [
            names.METADATA_TOKENS_INPUT,
            names.METADATA_TOKENS_OUTPUT,
            names.METADATA_TOKENS_INPUT_CACHED,
            names.METADATA_TOKENS_OUTPUT_REASONING,
            names.METADATA_EVENTS,
        ],
        NUMBERS,
    )
)
COUNTED = _some({names.METADATA_TOKENS_INPUT: DECIMALS, names.METADATA_TOKENS_OUTPUT: DECIMALS})
TOLD = st.builds(
    Told,
    request_id=st.uuids().map(str),
    path=CHOSEN.map("/".__add__),
    status=st.sampled_from([0, 200, 206, 400, 429, 502, 599]),
    flags=ENDINGS,
    attempts=st.integers(0, 9),
    started_ns=st.integers(0, 4 * 10**18),
    duration_ms=st.integers(0, 10**7),
    body_bytes=st.integers(0, 10**12),
    backend=TEXTS,
    decision=st.sampled_from(["", "PRIMARY", "FAILOVER", "OVERRIDE"]),
    cluster=st.sampled_from(["", "be_a", "be_be_", "router_unrouted"]),
    said=SAID,
    limits=LIMITS,
    usage=USAGE,
    counted=COUNTED,
)


@given(TOLD)
def test_both_ways_come_to_the_same(told: Told) -> None:
    assert decode(message_of(told)) == Batch(finished=(decode_line(line_of(told)),))  # type: ignore[arg-type]


@given(TOLD)
def test_both_ways_tell_the_same_of_a_failed_attempt(told: Told) -> None:
    failed = Told(
        request_id=told.request_id,
        cluster=f"bk_{told.backend}",
        status=told.status,
        flags=told.flags,
        started_ns=told.started_ns,
        duration_ms=told.duration_ms,
        path=told.path,
        listener=names.LISTENER_BACKENDS,
    )
    by_line = decode_line(line_of(failed))
    assert isinstance(by_line, FailedAttempt)
    assert by_line.backend == told.backend
    assert decode(message_of(failed), names.LISTENER_BACKENDS) == Batch(attempts=(by_line,))


@given(TOLD)
def test_no_client_can_choose_what_a_line_is_about(told: Told) -> None:
    line = line_of(told)
    assert b"\n" not in line
    assert request_id_of(line) == told.request_id
    assert not is_attempt(line)


@given(TOLD, st.sampled_from(["path", "cluster", "backend"]), CHOSEN)
def test_no_attempt_can_hide_that_it_is_one(told: Told, name: str, chosen: str) -> None:
    line = line_of(Told(**{"request_id": told.request_id, "listener": names.LISTENER_BACKENDS, name: chosen}))
    assert is_attempt(line)
    assert request_id_of(line) == told.request_id


@given(st.lists(st.tuples(TOLD, st.booleans()), min_size=1, max_size=6))
def test_what_cannot_be_used_does_not_stop_the_others(several: list[tuple[Told, bool]]) -> None:
    """Without a request id nothing can be used."""
    told = [each if good else Told(request_id="", path=each.path) for each, good in several]
    batch = decode(message_of(*told))
    assert [ended.request_id for ended in batch.finished] == [each.request_id for each, good in several if good]
    assert len(batch.malformed) == sum(not good for _, good in several)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_told(garbage: bytes) -> None:
    batch = decode(b"\x12\xff" + garbage)
    assert batch.malformed
    assert not batch.finished


@given(st.one_of(st.binary(max_size=100), TEXTS.map(str.encode)))
def test_bytes_that_are_no_line_are_told(garbage: bytes) -> None:
    with pytest.raises(Malformed):
        decode_line(garbage)
    request_id_of(garbage)


@given(TOLD)
def test_what_nobody_known_has_asked_for_needs_no_request_id(told: Told) -> None:
    """Envoy refuses what is no request before it gives it an id."""
    unknown = replace(told, request_id="", said={}, limits={}, usage={}, counted={})
    batch = decode(message_of(unknown))
    assert batch == Batch(finished=(decode_line(line_of(unknown)),))  # type: ignore[arg-type]
    assert [(ended.request_id, kind_of(ended)) for ended in batch.finished] == [("", "anonymous")]
    assert request_id_of(line_of(unknown)) == ""


def test_what_somebody_known_has_asked_for_needs_a_request_id() -> None:
    told = Told(request_id="")
    assert decode(message_of(told)).malformed
    with pytest.raises(Malformed, match="names no request"):
        decode_line(line_of(told))


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("/v1/models?api_key=secret", "/v1/models"),
        ("/v1/models?a=1?b=2", "/v1/models"),
        ("?api_key=secret", ""),
        ("/v1/a%3Fb", "/v1/a%3Fb"),
        ("/a#b?api_key=secret", "/a#b"),
        ("*", "*"),
    ],
)
def test_query_of_a_path_is_not_kept(asked: str, kept: str) -> None:
    """A journal that was written before Envoy left it out has it still."""
    told = Told(path=asked)
    [ended] = decode(message_of(told)).finished
    assert ended.path == kept
    assert decode_line(line_of(told)) == decode_line(line_of(replace(told, path=kept))) == ended


# --- Lines that a full disk has torn.


@given(TOLD, TOLD, st.data())
def test_line_is_read_though_a_torn_one_is_before_it(torn: Told, whole: Told, data: st.DataObject) -> None:
    part, line = line_of(torn), line_of(replace(whole, request_id=REQUEST_ID))
    part = part[: data.draw(st.integers(0, len(part)))]
    ended = decode_line(part + line)
    assert isinstance(ended, Finished)
    assert ended == decode_line(line)
    assert last_of(part + line) == line
    assert request_id_of(part + line) == REQUEST_ID


@given(TOLD, TOLD)
def test_torn_line_does_not_change_what_the_next_one_tells_of(ended: Told, attempt: Told) -> None:
    failed = Told(request_id=attempt.request_id, path=attempt.path, listener=names.LISTENER_BACKENDS)
    assert not is_attempt(line_of(failed)[:-3] + line_of(ended))
    assert is_attempt(line_of(ended)[:-3] + line_of(failed))


@given(TOLD)
def test_nobody_can_make_a_line_seem_to_begin(told: Told) -> None:
    line = line_of(told)
    assert line.startswith(BEGINS)
    assert line.count(BEGINS) == 1
    assert last_of(line) is line


def test_torn_line_is_told_where_no_whole_one_follows() -> None:
    line = line_of(Told())
    for torn in (line[:-3], line + line[:-3], line[20:], line[:50] + line[60:]):
        with pytest.raises(Malformed):
            decode_line(torn)


# --- The moment of the admission.


@pytest.mark.parametrize(
    ("told_ms", "admitted_ms"),
    [("1800000000123", 1_800_000_000_123), ("", 0), ("253402300799999", 253_402_300_799_999), ("253402300800000", 0)],
    ids=["a moment", "none", "the last of 9999", "no date can name it"],
)
def test_moment_of_the_admission_is_what_ext_proc_tells(told_ms: str, admitted_ms: int) -> None:
    told = Told(limits={names.METADATA_ADMITTED_MS: told_ms} if told_ms else {})
    [ended] = decode(message_of(told)).finished
    assert ended.admitted_ms == admitted_ms
    assert decode_line(line_of(told)) == ended


def test_microseconds_of_the_start_are_the_same_before_and_after_the_second() -> None:
    for nanos in (0, 1, 999, 1000, 999_999_999):
        told = Told(started_ns=START_S * 10**9 + nanos)
        [ended] = decode(message_of(told)).finished
        assert ended.started_us == START_S * 10**6 + nanos // 1000
        assert decode_line(line_of(told)) == ended


def test_request_id_of_a_line_without_one_is_empty() -> None:
    assert request_id_of(b"{}") == ""
    assert request_id_of(line_of(Told(request_id=""))) == ""
    assert request_id_of(line_of(Told(path=f'"request_id":"{REQUEST_ID}"', request_id=""))) == ""


@pytest.mark.parametrize("cluster", ["router_unrouted", "router_status", "bk_a", ""])
def test_cluster_that_leads_to_no_backend_is_none(cluster: str) -> None:
    told = Told(backend="", cluster=cluster, status=429)
    [ended] = decode(message_of(told)).finished
    assert ended.last_backend == ""
    assert decode_line(line_of(told)) == ended
