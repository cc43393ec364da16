"""Audit events on their way into the store.

There is one stream, ``router:audit``, and not one for each organisation: whoever is refused for an unknown key has no
organisation, and one consumer with one cursor reads everything in the order of its writing. Who wants the events of one
organisation filters.

At least once: an event whose write broke off is written again, so readers recognise ``event_id``. The oldest entries go
when there are more than the setting says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, Final

import hiredis

from gateway.audit import AuditEvent
from gateway.errors import StoreUnavailable
from gateway.telemetry import Logger
from limits.connection import CANNOT_SERVE, CommandRefused, Connection
from limits.resp import pack

STREAM: Final = b"router:audit"
QUEUE_MAX: Final = 10_000
EVENT_MAX_BYTES: Final = 16_384
"""With the queue's bound it bounds the memory; an event has some hundred bytes."""
BATCH_MAX: Final = 128
"""Written at once: admissions on the same connection wait for no more than these."""
RETRY_S: Final = 0.2
UP_WAIT_S: Final = 5.0
DRAIN_S: Final = 2.0

_FULL: Final = "queue_full"
_UNWRITABLE: Final = "unwritable"
_CLOSED: Final = "closed"
_REFUSED: Final = "refused"
_OUTAGE: Final = frozenset({_FULL, _REFUSED})
"""What is said again in the next outage; the rest is said once."""


def xadd_command(event: AuditEvent, *, events_max: int) -> bytes:
    """XADD of an event, with what is beyond ``events_max`` cut off roughly.

    Raises:
        TypeError, ValueError, RecursionError: the metadata is not JSON, or the event is too large.
    """
    metadata = json.dumps(dict(event.metadata), default=str, allow_nan=False, separators=(",", ":"))
    fields = {
        "event_id": event.event_id,
        "request_id": event.request_id,
        "organization_id": event.organization_id,
        "actor": event.actor,
        "action": event.action.value,
        "created_at": f"{event.created_at:.3f}",
        "metadata": metadata,
    }
    pairs = [text.encode(errors="backslashreplace") for field in fields.items() for text in field]
    command = pack(b"XADD", STREAM, b"MAXLEN", b"~", b"%d" % events_max, b"*", *pairs)
    if len(command) > EVENT_MAX_BYTES:
        raise ValueError(f"the event has {len(command)} bytes, more than {EVENT_MAX_BYTES}")
    return command


async def append(connection: Connection, event: AuditEvent, *, events_max: int) -> None:
    """Write one event and wait for it: for who must not act without a trace.

    Raises:
        StoreUnavailable: it may not have been written.
        TypeError, ValueError, RecursionError: as :func:`xadd_command`.
    """
    await answer(connection, xadd_command(event, events_max=events_max))


async def answer(connection: Connection, command: bytes) -> Any:
    """Reply to a packed command.

    Raises:
        StoreUnavailable: there is none in time, or it is an error.
    """
    reply = await connection.call(command)
    if isinstance(reply, hiredis.ReplyError):
        raise CommandRefused(str(reply))
    return reply


class AuditStream:
    """See :class:`gateway.audit.AuditTrail`. While the store is down events wait, in order, as far as there is room.

    An event that the server alone refuses of many (it is out of memory) is written after the others.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        events_max: int,
        log: Logger,
        queue_max: int = QUEUE_MAX,
        on_drop: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``on_drop`` is told how many events were dropped just now."""
        self._connection = connection
        self._events_max = events_max
        self._log = log
        self._queue_max = queue_max
        self._on_drop = on_drop
        self._queue: deque[bytes] = deque()
        self._waiting = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._told: set[str] = set()
        self._dropped = 0
        self._dropped_before = 0

    @property
    def dropped(self) -> int:
        """Events dropped so far."""
        return self._dropped

    @property
    def queued(self) -> int:
        """Events that wait to be written."""
        return len(self._queue)

    def record(self, event: AuditEvent) -> None:
        """Queue an event."""
        if self._closed or len(self._queue) >= self._queue_max:
            self._drop(1, _CLOSED if self._closed else _FULL)
            return
        try:
            command = xadd_command(event, events_max=self._events_max)
        except (TypeError, ValueError, RecursionError) as error:
            self._drop(1, _UNWRITABLE, error=str(error), action=event.action.value)
            return
        self._queue.append(command)
        self._idle.clear()
        self._waiting.set()

    async def run(self) -> None:
        """Write what is queued, until cancelled."""
        while True:
            await self._waiting.wait()
            if await self._connection.wait_up(UP_WAIT_S) and not await self._write_batch():
                await asyncio.sleep(RETRY_S)

    async def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Wait until everything is written, but no longer than this; what is left then is dropped."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        self._closed = True
        left = len(self._queue)
        self._queue.clear()
        self._waiting.clear()
        if left:
            self._drop(left, _CLOSED)

    async def _write_batch(self) -> bool:
        """Whether the store took the whole batch; what it did not take is the next batch's."""
        batch = list(islice(self._queue, BATCH_MAX))
        sent: list[asyncio.Future[Any]] = []
        with contextlib.suppress(StoreUnavailable):  # down, or too many calls wait: the rest stays where it is
            for command in batch:
                sent.append(self._connection.call(command))
        replies = await asyncio.gather(*sent, return_exceptions=True)
        kept = [command for command, reply in zip(batch, replies, strict=False) if not isinstance(reply, bytes)]
        self._note_refusals(replies)
        if self._closed:
            return True
        for _ in sent:
            self._queue.popleft()
        self._queue.extendleft(reversed(kept))
        if not self._queue:
            self._caught_up()
        return not kept and len(sent) == len(batch)

    def _note_refusals(self, replies: list[Any]) -> None:
        """A server that answers and does not write: said once, and left where another connection may do better."""
        refusal = next((str(reply) for reply in replies if isinstance(reply, hiredis.ReplyError)), None)
        if refusal is None:
            return
        if _REFUSED not in self._told:
            self._told.add(_REFUSED)
            self._log.error("audit_write_refused", error=refusal)
        if refusal.startswith(CANNOT_SERVE):
            self._connection.drop(refusal)

    def _caught_up(self) -> None:
        self._waiting.clear()
        self._idle.set()
        if self._told & _OUTAGE:
            self._log.info("audit_stream_caught_up", dropped=self._dropped - self._dropped_before)
            self._told -= _OUTAGE
        self._dropped_before = self._dropped

    def _drop(self, count: int, why: str, **fields: str) -> None:
        self._dropped += count
        self._on_drop(count)
        if why not in self._told:
            self._told.add(why)
            self._log.error("audit_events_dropped", reason=why, **fields)


@asynccontextmanager
async def open_audit_stream(
    connection: Connection,
    *,
    events_max: int,
    log: Logger,
    on_drop: Callable[[int], None] = lambda _: None,
    drain_s: float = DRAIN_S,
) -> AsyncIterator[AuditStream]:
    """The stream, written while the block runs and drained at its end. The connection must outlive the block.

    Args:
        connection: the limit store's.
        events_max: events kept in the store.
        log: is told of an outage that costs events once, and when it is over.
        on_drop: is told how many events were dropped just now.
        drain_s: how long the end may take.
    """
    stream = AuditStream(connection, events_max=events_max, log=log, on_drop=on_drop)
    running = asyncio.create_task(stream.run())
    try:
        yield stream
    finally:
        await stream.drain(drain_s)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
