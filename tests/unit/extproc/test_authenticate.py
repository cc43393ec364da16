"""Authentication: keys out of headers, records judged, signatures and scopes checked."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.authenticate import (
    Scope,
    authenticate,
    has_scope,
    presented_key,
    require_scope,
    try_authenticate,
    verify_signature,
)
from extproc.keys.record import Caller, KeyRecord, PresentedKey, digest
from extproc.keys.store import ASK, Ask
from gateway.errors import Reason, Refused, StoreUnavailable
from policies.model import KeyId, OrganizationId

NOW = 1_800_000_000.0
SECRET = "rs-0123456789abcdef"


def a_record(key: str = "rk-alice", **changes: Any) -> KeyRecord:
    fields: dict[str, Any] = {"id": KeyId("alice"), "organization_id": OrganizationId("acme"), "digest": digest(key)}
    return KeyRecord(**(fields | changes))


def a_caller(**changes: Any) -> Caller:
    return a_record(**changes).caller


class FakeKeys:
    """A store that knows some records at once, others only when asked, or is down."""

    name = "fake"

    def __init__(self, *records: KeyRecord, ask: bool = False, down: bool = False) -> None:
        self.records = {record.digest: record for record in records}
        self.ask = ask or down
        self.down = down
        self.asked = 0

    def peek(self, key: PresentedKey) -> KeyRecord | Ask | None:
        return ASK if self.ask else self.records.get(key.digest)

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        self.asked += 1
        if self.down:
            raise StoreUnavailable("fake: down")
        return self.records.get(key.digest)


def refusal(call: Any, *args: Any) -> Reason:
    with pytest.raises(Refused) as refused:
        call(*args)
    return refused.value.reason


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        ("Bearer rk-alice", None),
        ("bearer rk-alice", None),
        ("BEARER   rk-alice ", None),
        (None, "rk-alice"),
        (None, " rk-alice\t"),
        ("Bearer rk-alice", "rk-alice"),
        ("Basic dXNlcjpwYXNz", "rk-alice"),
        ("", "rk-alice"),
        ("Bearer", "rk-alice"),
    ],
)
def test_key_is_taken_from_either_header(authorization: str | None, x_api_key: str | None) -> None:
    key = presented_key(authorization, x_api_key)
    assert (key.secret, key.digest) == ("rk-alice", hashlib.sha256(b"rk-alice").hexdigest())


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "reason"),
    [
        (None, None, Reason.KEY_MISSING),
        ("", "", Reason.KEY_MISSING),
        ("Bearer ", None, Reason.KEY_MISSING),
        ("Bearer", None, Reason.KEY_MISSING),
        ("Bearerrk-alice", None, Reason.KEY_MISSING),
        ("Basic dXNlcjpwYXNz", None, Reason.KEY_MISSING),
        ("rk-alice", None, Reason.KEY_MISSING),
        ("Bearer rk-alice", "rk-bob", Reason.CONFLICTING_KEYS),
        ("Bearer rk-alice", "rk-Alice", Reason.CONFLICTING_KEYS),
        (None, "k" * 513, Reason.KEY_UNKNOWN),
        ("Bearer " + "k" * 513, None, Reason.KEY_UNKNOWN),
        (None, "rk-\x00alice", Reason.KEY_UNKNOWN),
        (None, "rk-alice\n", Reason.KEY_UNKNOWN),
        (None, "rk-älice", Reason.KEY_UNKNOWN),
        (None, "rk-\udcff", Reason.KEY_UNKNOWN),
        (None, "rk alice", Reason.KEY_UNKNOWN),
        ("Bearer rk-a, rk-b", None, Reason.KEY_UNKNOWN),
    ],
)
def test_what_is_no_key_is_refused(authorization: str | None, x_api_key: str | None, reason: Reason) -> None:
    assert refusal(presented_key, authorization, x_api_key) is reason


def test_the_longest_key_is_512_bytes() -> None:
    assert presented_key(None, "k" * 512).secret == "k" * 512


def test_a_presented_key_never_shows_itself() -> None:
    key = presented_key(None, "rk-alice")
    assert "rk-alice" not in f"{key!r} {key} {[key]} {key.digest}"


async def test_active_key_gives_its_caller_without_waiting() -> None:
    record = a_record(scopes=frozenset({"inference"}), allowed_models=frozenset({"gpt-4o"}), principal_id="u1")
    keys = FakeKeys(record)
    expected = Caller(
        key_id=KeyId("alice"),
        organization_id=OrganizationId("acme"),
        principal_id="u1",
        scopes=frozenset({"inference"}),
        allowed_models=frozenset({"gpt-4o"}),
        signing_secret=None,
        require_signature=False,
    )
    assert try_authenticate(PresentedKey("rk-alice"), keys, NOW) == expected
    assert await authenticate(PresentedKey("rk-alice"), keys, NOW) == expected
    assert keys.asked == 0


async def test_a_store_that_must_be_asked_is_awaited() -> None:
    keys = FakeKeys(a_record(), ask=True)
    assert try_authenticate(PresentedKey("rk-alice"), keys, NOW) is None
    assert (await authenticate(PresentedKey("rk-alice"), keys, NOW)).key_id == "alice"
    assert keys.asked == 1


@pytest.mark.parametrize("ask", [False, True], ids=["at once", "asked"])
@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        ("rk-bob", {}, Reason.KEY_UNKNOWN),
        ("rk-alic", {}, Reason.KEY_UNKNOWN),
        ("rk-alicee", {}, Reason.KEY_UNKNOWN),
        ("rk-alice", {"status": "revoked"}, Reason.KEY_REVOKED),
        ("rk-alice", {"status": "expired"}, Reason.KEY_EXPIRED),
        ("rk-alice", {"expires_at": NOW}, Reason.KEY_EXPIRED),
        ("rk-alice", {"expires_at": NOW - 1}, Reason.KEY_EXPIRED),
        ("rk-alice", {"expires_at": NOW - 1, "status": "revoked"}, Reason.KEY_REVOKED),
    ],
)
async def test_unusable_keys_are_refused(ask: bool, key: str, changes: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(Refused) as refused:
        await authenticate(PresentedKey(key), FakeKeys(a_record(**changes), ask=ask), NOW)
    assert refused.value.reason is reason
    assert refused.value.refusal.status == 401


async def test_a_key_works_until_the_second_it_expires() -> None:
    assert await authenticate(PresentedKey("rk-alice"), FakeKeys(a_record(expires_at=NOW + 0.001)), NOW)


async def test_a_store_that_is_down_is_503_and_not_401() -> None:
    with pytest.raises(Refused) as refused:
        await authenticate(PresentedKey("rk-alice"), FakeKeys(down=True), NOW)
    assert refused.value.reason is Reason.KEY_STORE_DOWN
    assert refused.value.refusal.status == 503


async def test_another_keys_record_never_authenticates() -> None:
    keys = FakeKeys()
    keys.records[digest("rk-alice")] = a_record("rk-bob")
    with pytest.raises(Refused) as refused:
        await authenticate(PresentedKey("rk-alice"), keys, NOW)
    assert refused.value.reason is Reason.KEY_UNKNOWN


header = st.none() | st.text() | st.text().map(lambda text: f"Bearer {text}") | st.just("Bearer rk-alice")


@given(authorization=header, x_api_key=st.none() | st.text() | st.just("rk-alice"), ask=st.booleans())
async def test_any_headers_are_either_refused_or_the_known_key(
    authorization: str | None, x_api_key: str | None, ask: bool
) -> None:
    outcome: Caller | int
    try:
        outcome = await authenticate(presented_key(authorization, x_api_key), FakeKeys(a_record(), ask=ask), NOW)
    except Refused as refused:
        outcome = refused.refusal.status
    if isinstance(outcome, Caller):
        assert outcome.key_id == "alice"
        assert "rk-alice" in f"{authorization} {x_api_key}"
    else:
        assert outcome in {400, 401}


# --- Signatures.


def signature(message: bytes, secret: str = SECRET) -> str:
    return hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()


@pytest.mark.parametrize("required", [False, True], ids=["optional", "required"])
def test_right_signature_is_accepted_in_either_case(required: bool) -> None:
    caller = a_caller(signing_secret=SECRET, require_signature=required)
    verify_signature(caller, signature(b"hello"), b"hello")
    verify_signature(caller, signature(b"hello").upper(), b"hello")


@pytest.mark.parametrize("required", [False, True], ids=["optional", "required"])
@pytest.mark.parametrize(
    "given",
    [
        signature(b"another message"),
        signature(b"hello", "rs-another-secret"),
        "",
        "zz" * 32,
        signature(b"hello")[:-1],
        signature(b"hello")[:-2],
        signature(b"hello") + "00",
        " " + signature(b"hello"),
        signature(b"hello") + "\n",
        "é" * 64,
        "٣" * 64,
        "\udcff" * 64,
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_wrong_signature_is_refused(required: bool, given: str) -> None:
    caller = a_caller(signing_secret=SECRET, require_signature=required)
    assert refusal(verify_signature, caller, given, b"hello") is Reason.SIGNATURE_WRONG


def test_required_signature_must_be_there() -> None:
    caller = a_caller(signing_secret=SECRET, require_signature=True)
    assert refusal(verify_signature, caller, None, b"") is Reason.SIGNATURE_MISSING


def test_optional_signature_may_be_left_out() -> None:
    verify_signature(a_caller(signing_secret=SECRET), None, b"hello")


def test_signature_is_ignored_for_a_key_without_secret() -> None:
    verify_signature(a_caller(), "nonsense", b"hello")


def test_required_signature_without_secret_can_never_be_right() -> None:
    caller = a_caller(require_signature=True)
    assert refusal(verify_signature, caller, signature(b"hello", ""), b"hello") is Reason.SIGNATURE_WRONG
    assert refusal(verify_signature, caller, None, b"hello") is Reason.SIGNATURE_MISSING


@given(message=st.binary(), given_text=st.text())
def test_no_text_but_the_signature_is_accepted(message: bytes, given_text: str) -> None:
    caller = a_caller(signing_secret=SECRET, require_signature=True)
    verify_signature(caller, signature(message), message)
    if given_text.lower() != signature(message):
        assert refusal(verify_signature, caller, given_text, message) is Reason.SIGNATURE_WRONG


# --- Scopes and models.


@pytest.mark.parametrize(
    ("scopes", "granted"),
    [
        ([], "inference models audit"),
        (["inference"], "inference models audit"),
        (["inference:*"], "inference models audit"),
        (["inference:write"], "inference models audit"),
        (["*"], "inference models audit"),
        (["admin"], "inference models audit admin"),
        (["models"], "models"),
        (["models:read"], "models"),
        (["audit:read", "models"], "models audit"),
        (["inference:read"], ""),
        (["billing"], ""),
        (["Inference"], ""),
        (["admin:users"], ""),
    ],
    ids=lambda value: ",".join(value) or "none" if isinstance(value, list) else None,
)
def test_scopes_grant(scopes: list[str], granted: str) -> None:
    caller = a_caller(scopes=frozenset(scopes))
    everything: tuple[Scope, ...] = ("inference", "models", "audit", "admin")
    assert [scope for scope in everything if has_scope(caller, scope)] == granted.split()
    for scope in everything:
        if scope in granted.split():
            require_scope(caller, scope)
        else:
            assert refusal(require_scope, caller, scope) is Reason.SCOPE_MISSING


def test_allowed_models_none_is_every_model_and_empty_is_no_model() -> None:
    assert a_caller().may_use("gpt-4o")
    assert a_caller(allowed_models=frozenset({"gpt-4o"})).may_use("gpt-4o")
    assert not a_caller(allowed_models=frozenset({"gpt-4o"})).may_use("gpt-4")
    assert not a_caller(allowed_models=frozenset()).may_use("gpt-4o")


def test_signing_secret_is_never_shown() -> None:
    record = a_record(signing_secret=SECRET)
    assert SECRET not in f"{record!r} {record} {record.caller!r}"
