"""Nodes of a cluster: their addresses, and calls that nobody wants to answer."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from gateway.errors import StoreUnavailable
from limits.nodes import Nodes, node_address
from limits.wire import Asked
from tests.harness.limit_load import Log


@pytest.mark.parametrize(
    ("address", "place", "expected"),
    [
        ("redis://10.0.0.1:6379", "10.0.0.2:7000", "redis://10.0.0.2:7000"),
        ("redis://10.0.0.1:6379", ":7000", "redis://10.0.0.1:7000"),
        (
            "rediss://user:p%40ss@a.test:6379/0?ssl_ca_certs=x",
            "b.test:1",
            "rediss://user:p%40ss@b.test:1?ssl_ca_certs=x",
        ),
        ("redis://a.test", "2001:db8::1:6379", "redis://[2001:db8::1]:6379"),
        ("redis://[::1]:1", ":2", "redis://[::1]:2"),
        ("unix://:pw@/run/v.sock", "127.0.0.1:7", "redis://:pw@127.0.0.1:7"),
        ("unix:///run/v.sock", ":7", "redis://localhost:7"),
    ],
)
def test_node_is_reached_as_the_address_that_was_given(address: str, place: str, expected: str) -> None:
    assert node_address(address, place) == expected


async def test_call_that_is_sent_on_and_on_fails() -> None:
    async def nothing(_: Any) -> None:
        return

    nodes = Nodes("unix:///nowhere/s", prepare=nothing, deadline_s=1, log=cast(Any, Log()), on_change=lambda _: None)
    try:
        await nodes.seed.wait_tried(5)
        for hops in (0, 5):
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            nodes.seed.take_over(Asked(b"x", future, 0.0, hops))
            with pytest.raises(StoreUnavailable, match="do not agree" if hops else "No such file"):
                await future
    finally:
        await nodes.close()
