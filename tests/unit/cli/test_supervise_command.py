"""The ``router`` command itself: lazy, and clear about a user's mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def router(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_help_imports_no_subcommand() -> None:
    code = (
        "import sys; sys.argv = ['router', '--help']; from cli.__main__ import main\n"
        "try: main()\n"
        "finally: print([m for m in sys.modules if m.startswith(('cli.', 'gateway', 'policies', 'rich', 'pydantic'))])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Start everything on this machine." in shown.stdout
    assert shown.stdout.splitlines()[-1] == "['cli.__main__']"


def test_wrong_setting_is_told_without_a_traceback(tmp_path: Path) -> None:
    told = router("up", HTTP_PORT="http", RUN_DIR=str(tmp_path))
    assert told.returncode == 2
    assert told.stderr.startswith("router: HTTP_PORT: ")
    assert "Traceback" not in told.stderr


def test_config_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    told = router("up", ROUTER_CONFIG=f"{tmp_path}/no.yaml")
    assert told.returncode == 2
    assert "no.yaml is not a file" in told.stderr


def test_unknown_subcommand_is_told() -> None:
    told = router("fly")
    assert told.returncode == 2
    assert "No such command 'fly'" in told.stderr


def test_version_is_the_distribution_s() -> None:
    assert router("--version").stdout.startswith("router, version ")
