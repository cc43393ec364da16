"""Calls to the limit store that are sent again where that may help and does no harm, all within one deadline."""

from __future__ import annotations

import asyncio
from typing import Final

import hiredis

from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.connection import CANNOT_SERVE, Call, Connection
from limits.nodes import Nodes
from limits.resp import pack
from limits.scripts import SCRIPTS
from limits.wire import Reply

RECONNECT_WAIT_S: Final = 0.1


class Calls:
    """Asks the node that has a hash slot."""

    def __init__(self, nodes: Nodes, *, deadline_s: float, log: Logger) -> None:
        self._nodes = nodes
        self._deadline_s = deadline_s
        self._log = log
        self._told: set[str] = set()
        self._loading: asyncio.Task[None] | None = None

    async def ask(self, slot: int, command: bytes, *, repeatable: bool = False) -> Reply:
        """Reply to a command, which is sent again where that may help and does no harm, all within the deadline."""
        until_s = asyncio.get_running_loop().time() + self._deadline_s
        asked = self._nodes.call(slot, command)
        try:
            reply = await asked
        except StoreUnavailable as lost:
            if not repeatable:
                raise
            return await self._ask_again(slot, command, lost, until_s)
        if isinstance(reply, hiredis.ReplyError):
            return await self._ask_again(slot, command, reply, until_s)
        return reply

    async def _ask_again(self, slot: int, command: bytes, why: Exception, until_s: float) -> Reply:
        try:
            async with asyncio.timeout_at(until_s):
                while True:
                    await self._mend(self._nodes.of(slot), why)
                    reply = await self._nodes.call(slot, command)
                    if not isinstance(reply, hiredis.ReplyError):
                        return reply
                    why = reply
        except TimeoutError:
            raise StoreUnavailable(str(why)) from None

    async def _mend(self, node: Connection, why: Exception) -> None:
        """Do what lets a call succeed that has failed without having done anything, or that may be repeated.

        Raises:
            StoreUnavailable: nothing does, or not soon.
        """
        if isinstance(why, hiredis.ReplyError):
            if str(why).startswith("NOSCRIPT"):
                await self._load(node)
                return
            if not str(why).startswith(CANNOT_SERVE):
                self._tell(str(why))
                raise StoreUnavailable(str(why))
            node.drop(str(why))
        if not await node.wait_up(RECONNECT_WAIT_S):
            raise StoreUnavailable(str(why))

    def _tell(self, error: str) -> None:
        """Log each kind of error once: a server that is full, or our bug."""
        kind = error.partition(" ")[0]
        if kind not in self._told:
            self._told.add(kind)
            self._log.error("limit_store_refused", error=error)

    async def _load(self, node: Connection) -> None:
        """Send the scripts again, once for all calls that miss them."""
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(_send_scripts(node))
        await asyncio.shield(self._loading)


async def _send_scripts(node: Connection) -> None:
    await asyncio.gather(*[node.call(pack(b"SCRIPT", b"LOAD", script.source)) for script in SCRIPTS])


async def load_scripts(call: Call) -> None:
    """Make the scripts known to a server."""
    for script in SCRIPTS:
        await call(b"SCRIPT", b"LOAD", script.source)
