"""A deadline that holds even when the code under it swallows its cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_late: set[asyncio.Task[Any]] = set()
"""Calls that were given up but have not ended: the event loop itself would forget them."""


async def within(deadline_s: float, call: Coroutine[Any, Any, T]) -> T:
    """Result of ``call``, which is cancelled and left to end by itself when it takes longer.

    ``asyncio.timeout`` would wait for the cancelled code to end, and cancellations do get lost: ``asyncio.wait_for`` of
    Python 3.11, which redis-py sends through when it has a socket timeout, drops one that arrives as the sending ends.

    Raises:
        TimeoutError: no result within the deadline.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait({task}, timeout=deadline_s)
    finally:
        if not task.done():
            _late.add(task)
            task.add_done_callback(_ended)
            task.cancel()
    if not task.done():
        raise TimeoutError
    return task.result()


def _ended(task: asyncio.Task[Any]) -> None:
    _late.discard(task)
    if not task.cancelled():
        task.exception()  # nobody waits for it any more
