"""Where usage records and audit events go: messages in order, handed over in batches, safe or not yet."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

BATCH_MAX: Final = 1000
"""Messages of one :meth:`Outlet.deliver`, at most."""
CALLS_MAX: Final = 16
"""Calls that wait for an outlet's thread, at most; whoever keeps to one at a time never meets it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One record or event: ``id`` tells it from all others (a record by its revision too), ``topic`` such as
    usage.records.v1, ``key`` its organisation, ``value`` one JSON object without newlines.
    """

    id: str
    topic: str
    key: str
    value: bytes

    def __post_init__(self) -> None:
        if b"\n" in self.value:
            raise ValueError(f"message {self.id} has a newline")


def record_message_id(record_id: str, revision: int) -> str:
    """Of two revisions of a record one must not be taken for a repetition of the other."""
    return f"{record_id}/{revision}"


class Refused(Exception):
    """A message that is refused for good; every message before it in the batch is safe.

    ``safe`` is how many those are, ``reason`` the outlet's name for the error. With ``of_topic`` it is not the
    message's fault: all of its topic are refused until somebody changes that.
    """

    def __init__(self, message: Message, *, safe: int, reason: str, of_topic: bool) -> None:
        super().__init__(f"message {message.id} is refused by {message.topic}: {reason}")
        self.message = message
        self.safe = safe
        self.reason = reason
        self.of_topic = of_topic


class Outlet(Protocol):
    """Takes messages for good. One call at a time: the order between two calls under way is not defined."""

    async def deliver(self, messages: Sequence[Message], /) -> int:
        """Hand over at most BATCH_MAX messages in order; how many of them, from the first on, are safe now.

        Safe is acknowledged by all in-sync replicas, or synced to the disk. Fewer than all: the outlet is down. The
        caller tries the rest again later, in order; some of it may have arrived nevertheless, and arrive again.

        Raises:
            Refused: one message will never be taken. The caller sets it aside and goes on behind it, or, where it is
                the topic that is refused, keeps that topic's messages.
            ValueError: more than BATCH_MAX messages.
        """
        ...

    async def close(self) -> None:
        """Let go of files and connections; whatever is not safe by then stays with the caller."""
        ...


def check_batch(messages: Sequence[Message]) -> None:
    """Raise ValueError for more messages than a batch may have."""
    if len(messages) > BATCH_MAX:
        raise ValueError(f"{len(messages)} messages; a batch has at most {BATCH_MAX}")


class OutletThread:
    """Runs calls off the event loop, one after another. A daemon: the interpreter never waits for it at its end."""

    def __init__(self, name: str, *, idle: Callable[[], None] | None = None, idle_s: float = 1.0) -> None:
        """``idle`` runs whenever there was nothing to do for so long."""
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(CALLS_MAX)
        self._idle = idle
        self._idle_s = idle_s
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def call(self, what: Callable[[], T]) -> T:
        """What a call gives or raises; when this is cancelled, a call that has begun still runs to its end."""
        future: Future[T] = Future()

        def settle() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(what())
                except BaseException as error:  # noqa: BLE001 - it is whoever waits for the call that must know
                    future.set_exception(error)

        self._calls.put_nowait(settle)
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the thread once it has run what waits."""
        self._calls.put_nowait(None)

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=self._idle_s if self._idle is not None else None)
            except queue.Empty:
                if self._idle is not None:
                    self._idle()
                continue
            if call is None:
                return
            call()
