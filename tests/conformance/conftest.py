"""Limit stores that one suite is run against: in memory, Valkey, Redis, and a Valkey that is a cluster of one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.harness.limit_cases import Case, a_case
from tests.harness.valkey import REDIS, Server, a_cluster, a_server

Servers = Callable[[str], Server | None]


@pytest.fixture(scope="session")
def limit_servers() -> Iterator[Servers]:
    """Servers by name, each started when it is first asked for."""
    running: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def named(name: str) -> Server | None:
            if name == "memory":
                return None
            if name not in running:
                if name == "redis":
                    if REDIS is None:
                        pytest.skip("redis-server is not installed")
                    running[name] = stack.enter_context(a_server(binary=REDIS))
                elif name == "cluster":
                    running[name] = stack.enter_context(a_cluster(1))[0]
                else:
                    running[name] = stack.enter_context(a_server())
            return running[name]

        yield named


@pytest.fixture(params=["memory", "valkey", "redis", "cluster"])
async def case(request: pytest.FixtureRequest, limit_servers: Servers) -> AsyncIterator[Case]:
    """Every kind of limit store."""
    async with a_case(limit_servers(request.param)) as opened:
        yield opened


@pytest.fixture
def valkey(limit_servers: Servers) -> Server:
    """A Valkey on a unix socket."""
    server = limit_servers("valkey")
    assert server is not None
    return server
