"""The API key that the load is sent with."""

from __future__ import annotations

import secrets
from pathlib import Path

from extproc.keys.key_file import format_key_file
from extproc.keys.record import digest, record_from


def write_key(path: Path) -> str:
    """Make a key, write the key file that knows it, and return the key."""
    key = f"rk-{secrets.token_urlsafe(32)}"
    fields = {"id": "key-bench", "organization_id": "bench", "digest": digest(key), "scopes": ["inference"]}
    path.write_text(format_key_file([record_from(fields)]))
    return key
