"""What is known about an API key. The key itself is never here, only the SHA-256 digest of all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from policies.model import KeyId, OrganizationId

Status = Literal["active", "revoked", "expired"]

DIGEST_LENGTH = 64


def digest(key: str) -> str:
    """Hex SHA-256 of the whole key's UTF-8 bytes: the name a key is stored under."""
    return hashlib.sha256(key.encode()).hexdigest()


class PresentedKey:
    """A key as a client sent it. ``secret`` is never shown by ``repr``, and so never logged by accident."""

    __slots__ = ("digest", "secret")

    def __init__(self, secret: str) -> None:
        self.secret = secret
        self.digest = digest(secret)

    def __repr__(self) -> str:
        return f"PresentedKey(digest={self.digest[:12]}…)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request: what the steps after authentication need of the key's record.

    ``allowed_models`` None means every model. ``scopes``: see ``extproc.authenticate.require_scope``.
    """

    key_id: KeyId
    organization_id: OrganizationId
    principal_id: str
    scopes: frozenset[str]
    allowed_models: frozenset[str] | None
    signing_secret: str | None = field(repr=False)
    require_signature: bool

    def may_use(self, model: str) -> bool:
        """Whether the key is allowed to name this model."""
        return self.allowed_models is None or model in self.allowed_models


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A stored key. ``expires_at`` is unix seconds; ``signing_secret``'s UTF-8 bytes are the HMAC key."""

    id: KeyId
    organization_id: OrganizationId
    digest: str
    principal_id: str = ""
    principal_type: str = ""
    scopes: frozenset[str] = frozenset()
    status: Status = "active"
    expires_at: float | None = None
    allowed_models: frozenset[str] | None = None
    signing_secret: str | None = field(default=None, repr=False)
    require_signature: bool = False
    caller: Caller = field(init=False, repr=False, compare=False)
    """The record as the steps after authentication see it: made once, not once a request."""

    def __post_init__(self) -> None:
        caller = Caller(
            key_id=self.id,
            organization_id=self.organization_id,
            principal_id=self.principal_id,
            scopes=self.scopes,
            allowed_models=self.allowed_models,
            signing_secret=self.signing_secret,
            require_signature=self.require_signature,
        )
        object.__setattr__(self, "caller", caller)


class RecordInvalid(ValueError):
    """A stored record that cannot be used. ``problems``: path within the record, and what is wrong there.

    Never contains the record's values, which may be secrets.
    """

    def __init__(self, problems: tuple[tuple[tuple[str | int, ...], str], ...]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, path)) or 'record'}: {text}" for path, text in problems))
        self.problems = problems


# Identifiers travel in HTTP headers, Redis keys and file names of others: no spaces, no control characters. The first
# character keeps out '*', which stands for every organisation in policies.
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,127}\z")]
Text = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*\z")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*\z")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z")]


class _Stored(BaseModel):
    """The stored form, checked: an unknown field, a wrong type or a missing field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    id: Identifier
    organization_id: Identifier
    digest: Digest
    principal_id: Text = ""
    principal_type: Text = ""
    scopes: list[Name] = []
    status: Status = "active"
    expires_at: float | None = None
    allowed_models: list[Name] | None = None
    signing_secret: Annotated[str, Field(min_length=16, max_length=1024)] | None = None
    require_signature: bool = False

    @model_validator(mode="after")
    def _signature_needs_secret(self) -> _Stored:
        if self.require_signature and self.signing_secret is None:
            raise ValueError("require_signature needs a signing_secret")
        return self


def record_from(fields: object) -> KeyRecord:
    """Record from its stored form, a mapping with JSON's types.

    Raises:
        RecordInvalid: names every field at fault.
    """
    if not isinstance(fields, Mapping):
        raise RecordInvalid((((), "must be a mapping of a key's fields"),))
    try:
        stored = _Stored.model_validate(dict(fields))
    except ValidationError as error:
        raise RecordInvalid(tuple((e["loc"], e["msg"]) for e in error.errors(include_input=False))) from None
    return KeyRecord(
        id=KeyId(stored.id),
        organization_id=OrganizationId(stored.organization_id),
        digest=stored.digest,
        principal_id=stored.principal_id,
        principal_type=stored.principal_type,
        scopes=frozenset(stored.scopes),
        status=stored.status,
        expires_at=stored.expires_at,
        allowed_models=None if stored.allowed_models is None else frozenset(stored.allowed_models),
        signing_secret=stored.signing_secret,
        require_signature=stored.require_signature,
    )


def fields_of(record: KeyRecord) -> dict[str, object]:
    """Stored form of a record: JSON's types, lists sorted, fields without a value left out."""
    fields: dict[str, object] = {
        "id": record.id,
        "organization_id": record.organization_id,
        "digest": record.digest,
        "principal_id": record.principal_id,
        "principal_type": record.principal_type,
        "scopes": sorted(record.scopes),
        "status": record.status,
        "expires_at": record.expires_at,
        "allowed_models": None if record.allowed_models is None else sorted(record.allowed_models),
        "signing_secret": record.signing_secret,
        "require_signature": record.require_signature,
    }
    return {name: value for name, value in fields.items() if value is not None and value != ""}


def to_json(record: KeyRecord) -> str:
    """Record as one line of JSON."""
    return json.dumps(fields_of(record), separators=(",", ":"))


def from_json(text: str | bytes) -> KeyRecord:
    """Record from JSON.

    Raises:
        RecordInvalid: not JSON, or not a record.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise RecordInvalid((((), "is not JSON"),)) from None
    return record_from(fields)
