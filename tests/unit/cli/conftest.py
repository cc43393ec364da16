"""A Valkey for the tests of commands that need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.limit_commands import Commands, Server, a_server


@pytest.fixture(scope="session")
def limit_server() -> Iterator[Server]:
    """One server for all."""
    with a_server() as server:
        yield server


@pytest.fixture
def commands(limit_server: Server, tmp_path: Path) -> Commands:
    """The commands on a store that holds nothing."""
    limit_server.client.flushall()
    return Commands(limit_server.address, tmp_path)
