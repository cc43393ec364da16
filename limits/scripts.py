"""The limit store's scripts, and the names of its keys. No I/O but reading the scripts.

The scripts document their KEYS and ARGV; how the algorithm works is in docs/limits.md.
"""

from __future__ import annotations

import binascii
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Final

from policies.model import OrganizationId

ORGANIZATIONS: Final = b"router:organizations"
"""Set of the organisations that have keys in the store: where a sweep looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A Lua script as the server knows it."""

    source: bytes
    sha: bytes


def _script(name: str) -> Script:
    directory = resources.files("limits") / "lua"
    source = (directory / "common.lua").read_bytes() + b"\n" + (directory / f"{name}.lua").read_bytes()
    return Script(source=source, sha=hashlib.sha1(source).hexdigest().encode())  # noqa: S324 - EVALSHA's own naming


ADMIT: Final = _script("admit")
SETTLE: Final = _script("settle")
FINISH: Final = _script("finish")
RESET: Final = _script("reset")
OPENED: Final = _script("opened")
EXTEND: Final = _script("extend")
SCRIPTS: Final = (ADMIT, SETTLE, FINISH, RESET, OPENED, EXTEND)


@lru_cache(maxsize=10_000)
def prefix(organization_id: OrganizationId) -> bytes:
    """What every key of an organisation begins with; the braces make it one hash slot."""
    escaped = organization_id.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
    return f"router:{{{escaped}}}:".encode()


def slot(key: bytes) -> int:
    """Hash slot of a key (Redis Cluster specification, "Key distribution model")."""
    _, _, tail = key.partition(b"{")
    tag, closed, _ = tail.partition(b"}")
    return binascii.crc_hqx(tag if closed and tag else key, 0) % 16384
