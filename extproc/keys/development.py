"""``dev-`` and ``test-`` keys that exist without being created, in development only.

``dev-<org>-<name>`` belongs to that organisation: a UUID, or a word without dashes (``dev-acme-alice`` to
``acme``). Any other, such as ``dev-key`` or ``test-abc``, belongs to ``DEFAULT_ORGANIZATION``. The key's
id is the key itself, so that a policy's allow and deny lists can name it. A name of ``admin`` has the admin scope.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from extproc.keys.record import KeyRecord, PresentedKey
from policies.model import KeyId, OrganizationId

DEFAULT_ORGANIZATION: Final = OrganizationId("00000000-0000-0000-0000-000000000001")
SCOPES: Final = frozenset({"inference", "models", "audit"})

_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_KEY: Final = re.compile(r"(?:dev|test)-[A-Za-z0-9][A-Za-z0-9._-]{0,119}", re.ASCII)
_OF_ORGANIZATION: Final = re.compile(rf"dev-(?P<org>{_UUID}|[A-Za-z0-9._]+)-(?P<name>.+)")
_OF_UUID: Final = re.compile(rf"dev-(?P<org>{_UUID})")


class DevelopmentKeys:
    """Accepts every well-formed development key.

    Raises:
        ValueError: made for an environment other than development.
    """

    name = "development"

    def __init__(self, *, environment: str) -> None:
        if environment != "development":
            raise ValueError(f"development keys are not for {environment}")

    def peek(self, key: PresentedKey) -> KeyRecord | None:
        """The key's record, or None for a key that is no development key."""
        return _record(key.secret, key.digest) if key.secret.startswith(("dev-", "test-")) else None

    async def find(self, key: PresentedKey) -> KeyRecord | None:
        """As ``peek``: nothing is asked."""
        return self.peek(key)


@lru_cache(maxsize=1024)
def _record(key: str, digest: str) -> KeyRecord | None:
    if not _KEY.fullmatch(key):
        return None
    organization, name = _parts(key)
    return KeyRecord(
        id=KeyId(key),
        organization_id=organization,
        digest=digest,
        principal_id=name,
        principal_type="user",
        scopes=SCOPES | {"admin"} if name == "admin" else SCOPES,
    )


def _parts(key: str) -> tuple[OrganizationId, str]:
    """Organisation and name in a development key."""
    whole = _OF_UUID.fullmatch(key)
    if whole:  # a UUID without a name must not be read as the word before its first dash
        return OrganizationId(whole["org"].lower()), ""
    match = _OF_ORGANIZATION.fullmatch(key)
    if match is None:
        return DEFAULT_ORGANIZATION, key.partition("-")[2]
    organization = match["org"]
    return OrganizationId(organization.lower() if "-" in organization else organization), match["name"]
