"""Requests as entries of the spool: records hold against the schema, and nothing a client sends is in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gateway import names
from limits.about import About
from limits.model import LimitKind, Opened
from policies.model import KeyId, OrganizationId
from tests.harness.usage import problems_of
from tests.unit.usage.usage_builders import (
    CHARGE_TO,
    FLAG_FIELDS,
    PRICES,
    REQUEST_ID,
    START_S,
    Told,
    a_finished,
    a_spool,
    a_usage,
    figures_of,
    line_of,
    message_of,
)
from usage.access_log import decode
from usage.entries import entry_of, estimate_of
from usage.finished import Malformed
from usage.journal import decode_line
from usage.record import record_id
from usage.spool import EXPIRE, Changes

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "usage-record.schema.json").read_text())
CONTRACT = {"record_id", "request_id", "organization_id", "api_key_id", "model", "backend_id"} | {
    *("tokens_input", "tokens_output", "latency_ms", "cost_usd", "limit_state", "decision_reason", "timestamp")
}
"""Required fields, as the contract has them."""
OPTIONAL = {"usage_source", "budget_snapshot", "retry_count", "policy_version", "status"} | {
    *("trace_id", "span_id", "metadata")
}


def a_record(**changes: Any) -> dict[str, Any]:
    """The record that is written down of a request."""
    entry = entry_of(a_finished(**changes))
    assert entry is not None
    assert entry.record is not None
    return dict(json.loads(entry.record))


def an_opened(**changes: Any) -> Opened:
    fields: dict[str, Any] = {
        "request_id": REQUEST_ID,
        "organization_id": OrganizationId("acme"),
        "key_id": KeyId("k-1"),
        "admitted_ms": START_S * 1000 + 7,
        "tokens_input": 10,
        "tokens_output": 90,
        "micro_usd": 1400,
        "about": About(model="gpt-4o", endpoint="chat", policy="0a1b", prices=PRICES).written(),
    }
    return Opened(**(fields | changes))


# --- The schema.


def test_schema_is_a_schema_and_explains_every_property() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    properties = SCHEMA["properties"] | SCHEMA["properties"]["budget_snapshot"]["properties"]
    for name, told in properties.items():
        assert {"description", "x-unit", "x-source"} <= set(told), name
    assert SCHEMA["additionalProperties"] is False


def test_schema_has_what_the_contract_promises() -> None:
    assert set(SCHEMA["required"]) >= CONTRACT
    assert set(SCHEMA["properties"]) >= OPTIONAL


def test_schema_knows_no_more_than_records_have() -> None:
    everything = a_record(
        reported=a_usage(1, 2),
        client_request_id=REQUEST_ID,
        figures=figures_of((LimitKind.MONTHLY_MICRO_USD, "org", 5)),
        labels='{"team":"a"}',
        admitted_ms=START_S * 1000,
    )
    assert set(everything) == set(SCHEMA["properties"])


# --- Records of every kind hold against it.

FINISHED = st.fixed_dictionaries(
    {},
    optional={
        "key_id": st.text(max_size=5),
        "model": st.text(min_size=1, max_size=5),
        "stream": st.booleans(),
        "admitted_ms": st.integers(0, 253_402_300_799_999),
        "status": st.sampled_from([0, 200, 400, 502, 599]),
        "flags": st.lists(st.sampled_from(list(FLAG_FIELDS)), max_size=2).map(tuple),
        "reason": st.sampled_from(["", "RATE_LIMIT_EXCEEDED", "BUDGET_EXCEEDED", "QUOTA_EXCEEDED"]),
        "decision": st.sampled_from(["", "PRIMARY", "FAILOVER", "OVERRIDE"]),
        "backend": st.sampled_from(["", "a", "gone"]),
        "attempts": st.integers(0, 5),
        "body_bytes": st.integers(0, 10**9),
        "events": st.integers(0, 2000),
        "reported": st.none() | st.builds(a_usage, st.integers(0, 10**9), st.integers(0, 10**9)),
        "counted": st.none() | st.builds(a_usage, st.integers(0, 10**9), st.integers(0, 10**9)),
        "prices": st.sampled_from(["", PRICES]),
        "figures": st.lists(
            st.tuples(st.sampled_from(LimitKind), st.sampled_from(["org", "key/a"]), st.integers(-(10**9), 10**9))
        ).map(lambda figures: figures_of(*figures)),
        "trace": st.sampled_from(["", f"{'ab' * 16}-{'cd' * 8}"]),
        "labels": st.dictionaries(st.text(max_size=3), st.text(max_size=3)).map(lambda d: json.dumps(d) if d else ""),
        "started_us": st.integers(0, 4 * 10**15),
    },
)


@given(FINISHED)
def test_every_record_holds_against_the_schema(changes: dict[str, Any]) -> None:
    if changes.get("reason"):  # whoever is refused has reached no backend
        changes |= {"backend": "", "reported": None, "counted": None, "admitted": False}
    assert problems_of(a_record(**changes)) == []


@given(
    st.builds(
        About,
        model=st.text(max_size=5),
        endpoint=st.sampled_from(["", "chat", "inference"]),
        policy=st.sampled_from(["", "0a1b"]),
        prices=st.sampled_from(["", PRICES]),
        client_request_id=st.sampled_from(["", REQUEST_ID]),
        trace=st.sampled_from(["", f"{'ab' * 16}-{'cd' * 8}"]),
    ),
    st.integers(0, 10**9),
)
def test_every_estimate_holds_against_the_schema(about: About, micro_usd: int) -> None:
    entry = estimate_of(an_opened(about=about.written(), micro_usd=micro_usd))
    assert entry.record is not None
    record = json.loads(entry.record)
    assert problems_of(record) == []
    assert record["cost_micro_usd"] == micro_usd


def test_estimate_is_what_was_reserved_and_gives_way_to_what_is_told_later() -> None:
    entry = estimate_of(an_opened())
    assert entry.record is not None
    record = json.loads(entry.record)
    assert (record["tokens_input"], record["tokens_output"], record["cost_micro_usd"]) == (10, 90, 1400)
    assert (record["usage_source"], record["revision"], entry.revision) == ("estimated", 0, 0)
    assert record["timestamp"] == record["admitted_at"] == "2027-01-15T08:00:00.007000Z"
    assert entry.settlement == EXPIRE
    told = entry_of(a_finished())
    assert told is not None
    assert told.revision > entry.revision
    assert a_record()["record_id"] == record["record_id"] == record_id(REQUEST_ID)


def test_estimate_of_a_request_of_which_only_the_model_is_known() -> None:
    entry = estimate_of(an_opened(about="gpt-4o"))
    assert entry.record is not None
    record = json.loads(entry.record)
    assert problems_of(record) == []
    assert (record["model"], record["endpoint"], record["backend_id"]) == ("gpt-4o", "", "")


# --- What is written down of what.


def test_nobody_leaves_nothing() -> None:
    assert entry_of(a_finished(organization_id="", admitted=False)) is None


@pytest.mark.parametrize(
    ("changes", "kind", "has_record", "is_settled"),
    [
        ({}, "forwarded", True, True),
        ({"reason": "RATE_LIMIT_EXCEEDED", "admitted": False}, "limited", True, False),
        ({"reason": "BUDGET_EXCEEDED", "admitted": False}, "limited", True, False),
        ({"reason": "MODEL_NOT_FOUND", "admitted": False}, "refused", False, False),
        ({"reason": names.REASON_REPEATED, "admitted": False}, "repeated", False, False),
        ({"reason": names.REASON_LISTED, "admitted": False, "model": ""}, "listed", False, False),
        ({"reason": "SERVICE_UNAVAILABLE", "backend": ""}, "forwarded", True, True),
    ],
    ids=["forwarded", "rate", "budget", "refused", "repeated", "listed", "admitted, then a failure of ours"],
)
def test_entry_of_each_kind(changes: dict[str, Any], kind: str, has_record: bool, is_settled: bool) -> None:
    entry = entry_of(a_finished(**changes), tried_s=7)
    assert entry is not None
    assert (entry.kind, entry.record is not None, entry.settlement is not None) == (kind, has_record, is_settled)
    assert entry.tried_s == 7


def test_settlement_has_what_the_record_has() -> None:
    finished = a_finished(reported=a_usage(100, 50, cached=40))
    entry = entry_of(finished)
    assert entry is not None
    settlement = entry.settlement
    assert settlement is not None
    assert settlement != EXPIRE
    record = a_record(reported=a_usage(100, 50, cached=40))
    assert settlement.micro_usd == record["cost_micro_usd"] == (60 * 5000 + 40 * 2500 + 50 * 15_000) // 1000
    assert settlement.tokens == record["tokens_input"] + record["tokens_output"] == 150
    assert (settlement.admitted_s, settlement.charge_to) == (START_S, CHARGE_TO)


# --- Nothing that somebody sends or that happens to a file is in the way.


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ("\\ud800", "\ufffd"),
        ("a\\udfff\\ud800b", "a\ufffd\ufffdb"),
        ("\\ud83d\\ude00", "\U0001f600"),
        ("\\u0000", "\0"),
        ("\\u2028", "\u2028"),
    ],
)
def test_whatever_a_client_labels_its_request_with_is_written_down(tmp_path: Path, label: str, kept: str) -> None:
    """JSON can say what UTF-8 cannot: half a character."""
    told = Told(limits={names.METADATA_LABELS: f'{{"team":"{label}"}}'})
    [finished] = decode(message_of(told)).finished
    entry = entry_of(finished)
    assert entry is not None
    a_spool(tmp_path).write(Changes(entries=[entry]))
    assert entry.record is not None
    assert json.loads(entry.record)["metadata"] == {"team": kept}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


GOOD = line_of(Told(usage={"tokens_input": 5, "tokens_output": 7}, limits={"labels": '{"a":"b"}', "tokens_input": "3"}))
INSTEAD = st.sampled_from(
    [b"-1", b"1e3", b'"x"', b"null", b"[]", b"{}", b"true", b"1" * 40, b'"\\ud800"', b"NaN", b'"9.9"']
)


@given(st.sampled_from(list(json.loads(GOOD))), INSTEAD)
def test_field_of_another_kind_is_told_or_written_down(directory: Path, name: str, instead: bytes) -> None:
    fields = {key: json.dumps(value).encode() for key, value in json.loads(GOOD).items()} | {name: instead}
    take(directory, b"{" + b",".join(b'"%s":%s' % (key.encode(), value) for key, value in fields.items()) + b"}")


@given(st.data())
def test_damaged_line_is_told_or_written_down(directory: Path, data: st.DataObject) -> None:
    line = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    take(directory, bytes(line))


def take(directory: Path, line: bytes) -> None:
    """What the ledger does with a line: nothing but Malformed may come of it."""
    spool = a_spool(directory)
    try:
        told = decode_line(line)
        if hasattr(told, "prices"):
            entry = entry_of(told)
            spool.write(Changes(entries=[entry] if entry is not None else []))
        else:
            spool.write(Changes(attempts=[told]))
    except Malformed:
        pass
    finally:
        spool.close()
