"""API keys for a stack: made by ``router keys``, and a user-org-service that answers as it is told."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from cli.keys import keys as keys_command
from extproc.keys.record import digest, record_from
from extproc.keys.register import FileRegister
from tests.harness.service import LocalService

PATH = "/v1/auth/validate-api-key"


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeKey:
    """What ``router keys create`` shows once."""

    key: str
    id: str
    signing_secret: str


class KeyStoreCommands:
    """``router keys`` on one store: ``("--file", path)`` or ``("--redis", address)``."""

    def __init__(self, *store: str) -> None:
        self._store = store

    def _run(self, *arguments: str) -> str:
        result = CliRunner(env={"KEY_FILE": "", "REDIS_ADDR": ""}).invoke(keys_command, [*arguments, *self._store])
        assert result.exit_code == 0, result.output
        return result.stdout

    def create(self, *options: str, org: str = "acme") -> MadeKey:
        """Make a key."""
        made = json.loads(self._run("create", "--org", org, "--json", *options))
        return MadeKey(key=made["key"], id=made["id"], signing_secret=made.get("signing_secret", ""))

    def revoke(self, key: MadeKey) -> None:
        """Revoke a key."""
        self._run("revoke", key.id)


def add_expired(path: Path, key: str) -> None:
    """A key that ended long ago, which the command would not make."""
    fields = {"id": "expired", "organization_id": "acme", "digest": digest(key), "expires_at": 1.0}
    FileRegister(path).add(record_from(fields))


class UserOrg(LocalService):
    """A user-org-service that knows no key."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self._known: dict[str, dict[str, Any]] = {}

    def knows(self, key: str, **fields: Any) -> None:
        """Make it know a key; fields as the service answers them."""
        self._known[key] = {"valid": True, "apiKeyId": f"id-of-{key}", "organizationId": "acme", **fields}

    def answer(self, method: str, path: str, asked: Any) -> tuple[int, Any]:
        """What it knows of a key."""
        if (method, path) != ("POST", PATH):
            return 404, {}
        key = asked["apiKeySecret"]
        self.asked[key] += 1
        return 200, self._known.get(key, {"valid": False, "message": "no such key"})
