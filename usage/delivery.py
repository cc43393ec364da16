"""From the spool to whoever bills: records and audit events, in the order in which they were written.

Three streams, each with a mark and an outlet of its own, so that one that is refused does not hold up the others. What
the outlet has taken is marked in the spool; what it has not is offered again, in order. So each message comes at least
once, and again only where the mark was lost: readers know it by its ``record_id`` or ``event_id``.

A message that the outlet refuses for good does not hold up the others. It stays in the spool, and is offered again
after each start of the ledger: by then somebody may have mended what it was refused for.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from gateway.audit import AuditAction
from gateway.telemetry import Logger
from usage.archive import Archive, KeptEvent, Outgoing
from usage.json_text import from_json, json_text
from usage.metrics import LedgerMetrics
from usage.outlet import BATCH_MAX, Message, Outlet, Refused, record_message_id
from usage.record import MICRO, iso
from usage.spool import ALLOWED_MARK, EVENTS_MARK, RECORDS_MARK, Changes, Refusal
from usage.writer import Writer

RECORDS_TOPIC: Final = "usage.records.v1"
EVENTS_TOPIC: Final = "audit.events.v1"
RETRY_S: Final = 1.0
LOOK_S: Final = 0.5
PAUSE_S: Final = 0.25
"""Between two parts of a stream that is not behind: each is synced to a disk somewhere."""

Kept = TypeVar("Kept", Outgoing, KeptEvent)
Places = Sequence[tuple[int, Message | str | None]]
"""What is next in a stream, by its place; None where nothing is handed on of it, a text where it cannot be: why."""


class Stream:
    """One stream: where it stands, and what comes next."""

    def __init__(self, mark: str, outlet: Outlet, read: Callable[[int, str | None], Awaitable[Places]]) -> None:
        """``read`` takes the place after which, and the mark where only what was refused is asked for."""
        self.mark = mark
        self.outlet = outlet
        self.read = read
        self.at = 0
        self.taken = 0
        """Messages that the outlet has taken, ever."""
        self.again_at: int | None = 0
        """Up to here what was refused before this start has been offered again; None: all of it."""
        self.stopped = False
        self.written = asyncio.Event()


class Delivery:
    """See above."""

    def __init__(
        self,
        archive: Archive,
        writer: Writer,
        outlets: Mapping[str, Outlet],
        *,
        metrics: LedgerMetrics,
        log: Logger,
        clock_s: Callable[[], float],
        retry_s: float = RETRY_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        """``outlets`` by the marks of the streams."""
        self._archive = archive
        self._writer = writer
        self._metrics = metrics
        self._log = log
        self._clock_s = clock_s
        self._retry_s = retry_s
        self._pause_s = pause_s
        self._records = Stream(RECORDS_MARK, outlets[RECORDS_MARK], self._read_records)
        self._streams = (
            self._records,
            Stream(ALLOWED_MARK, outlets[ALLOWED_MARK], self._read_allowed),
            Stream(EVENTS_MARK, outlets[EVENTS_MARK], self._read_events),
        )
        self.waiting = 0
        """Requests that have not been handed on."""
        self.oldest_s = 0.0
        """Age of the oldest of them."""
        self.refused = 0
        """Records that could not be handed on."""

    def wake(self) -> None:
        """There is something new."""
        for stream in self._streams:
            stream.written.set()

    async def run(self) -> None:
        """Hand on what is written, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for stream in self._streams:
                tasks.create_task(self._follow(stream))

    async def _follow(self, stream: Stream) -> None:
        stream.at = int(await self._writer.mark(stream.mark, 0))
        stream.taken = int(await self._writer.mark(count_mark(stream.mark), 0))
        while True:
            stream.written.clear()
            try:
                more = await self._offer_again(stream) or await self._hand_on(stream)
                if stream is self._records:
                    await self._measure()
            except sqlite3.Error as error:
                self._log.error("spool_not_readable", error=str(error))
                more = False
            if stream.stopped:
                await asyncio.sleep(self._retry_s)
            elif not more:
                await asyncio.sleep(self._pause_s)
                # Whoever writes wakes this; now and then it looks by itself. Not wait_for: in Python 3.11 it may take a
                # cancellation for an answer, and then the program would never end.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await stream.written.wait()

    async def _hand_on(self, stream: Stream) -> bool:
        """Hand on the next part of a stream; whether there may be more."""
        places = await stream.read(stream.at, None)
        if not places:
            return False
        at, changes = await self._deliver(stream, places)
        if at > stream.at:
            stream.at = at
            changes.marks |= {stream.mark: at, count_mark(stream.mark): stream.taken}
            self._writer.insist(changes)
        return at == places[-1][0] and len(places) == BATCH_MAX

    async def _offer_again(self, stream: Stream) -> bool:
        """Offer some of what was refused before a start; whether there may be more. What is refused again stays."""
        after = stream.again_at
        if after is None:
            return False
        places = await stream.read(after, stream.mark)
        if not places:
            stream.again_at = None
            return False
        at, changes = await self._deliver(stream, places)
        stream.again_at = max(at, after)
        changes.offered_again = [(stream.mark, place) for place, _ in places if place <= at]
        changes.marks[count_mark(stream.mark)] = stream.taken
        self._writer.insist(changes)
        return True  # nothing else comes between: an outlet that is down goes on with the same messages

    async def _deliver(self, stream: Stream, places: Places) -> tuple[int, Changes]:
        """The place up to which nothing need be offered again, and what of it was refused."""
        messages = [(place, what) for place, what in places if isinstance(what, Message)]
        refusals = [Refusal(stream=stream.mark, place=at, reason=what) for at, what in places if isinstance(what, str)]
        done, why = 0, ""
        while done < len(messages) and not why:
            rest = [message for _, message in messages[done:]]
            try:
                count = await stream.outlet.deliver(rest)
                why = "" if count == len(rest) else "the outlet is down"
            except Refused as refused:
                count = refused.safe
                if refused.of_topic:
                    why = str(refused)
                else:
                    refusals.append(Refusal(stream=stream.mark, place=messages[done + count][0], reason=refused.reason))
                    self._set_aside(refused)
                    done += 1
            self._metrics.delivered.labels(rest[0].topic).inc(count)
            stream.taken += count
            done += count
        self._tell(stream, why)
        at = places[-1][0] if done == len(messages) else messages[done][0] - 1
        return at, Changes(refused=[refusal for refusal in refusals if refusal.place <= at])

    def _tell(self, stream: Stream, why: str) -> None:
        if bool(why) != stream.stopped:
            stream.stopped = bool(why)
            if why:
                self._log.warning("delivery_stopped", stream=stream.mark, error=why)
            else:
                self._log.info("delivery_resumed", stream=stream.mark)

    def _set_aside(self, refused: Refused) -> None:
        """Somebody has to look at it."""
        self._metrics.undeliverable.inc()
        self._log.error("undeliverable", id=refused.message.id, topic=refused.message.topic, error=refused.reason)

    async def _measure(self) -> None:
        self.waiting, oldest_us = await self._archive.backlog(after=self._records.at)
        self.oldest_s = 0.0 if oldest_us is None else max(0.0, self._clock_s() - oldest_us / MICRO)
        self._metrics.undelivered.set(self.waiting)
        self.refused = await self._archive.refused(RECORDS_MARK)
        self._metrics.oldest_undelivered_s.set(self.oldest_s)
        self._metrics.refused.set(self.refused)

    async def _read_records(self, after: int, refused_of: str | None) -> Places:
        found = await self._archive.outgoing(after=after, most=BATCH_MAX, refused_of=refused_of)
        return [(request.seq, self._made(_record_message, request)) for request in found]

    async def _read_allowed(self, after: int, refused_of: str | None) -> Places:
        found = await self._archive.outgoing(after=after, most=BATCH_MAX, refused_of=refused_of)
        return [(request.seq, self._made(_allowed_message, request)) for request in found]

    async def _read_events(self, after: int, refused_of: str | None) -> Places:
        found = await self._archive.outgoing_events(after=after, most=BATCH_MAX, refused_of=refused_of)
        return [(event.seq, self._made(_event_message, event)) for event in found]

    def _made(self, make: Callable[[Kept], Message | None], kept: Kept) -> Message | str | None:
        """A message, or why there is none of what a damaged spool may have given back."""
        try:
            return make(kept)
        except (ValueError, TypeError, KeyError) as error:
            self._metrics.undeliverable.inc()
            self._log.error(
                "undeliverable", id=kept.request_id, place=kept.seq, error=f"{type(error).__name__}: {error}"
            )
            return "UNREADABLE"


