"""What the audit trail says of keys that were made and revoked, on a real Valkey."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from extproc.keys.key_file import parse_key_file
from extproc.keys.record import digest
from gateway.settings import VALKEY_SOCKET
from tests.harness.limit_commands import Commands


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def told(commands: Commands) -> list[tuple[str, str, str, list[str]]]:
    """Action, organisation, key and stores of the events, the oldest first."""
    events = reversed(commands.events())
    return [(e["action"], e["organization_id"], e["metadata"]["api_key_id"], e["metadata"]["stores"]) for e in events]


def statuses(path: Path) -> dict[str, str]:
    return {record.id: record.status for record in parse_key_file(path.read_text(), file="")}


def test_keys_that_are_made_and_revoked_are_in_the_trail(commands: Commands, path: Path) -> None:
    stores = ("--file", str(path))
    commands.text("keys", "create", "--org", "acme", "--id", "k-1", *stores)
    commands.text("keys", "create", "--org", "globex", "--id", "k-2")
    commands.text("keys", "revoke", "k-1", *stores)
    assert told(commands) == [
        ("KEY_CREATED", "acme", "k-1", ["redis", "file"]),
        ("KEY_CREATED", "globex", "k-2", ["redis"]),
        ("KEY_REVOKED", "acme", "k-1", ["redis", "file"]),
    ]


def test_event_says_what_the_key_may_do_and_no_secret(commands: Commands) -> None:
    options = ("--scope", "inference", "--model", "gpt-4o", "--expires-at", "2999-01-01", "--signing", "--actor", "bob")
    made: dict[str, Any] = commands.json("keys", "create", "--org", "acme", "--id", "k-1", *options)
    [event] = commands.events()
    assert (event["actor"], event["request_id"]) == ("bob", "")
    assert event["metadata"] == {
        "api_key_id": "k-1",
        "principal_id": "",
        "scopes": ["inference"],
        "allowed_models": ["gpt-4o"],
        "expires_at": "2999-01-01T00:00:00Z",
        "signing": True,
        "require_signature": False,
        "stores": ["redis"],
    }
    for secret in (made["key"], made["signing_secret"], digest(made["key"])):
        assert secret not in json.dumps(event)


def test_what_changes_nothing_is_no_event(commands: Commands) -> None:
    commands.text("keys", "create", "--org", "acme", "--id", "k-1")
    assert commands.invoke("keys", "create", "--org", "acme", "--id", "k-1").exit_code == 1
    assert commands.invoke("keys", "revoke", "nobody").exit_code == 1
    for _ in range(2):
        commands.text("keys", "revoke", "k-1")
    assert [action for action, *_ in told(commands)] == ["KEY_CREATED", "KEY_REVOKED"]


@pytest.fixture
def dead_run_dir(tmp_path: Path) -> str:
    """A run directory whose Valkey does not answer."""
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / VALKEY_SOCKET).touch()
    return str(tmp_path / "dead")


def test_key_is_not_made_where_the_trail_cannot_be_told(commands: Commands, path: Path, dead_run_dir: str) -> None:
    nowhere = {"REDIS_ADDR": "", "RUN_DIR": dead_run_dir}
    result = commands.invoke("keys", "create", "--org", "acme", "--file", str(path), **nowhere)
    assert result.exit_code == 1
    assert "The limit store" in result.stderr
    assert "rk-" not in result.output
    assert not path.exists()


def test_key_is_revoked_though_the_trail_cannot_be_told(commands: Commands, path: Path, dead_run_dir: str) -> None:
    commands.text("keys", "create", "--org", "acme", "--id", "k-1", "--file", str(path))
    result = commands.invoke("keys", "revoke", "k-1", "--file", str(path), REDIS_ADDR="", RUN_DIR=dead_run_dir)
    assert result.exit_code == 1
    assert "The audit trail lacks that it was revoked" in result.stderr
    assert "Revoked in file." in result.stderr
    assert statuses(path) == {"k-1": "revoked"}


def test_without_a_limit_store_there_is_no_trail_which_is_said(commands: Commands, path: Path) -> None:
    stores = ("--file", str(path))
    for arguments in (("create", "--org", "acme", "--id", "k-1"), ("revoke", "k-1")):
        result = commands.invoke("keys", *arguments, *stores, REDIS_ADDR="")
        assert result.exit_code == 0
        assert "there is no audit trail" in result.stderr
    assert statuses(path) == {"k-1": "revoked"}
