"""The key file: parsed strictly, followed while it changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from extproc.keys.file import FileKeys
from extproc.keys.key_file import KeyFileInvalid, format_key_file, parse_key_file
from extproc.keys.record import KeyRecord, PresentedKey, digest
from gateway.telemetry import get_logger
from policies.model import KeyId, OrganizationId


def a_record(key: str, **changes: Any) -> KeyRecord:
    fields = {"id": KeyId(key), "organization_id": OrganizationId("acme"), "digest": digest(key)}
    return KeyRecord(**(fields | changes))


def write(path: Path, text: str) -> None:
    """Replace a file as editors do: a new file under the old name."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(format_key_file([a_record("rk-alice"), a_record("rk-bob", status="revoked")]))
    return path


def open_file(path: Path) -> FileKeys:
    return FileKeys(path, log=get_logger())


def test_keys_of_the_file_are_found_by_digest(path: Path) -> None:
    keys = open_file(path)
    assert keys.peek(PresentedKey("rk-alice")) == a_record("rk-alice")
    assert keys.peek(PresentedKey("rk-bob")) == a_record("rk-bob", status="revoked")
    assert keys.peek(PresentedKey("rk-carol")) is None


def test_json_is_a_key_file_too(path: Path) -> None:
    path.write_text('{"keys": [{"id": "a", "organization_id": "b", "digest": "%s"}]}' % digest("rk-x"))  # noqa: UP031
    assert open_file(path).peek(PresentedKey("rk-x")) is not None


def test_edit_takes_effect(path: Path) -> None:
    keys = open_file(path)
    write(path, format_key_file([a_record("rk-carol")]))
    keys.refresh()
    assert keys.peek(PresentedKey("rk-carol"))
    assert keys.peek(PresentedKey("rk-alice")) is None


def test_edit_of_the_same_size_right_after_a_read_takes_effect(path: Path) -> None:
    keys = open_file(path)
    keys.refresh()
    before = path.stat()
    path.write_text(path.read_text().replace(digest("rk-alice"), digest("rk-carol")))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    keys.refresh()
    assert keys.peek(PresentedKey("rk-carol"))


def test_unchanged_file_is_not_read_again(path: Path) -> None:
    os.utime(path, (1, 1))
    keys = open_file(path)
    keys.refresh()
    path.chmod(0)
    with capture_logs() as logs:
        keys.refresh()
    assert logs == []


def test_swapped_link_takes_effect(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    (tmp_path / "1" / "keys.yaml").write_text(format_key_file([a_record("rk-alice")]))
    (tmp_path / "2" / "keys.yaml").write_text(format_key_file([a_record("rk-carol")]))
    (tmp_path / "data").symlink_to("1")
    keys = open_file(tmp_path / "data" / "keys.yaml")
    (tmp_path / "data.new").symlink_to("2")
    (tmp_path / "data.new").replace(tmp_path / "data")
    keys.refresh()
    assert keys.peek(PresentedKey("rk-carol"))


@pytest.mark.parametrize("text", ["", "keys: [", "keys:\n  - id: 7\n", "keys: yes", "\x00"])
def test_invalid_edit_keeps_the_last_good_keys_and_is_logged_once(path: Path, text: str) -> None:
    keys = open_file(path)
    write(path, text)
    os.utime(path, (1, 1))
    with capture_logs() as logs:
        keys.refresh()
        keys.refresh()
    assert keys.peek(PresentedKey("rk-alice"))
    assert [entry["event"] for entry in logs] == ["key_file_rejected"]
    assert logs[0]["problems"][0].startswith(f"{path}:")
    write(path, format_key_file([a_record("rk-carol")]))
    keys.refresh()
    assert keys.peek(PresentedKey("rk-carol"))


def test_vanished_file_keeps_the_last_good_keys(path: Path) -> None:
    keys = open_file(path)
    path.unlink()
    with capture_logs() as logs:
        keys.refresh()
        keys.refresh()
    assert [entry["event"] for entry in logs] == ["key_file_rejected"]
    assert keys.peek(PresentedKey("rk-alice"))
    path.write_text(format_key_file([]))
    keys.refresh()
    assert keys.peek(PresentedKey("rk-alice")) is None


def test_missing_file_at_the_start_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(KeyFileInvalid, match=r"missing\.yaml:1: cannot be read: No such file"):
        open_file(tmp_path / "missing.yaml")


GOOD = f"  - id: a\n    organization_id: acme\n    digest: {digest('rk-a')}\n"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["f:1: is empty; a file without keys says 'keys: []'"]),
        ("[]", ["f:1: must have exactly one field, 'keys', a list of key records"]),
        ("keys: []\nmore: 1", ["f:1: must have exactly one field, 'keys', a list of key records"]),
        ("keys:\n" + GOOD + "  - 7\n", ["f:5 keys[1]: must be a mapping"]),
        (
            "keys:\n" + GOOD + "    status: gone\n",
            ["f:5 keys[0].status: Input should be 'active', 'revoked' or 'expired'"],
        ),
        ("keys:\n" + GOOD + "    scopes: [inference, 3]\n", ["f:5 keys[0].scopes[1]: Input should be a valid string"]),
        ("keys:\n" + GOOD + "    colour: red\n", ["f:5 keys[0].colour: Extra inputs are not permitted"]),
        ("keys:\n" + GOOD + "    id: b\n", ["f:5: field 'id' appears twice"]),
        (
            "keys:\n" + GOOD + GOOD,
            ["f:5 keys[1].id: is used by an earlier key", "f:7 keys[1].digest: is used by an earlier key"],
        ),
        ("keys:\n  - id: [\n", ["f:3: is not YAML: did not find expected node content"]),
        ("keys: !!python/object:os.system {}", ["f:1: is not YAML: could not determine a constructor"]),
    ],
)
def test_problems_point_at_lines(text: str, problems: list[str]) -> None:
    with pytest.raises(KeyFileInvalid) as invalid:
        parse_key_file(text, file="f")
    found = [str(problem) for problem in invalid.value.problems]
    assert len(found) == len(problems)
    assert all(line.startswith(start) for line, start in zip(found, problems, strict=True)), found


def test_written_file_reads_back() -> None:
    records = (a_record("rk-1", scopes=frozenset({"b", "a"}), expires_at=1e9), a_record("rk-2", principal_id="yes"))
    assert parse_key_file(format_key_file(records), file="f") == records
