"""Connections to the limit store: to one server, or to those nodes of a cluster that have been named by MOVED.

A call may go to any node: what another one is to answer is sent on to it, so whoever calls sees one store. Which node
has a slot is remembered, so only the first call to a slot takes two round trips. Redis Cluster specification, "MOVED
Redirection".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit, urlunsplit

from gateway.redis_url import redis_url
from gateway.telemetry import Logger
from limits.connection import Call, Connection
from limits.wire import Asked, Reply


class Nodes:
    """``seed`` is the connection to the address that was given; use :meth:`close` when it is no longer needed."""

    def __init__(
        self,
        address: str,
        *,
        prepare: Callable[[Call], Awaitable[None]],
        deadline_s: float,
        log: Logger,
        on_change: Callable[[bool], None],
    ) -> None:
        """``on_change`` is told when some node can be called, and when none can.

        Raises:
            ValueError: the address has no known form.
        """
        self._address = redis_url(address)
        self._prepare = prepare
        self._deadline_s = deadline_s
        self._log = log
        self._on_change = on_change
        self._up = 0
        self._by_place: dict[str, Connection] = {}
        self._by_slot: dict[int, Connection] = {}
        self._running: set[asyncio.Task[None]] = set()
        self.seed = self._connect(self._address)

    def of(self, slot: int) -> Connection:
        """Where a key of a hash slot is thought to be; the seed knows better where that is wrong."""
        node = self._by_slot.get(slot, self.seed)
        if node.is_up:
            return node
        return next((other for other in (self.seed, *self._by_place.values()) if other.is_up), node)

    def call(self, slot: int, command: bytes) -> asyncio.Future[Reply]:
        """See :meth:`limits.connection.Connection.call`."""
        return self.of(slot).call(command)

    async def close(self) -> None:
        """Close every connection."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _connect(self, address: str) -> Connection:
        node = Connection(
            address,
            prepare=self._prepare,
            deadline_s=self._deadline_s,
            log=self._log,
            on_change=self._changed,
            on_moved=self._moved,
        )
        self._keep(asyncio.create_task(node.run()))
        return node

    def _changed(self, is_up: bool) -> None:
        before, self._up = self._up, self._up + (1 if is_up else -1)
        if (before > 0) != (self._up > 0):
            self._on_change(self._up > 0)

    def _moved(self, error: str, asked: Asked) -> None:
        """``MOVED <slot> <host>:<port>``."""
        _, slot, place = error.split(" ")
        node = self._by_place.get(place)
        if node is None:
            node = self._by_place[place] = self._connect(node_address(self._address, place))
        self._by_slot[int(slot)] = node
        if node.was_tried:
            node.take_over(asked)  # where it is down that is said at once
        else:
            self._keep(asyncio.create_task(self._hand_over(asked, node)))

    async def _hand_over(self, asked: Asked, node: Connection) -> None:
        await node.wait_tried(self._deadline_s)
        node.take_over(asked)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("limit_store_given_up", exc_info=error)  # our bug


def node_address(address: str, place: str) -> str:
    """The same user, password and kind of connection at ``host:port``."""
    parts = urlsplit(address)
    host, _, port = place.rpartition(":")
    host = host or parts.hostname or "localhost"
    login = parts.netloc.rpartition("@")[0]
    netloc = f"{login}{'@' if login else ''}{f'[{host}]' if ':' in host else host}:{port}"
    scheme = "redis" if parts.scheme == "unix" else parts.scheme
    return urlunsplit((scheme, netloc, "", parts.query, ""))
