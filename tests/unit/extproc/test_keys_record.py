"""Key records and their stored form."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.keys.record import KeyRecord, RecordInvalid, digest, fields_of, from_json, record_from, to_json

A_DIGEST = digest("rk-alice")
SMALLEST = {"id": "alice", "organization_id": "acme", "digest": A_DIGEST}

identifiers = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,127}", fullmatch=True)
names = st.frozensets(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40), max_size=4)
secrets = st.text(st.characters(codec="utf-8"), min_size=16, max_size=40)
records = st.builds(
    KeyRecord,
    id=identifiers,
    organization_id=identifiers,
    digest=st.binary().map(lambda content: hashlib.sha256(content).hexdigest()),
    principal_id=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    principal_type=st.sampled_from(["", "user", "service"]),
    scopes=names,
    status=st.sampled_from(["active", "revoked", "expired"]),
    expires_at=st.none() | st.floats(min_value=0, max_value=1e11),
    allowed_models=st.none() | names,
    signing_secret=secrets,
    require_signature=st.booleans(),
)


def test_digest_is_sha256_of_the_whole_key() -> None:
    assert digest("rk-alice") == hashlib.sha256(b"rk-alice").hexdigest()
    assert digest("rk-alice") != digest("rk-alic")


@given(record=records)
def test_record_survives_its_stored_form(record: KeyRecord) -> None:
    assert record_from(fields_of(record)) == record
    assert from_json(to_json(record)) == record


def test_smallest_record_allows_every_model_and_does_not_expire() -> None:
    record = record_from(SMALLEST)
    assert (record.status, record.expires_at, record.allowed_models, record.scopes) == (
        "active",
        None,
        None,
        frozenset(),
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": "a b"}, "id"),
        ({"id": "a\r\nx-router-org: b"}, "id"),
        ({"id": "alice\n"}, "id"),
        ({"id": 7}, "id"),
        ({"organization_id": "*"}, "organization_id"),
        ({"organization_id": "a" * 129}, "organization_id"),
        ({"digest": A_DIGEST.upper()}, "digest"),
        ({"digest": A_DIGEST[:-1]}, "digest"),
        ({"digest": A_DIGEST + "\n"}, "digest"),
        ({"status": "ACTIVE"}, "status"),
        ({"scopes": "inference"}, "scopes"),
        ({"scopes": [""]}, "scopes.0"),
        ({"scopes": None}, "scopes"),
        ({"allowed_models": ["gpt-4o", 4]}, "allowed_models.1"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": float("nan")}, "expires_at"),
        ({"expires_at": True}, "expires_at"),
        ({"signing_secret": "short"}, "signing_secret"),
        ({"require_signature": "yes", "signing_secret": "rs-0123456789abcdef"}, "require_signature"),
        ({"require_signature": True}, "record"),
        ({"admin": True}, "admin"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_a_stored_form_is_checked(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RecordInvalid) as invalid:
        record_from(SMALLEST | changes)
    assert str(invalid.value).startswith(f"{field}: ")


def test_every_problem_is_named_at_once_and_no_value_is_repeated() -> None:
    with pytest.raises(RecordInvalid) as invalid:
        record_from({"id": "hunter2 hunter2", "signing_secret": "hunter2"})
    assert {path[0] for path, _ in invalid.value.problems} == {"id", "organization_id", "digest", "signing_secret"}
    assert "hunter2" not in str(invalid.value)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "null", '"x"', "[" * 100_000, "{}"], ids=lambda text: text[:9])
def test_what_is_not_a_record_is_invalid(text: str) -> None:
    with pytest.raises(RecordInvalid):
        from_json(text)


@given(
    fields=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(sorted(SMALLEST)), inner),
    )
)
def test_any_json_is_a_record_or_invalid(fields: Any) -> None:
    with suppress(RecordInvalid):
        assert from_json(json.dumps(fields)).id
