"""``router keys`` on a key file."""

from __future__ import annotations

import json
import multiprocessing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.keys import expiry, keys
from extproc.keys.key_file import parse_key_file
from extproc.keys.record import KeyRecord, digest
from extproc.keys.redis_store import redis_url
from extproc.keys.register import FileRegister
from policies.model import KeyId, OrganizationId


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def run(*args: str, **env: str) -> Result:
    # Without COLUMNS: the test runner sets it, and a table is as wide as that says.
    return CliRunner(env={"KEY_FILE": "", "REDIS_ADDR": "", "COLUMNS": None} | env).invoke(keys, args)


def created(path: Path, *args: str) -> dict[str, Any]:
    result = run("create", "--org", "acme", "--file", str(path), "--json", *args)
    assert result.exit_code == 0, result.output
    made: dict[str, Any] = json.loads(result.stdout)
    return made


def stored(path: Path) -> tuple[KeyRecord, ...]:
    return parse_key_file(path.read_text(), file="keys.yaml")


def test_created_key_is_shown_once_and_stored_as_digest(path: Path) -> None:
    made = created(path)
    key = made["key"]
    assert key.startswith("rk-")
    assert len(key) == 3 + 43  # 256 bits in base64url
    assert key not in path.read_text()
    (record,) = stored(path)
    assert (record.id, record.digest, record.organization_id) == (made["id"], digest(key), "acme")
    assert (record.scopes, record.allowed_models, record.expires_at) == (frozenset({"inference"}), None, None)
    assert path.stat().st_mode & 0o777 == 0o600


def test_options_are_stored(path: Path) -> None:
    options = "--id k --principal bob --scope models --scope audit --model gpt-4o --expires-at 2999-01-01T00:00:00Z"
    made = created(path, *options.split(), "--require-signature")
    (record,) = stored(path)
    assert record == KeyRecord(
        id=KeyId("k"),
        organization_id=OrganizationId("acme"),
        digest=digest(made["key"]),
        principal_id="bob",
        scopes=frozenset({"models", "audit"}),
        expires_at=datetime.fromisoformat("2999-01-01T00:00:00Z").timestamp(),
        allowed_models=frozenset({"gpt-4o"}),
        signing_secret=made["signing_secret"],
        require_signature=True,
    )
    assert made["expires_at"] == "2999-01-01T00:00:00Z"


def test_person_gets_only_the_secrets_on_stdout(path: Path) -> None:
    result = run("create", "--org", "acme", "--signing", KEY_FILE=str(path))
    key, secret = result.stdout.split()
    (record,) = stored(path)
    assert (digest(key), secret) == (record.digest, record.signing_secret)
    assert not record.require_signature
    assert key not in result.stderr
    assert secret not in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--org", "*"], "organization_id"),
        (["--org", "acme", "--id", "a b"], "id"),
        (["--org", "acme", "--scope", ""], "scopes"),
        (["--org", "acme", "--expires-in", "soon"], "--expires-in"),
        (["--org", "acme", "--expires-in", "0d"], "--expires-in"),
        (["--org", "acme", "--expires-at", "2001-01-01"], "has passed"),
        (["--org", "acme", "--expires-at", "soon"], "ISO 8601"),
        (["--org", "acme", "--expires-at", "2999-01-01", "--expires-in", "1d"], "not both"),
        ([], "--org"),
    ],
)
def test_wrong_options_create_nothing(path: Path, args: list[str], says: str) -> None:
    result = run("create", *args, "--file", str(path))
    assert result.exit_code == 2
    assert says in result.stderr
    assert not path.exists()


def test_a_store_must_be_named() -> None:
    for args in (["create", "--org", "acme"], ["list"], ["revoke", "k"]):
        result = run(*args)
        assert result.exit_code == 2
        assert "KEY_FILE" in result.stderr


def test_id_is_not_given_twice(path: Path) -> None:
    created(path, "--id", "k")
    result = run("create", "--org", "acme", "--id", "k", "--file", str(path))
    assert result.exit_code == 1
    assert "already has a key k" in result.stderr
    assert len(stored(path)) == 1


