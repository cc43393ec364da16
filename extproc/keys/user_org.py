"""Keys that user-org-service knows: ``POST /v1/auth/validate-api-key``, which needs the key itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

import httpx
from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError

from extproc.http_service import HttpService
from extproc.keys.record import Identifier, KeyRecord, Name, PresentedKey, Status, Text
from extproc.keys.store import ASK, Ask
from gateway.errors import StoreUnavailable
from policies.model import KeyId, OrganizationId

PATH: Final = "/v1/auth/validate-api-key"

_STATUS: Final[Mapping[str, Status]] = {
    "revoked": "revoked",
    "disabled": "revoked",
    "suspended": "revoked",
    "deleted": "revoked",
    "inactive": "revoked",
    "expired": "expired",
}
"""Status words that make a key unusable, whatever ``valid`` says."""
_REFUSALS: Final = frozenset({400, 401, 403, 404})
"""Statuses under which ``{"valid": false}`` is an answer rather than a fault."""


def _empty_as_none(value: object) -> object:
    return None if value == "" else value


class _Answer(BaseModel):
    """What the service answers; fields that are not named here are its own business."""

    model_config = ConfigDict(strict=True, extra="ignore")

    valid: bool
    apiKeyId: Annotated[Identifier | None, BeforeValidator(_empty_as_none)] = None
    organizationId: Annotated[Identifier | None, BeforeValidator(_empty_as_none)] = None
    principalId: Text | None = None
    principalType: Text | None = None
    scopes: list[Name] | None = None
    status: Annotated[str, StringConstraints(max_length=64)] | None = None


class UserOrgKeys:
    """Asks user-org-service at ``url``; ``timeout_s`` is for the whole lookup. Does not own the client.

    Raises:
        ValueError: the URL is not http or https.
    """

    name = "user-org-service"

    def __init__(self, client: httpx.AsyncClient, *, url: str, timeout_s: float) -> None:
        self._service = HttpService(
            client, name=self.name, variable="USER_ORG_SERVICE_URL", url=url, timeout_s=timeout_s
        )

    def peek(self, key: PresentedKey) -> Ask:
        """Always ASK: the service must be asked."""
        return ASK

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        """The service's word on a key.

        Raises:
            StoreUnavailable: no answer in time, a status that is no answer, or an answer of the wrong form.
        """
        status, body = await self._service.call("POST", PATH, json={"apiKeySecret": key.secret})
        return self._record(key, status, body)

    def _record(self, key: PresentedKey, status: int, body: bytes) -> KeyRecord | None:
        if status != httpx.codes.OK and status not in _REFUSALS:
            raise StoreUnavailable(f"{self.name}: status {status}")
        try:
            answer = _Answer.model_validate_json(body)
        except ValidationError as error:
            fields = ", ".join(sorted({".".join(map(str, e["loc"])) or "body" for e in error.errors()}))
            raise StoreUnavailable(f"{self.name}: malformed answer, status {status}: {fields}") from None
        if answer.valid and status != httpx.codes.OK:
            raise StoreUnavailable(f"{self.name}: 'valid' with status {status}")
        ended = _STATUS.get((answer.status or "").strip().lower())
        if not answer.valid and ended is None:
            return None
        if answer.apiKeyId is None or answer.organizationId is None:
            if answer.valid:
                raise StoreUnavailable(f"{self.name}: malformed answer: a valid key without ids")
            return None
        return KeyRecord(
            id=KeyId(answer.apiKeyId),
            organization_id=OrganizationId(answer.organizationId),
            digest=key.digest,
            principal_id=answer.principalId or "",
            principal_type=answer.principalType or "",
            scopes=frozenset(answer.scopes or ()),
            status=ended or "active",
        )
