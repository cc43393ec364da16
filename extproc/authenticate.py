"""The first step on a request: who is calling, by API key, and what that key may do.

The key is looked up by the SHA-256 digest of all of it, so nothing that a client sends is compared with a
stored secret. Signatures are HMAC-SHA256 (RFC 2104) with the key's own signing secret.
"""

from __future__ import annotations

import hmac
import re
from typing import Final, Literal

from extproc.keys.record import Caller, KeyRecord, PresentedKey
from extproc.keys.store import ASK, KeyStore
from gateway.errors import Reason, Refused, StoreUnavailable

KEY_MAX_BYTES: Final = 512

Scope = Literal["inference", "models", "audit", "admin"]

_KEY: Final = re.compile(rf"[!-~]{{1,{KEY_MAX_BYTES}}}")
_SIGNATURE: Final = re.compile(r"[0-9a-fA-F]{64}")

_INFERENCE: Final = frozenset({"inference", "inference:*", "inference:write", "*", "admin"})
GRANTED_BY: Final[dict[Scope, frozenset[str]]] = {
    "inference": _INFERENCE,
    "models": _INFERENCE | {"models", "models:*", "models:read"},
    "audit": _INFERENCE | {"audit", "audit:*", "audit:read"},
    "admin": frozenset({"admin"}),
}
"""Scopes of a key, any of which grants what an endpoint needs. Whoever may infer may also see the models and what
became of the organisation's requests. ``*`` is everything *within* an organisation, so it does not grant admin, which
looks across them."""


def presented_key(authorization: str | None, x_api_key: str | None) -> PresentedKey:
    """The key in ``Authorization: Bearer <key>`` or ``X-API-Key: <key>``.

    Raises:
        Refused: KEY_MISSING (an authorization scheme other than Bearer counts as no key), CONFLICTING_KEYS when
            both are there and differ, KEY_UNKNOWN for what cannot be a key: over 512 bytes, or not visible ASCII.
    """
    bearer = _bearer(authorization) if authorization else ""
    plain = x_api_key.strip(" \t") if x_api_key else ""
    if bearer and plain and bearer != plain:
        raise Refused(Reason.CONFLICTING_KEYS)
    secret = plain or bearer
    if not secret:
        raise Refused(Reason.KEY_MISSING)
    if not _KEY.fullmatch(secret):
        raise Refused(Reason.KEY_UNKNOWN)
    return PresentedKey(secret)


def _bearer(authorization: str) -> str:
    scheme, _, credentials = authorization.strip(" \t").partition(" ")
    return credentials.strip(" \t") if scheme.lower() == "bearer" else ""


async def authenticate(key: PresentedKey, keys: KeyStore, now: float) -> Caller:
    """Who the key belongs to. ``now`` is unix seconds. Waits only when a store must be asked.

    Raises:
        Refused: KEY_UNKNOWN, KEY_REVOKED, KEY_EXPIRED, or KEY_STORE_DOWN when the key cannot be checked.
    """
    caller = try_authenticate(key, keys, now)
    if caller is not None:
        return caller
    try:
        found = await keys.find(key)
    except StoreUnavailable as error:
        raise Refused(Reason.KEY_STORE_DOWN) from error
    return _judge(key, found, now)


def try_authenticate(key: PresentedKey, keys: KeyStore, now: float) -> Caller | None:
    """Who the key belongs to, or None when a store must be asked: then await ``authenticate``.

    Raises:
        Refused: KEY_UNKNOWN, KEY_REVOKED, KEY_EXPIRED.
    """
    found = keys.peek(key)
    return None if found is ASK else _judge(key, found, now)


def _judge(key: PresentedKey, record: KeyRecord | None, now: float) -> Caller:
    # A store that answers with another key's record must never let the request through as that caller.
    if record is None or not hmac.compare_digest(record.digest, key.digest):
        raise Refused(Reason.KEY_UNKNOWN)
    if record.status == "revoked":
        raise Refused(Reason.KEY_REVOKED)
    if record.status != "active" or (record.expires_at is not None and record.expires_at <= now):
        raise Refused(Reason.KEY_EXPIRED)
    return record.caller


def verify_signature(caller: Caller, signature_hex: str | None, message: bytes) -> None:
    """Check ``signature_hex``, the hex HMAC-SHA256 of ``message``, in constant time.

    Without a signing secret on the key a signature is ignored, unless the key requires one.

    Raises:
        Refused: SIGNATURE_MISSING or SIGNATURE_WRONG.
    """
    if signature_hex is None:
        if caller.require_signature:
            raise Refused(Reason.SIGNATURE_MISSING)
        return
    if caller.signing_secret is None:
        if caller.require_signature:
            raise Refused(Reason.SIGNATURE_WRONG)
        return
    if not _SIGNATURE.fullmatch(signature_hex):
        raise Refused(Reason.SIGNATURE_WRONG)
    expected = hmac.digest(caller.signing_secret.encode(), message, "sha256")
    if not hmac.compare_digest(expected, bytes.fromhex(signature_hex)):
        raise Refused(Reason.SIGNATURE_WRONG)


def has_scope(caller: Caller, scope: Scope) -> bool:
    """Whether the key's scopes grant ``scope``. A key without scopes has everything but admin."""
    if not caller.scopes:
        return scope != "admin"
    return not GRANTED_BY[scope].isdisjoint(caller.scopes)


def require_scope(caller: Caller, scope: Scope) -> None:
    """Insist on a scope.

    Raises:
        Refused: SCOPE_MISSING.
    """
    if not has_scope(caller, scope):
        raise Refused(Reason.SCOPE_MISSING)