def test_list_shows_no_secret(path: Path) -> None:
    made = created(path, "--id", "k-1", "--principal", "[red]bob", "--require-signature")
    created(path, "--id", "k-2")
    for args in (["list"], ["list", "--json"]):
        output = run(*args, KEY_FILE=str(path)).output
        assert "k-1" in output
        assert "k-2" in output
        assert "[red]bob" in output
        for secret in (made["key"], made["signing_secret"], digest(made["key"])):
            assert secret not in output
    rows = json.loads(run("list", "--json", "--org", "acme", KEY_FILE=str(path)).output)
    assert [(row["id"], row["status"], row["store"], row["signing"]) for row in rows] == [
        ("k-1", "active", "file", True),
        ("k-2", "active", "file", False),
    ]
    assert json.loads(run("list", "--json", "--org", "other", KEY_FILE=str(path)).output) == []


def test_revoke_is_for_good_and_may_be_repeated(path: Path) -> None:
    created(path, "--id", "k-1")
    created(path, "--id", "k-2")
    for _ in range(2):
        assert run("revoke", "k-1", "--file", str(path)).exit_code == 0
    assert [(record.id, record.status) for record in stored(path)] == [("k-1", "revoked"), ("k-2", "active")]
    assert path.stat().st_mode & 0o777 == 0o600


def test_revoking_an_unknown_key_fails(path: Path) -> None:
    created(path)
    result = run("revoke", "nobody", "--file", str(path))
    assert result.exit_code == 1
    assert "no key nobody" in result.stderr


def test_a_broken_file_is_never_overwritten(path: Path) -> None:
    path.write_text("keys:\n  - id: 7\n")
    for args in (["create", "--org", "acme"], ["revoke", "k"], ["list"]):
        result = run(*args, "--file", str(path))
        assert result.exit_code == 1
        assert "keys.yaml:2 keys[0].id" in result.stderr
    assert path.read_text() == "keys:\n  - id: 7\n"


def test_link_stays_a_link(tmp_path: Path, path: Path) -> None:
    (tmp_path / "real").mkdir()
    path.symlink_to(tmp_path / "real" / "keys.yaml")
    created(path)
    assert path.is_symlink()
    assert len(stored(tmp_path / "real" / "keys.yaml")) == 1
    assert [found.name for found in tmp_path.glob(".keys*")] == []


def _add(path: str, writer: int) -> None:
    for index in range(5):
        key = f"k-{writer}-{index}"
        FileRegister(Path(path)).add(
            KeyRecord(id=KeyId(key), organization_id=OrganizationId("acme"), digest=digest(key))
        )


def test_concurrent_writers_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(str(path), writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert len(stored(path)) == 20


def test_expiry_is_unix_seconds() -> None:
    assert expiry("30d", None, now=1000.5) == 1000 + 30 * 86_400
    assert expiry(None, "1970-01-01T01:00:00+01:00", now=-1) == 0
    assert expiry(None, "1970-01-01T01:00:00", now=0) == 3600
    assert expiry(None, None, now=0) is None


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("localhost:6379", "redis://localhost:6379"),
        ("[::1]:6379", "redis://[::1]:6379"),
        ("redis://:pw@host:1/2", "redis://:pw@host:1/2"),
        ("rediss://host", "rediss://host"),
        ("unix:///run/valkey.sock?db=1", "unix:///run/valkey.sock?db=1"),
    ],
)
def test_redis_addresses(address: str, url: str) -> None:
    assert redis_url(address) == url


@pytest.mark.parametrize(
    "address", ["", "http://host", "unix://relative", "unix://", "redis://", "host:port", "s3cret://"]
)
def test_other_addresses_are_refused_without_being_repeated(address: str) -> None:
    with pytest.raises(ValueError, match="use host:port") as error:
        redis_url(address)
    assert "s3cret" not in str(error.value)
