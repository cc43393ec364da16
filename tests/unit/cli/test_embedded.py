"""Where commands find the Valkey of ``router up``."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.embedded import embedded_valkey
from cli.preflight import run_directory
from gateway.settings import VALKEY_SOCKET


def test_it_is_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    assert embedded_valkey(Path("run")) is None
    (tmp_path / "run" / VALKEY_SOCKET).touch()
    assert embedded_valkey(Path("run")) == f"unix://{tmp_path}/run/{VALKEY_SOCKET}"


def test_it_is_where_a_run_directory_with_too_long_a_path_has_moved(tmp_path: Path) -> None:
    wanted = tmp_path / ("x" * 100)
    moved = run_directory(wanted)
    try:
        (moved / VALKEY_SOCKET).touch()
        assert moved != wanted
        assert embedded_valkey(wanted) == f"unix://{moved}/{VALKEY_SOCKET}"
    finally:
        (moved / VALKEY_SOCKET).unlink()
        moved.rmdir()
