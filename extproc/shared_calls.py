"""At most one call about a thing at a time, shared by all who ask meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from gateway.errors import StoreUnavailable

K = TypeVar("K")
V = TypeVar("V")


class SharedCalls(Generic[K, V]):
    """Calls of ``name`` under way, by what they are about: at most ``most``."""

    def __init__(self, name: str, *, most: int) -> None:
        self._name = name
        self._most = most
        self._running: dict[K, asyncio.Task[V]] = {}
        self._tasks: set[asyncio.Task[V]] = set()

    def start(self, key: K, call: Callable[[], Coroutine[Any, Any, V]]) -> asyncio.Task[V]:
        """The call under way about ``key``, or else ``call``, begun now. Nobody has to wait for it.

        Raises:
            StoreUnavailable: too many calls are running.
        """
        running = self._running.get(key)
        if running is not None:
            return running
        if len(self._tasks) >= self._most:
            raise StoreUnavailable(f"{self._name}: {self._most} lookups are already running")
        task = asyncio.create_task(self._call(key, call))
        self._running[key] = task
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def share(self, key: K, call: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """Result of the call about ``key``. A cancelled caller leaves it running for the others.

        Raises:
            StoreUnavailable: too many calls are running, or they are being closed. And whatever the call raises.
        """
        task = self.start(key, call)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if task.cancelled() and own is not None and not own.cancelling():
                raise StoreUnavailable(f"{self._name}: closing") from None
            raise

    def forget(self, key: K | None) -> None:
        """Let the next to ask about ``key``, or with None about anything, make a call of their own."""
        if key is None:
            self._running.clear()
        else:
            self._running.pop(key, None)

    def is_current(self, key: K) -> bool:
        """Whether the call that is asking this has not been forgotten since it began."""
        return self._running.get(key) is asyncio.current_task()

    async def close(self) -> None:
        """Cancel the calls under way; those who share them get StoreUnavailable."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _call(self, key: K, call: Callable[[], Coroutine[Any, Any, V]]) -> V:
        try:
            return await call()
        finally:
            if self.is_current(key):
                del self._running[key]

    def _ended(self, task: asyncio.Task[V]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also when everyone who waited for it has gone
