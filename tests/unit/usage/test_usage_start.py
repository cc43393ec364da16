"""A ledger that cannot start says why in one line, and touches nothing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests.harness.process import free_ports


def start(state: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """Start a ledger that will not."""
    [port] = free_ports(1)
    environ = {
        **os.environ,
        "RUN_DIR": str(run),
        "STATE_DIR": str(state),
        "POLICY_DIR": str(run),
        "REDIS_ADDR": "",
        "USAGE_METRICS_PORT": str(port),
    }
    command = [sys.executable, "-m", "usage"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_second_ledger_of_a_directory_does_not_start(tmp_path: Path) -> None:
    with (tmp_path / "usage.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = start(tmp_path, tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"usage: STATE_DIR: another ledger uses {tmp_path}\n"
    assert not (tmp_path / "usage.db").exists()


def test_directory_that_cannot_be_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = start(tmp_path / "file", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"usage: STATE_DIR: {tmp_path / 'file'}: ")
    assert "Traceback" not in done.stderr


def test_spool_that_is_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "usage.db").mkdir()
    done = start(tmp_path, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"usage: STATE_DIR: {tmp_path / 'usage.db'}: ")
    assert "Traceback" not in done.stderr