def count_mark(mark: str) -> str:
    """The mark of how many messages a stream has handed on, ever, beside that of its place."""
    return f"{mark}_count"


def _record_message(request: Outgoing) -> Message | None:
    if request.record is None:
        return None
    fields = from_json(request.record)
    return Message(
        id=record_message_id(fields["record_id"], fields["revision"]),
        topic=RECORDS_TOPIC,
        key=request.organization_id,
        value=request.record.encode(),
    )


def _allowed_message(request: Outgoing) -> Message | None:
    if request.record is None or request.kind != "forwarded":
        return None
    return _message(allowed_event(request, from_json(request.record)))


def _event_message(event: KeptEvent) -> Message:
    return _message(event_json(event))


def _message(event: Mapping[str, Any]) -> Message:
    value = json_text(event).encode()
    return Message(id=event["event_id"], topic=EVENTS_TOPIC, key=event["organization_id"], value=value)


_ABOUT: Final = ("model", "backend_id", "decision_reason", "status", "policy_version", "cost_micro_usd", "trace_id")


def allowed_event(request: Outgoing, record: Mapping[str, Any]) -> dict[str, Any]:
    """The audit event of a request that was let through, made of its record."""
    # An estimate is followed by another event, which is not to be taken for the same one.
    estimated = "" if record["revision"] else ":estimated"
    return {
        "event_id": f"{request.request_id}:allowed{estimated}",
        "request_id": request.request_id,
        "organization_id": request.organization_id,
        "actor": record["api_key_id"],
        "action": AuditAction.REQUEST_ALLOWED.value,
        "created_at": iso(request.started_us),
        "metadata": {name: record[name] for name in _ABOUT if name in record},
    }


def event_json(event: KeptEvent) -> dict[str, Any]:
    """An audit event as the contract has it."""
    return {
        "event_id": event.event_id,
        "request_id": event.request_id,
        "organization_id": event.organization_id,
        "actor": event.actor,
        "action": event.action,
        "created_at": iso(event.created_us),
        "metadata": from_json(event.metadata),
    }
