"""Kafka as the outlet: librdkafka's idempotent producer, acks=all, keyed by organisation.

What holds, within an organisation: nothing is lost and nothing overtakes. Messages may come twice; whoever recognises
``record_id`` and keeps the first sees them in order. How:

* The producer keeps order through its own retries, and never gives a message up (``message.timeout.ms=0``). So when a
  call's deadline passes, what is under way stays under way; the next call begins with the same messages and waits on
  for them. Nothing is sent a second time because a broker was slow, frozen or away.
* A gap is fatal to the producer (``enable.gapless.guarantee``): nothing behind a message that has failed is written.
* After a fatal error, or when nothing has moved for long, or when the caller comes with other messages, the producer is
  thrown away with all it holds and a new one begins at the first message that is not known to be written. What the old
  one had on its way may still arrive, but only as a run without gaps from that message on, as the broker checks its
  sequence numbers: it repeats messages and changes nothing about which of two comes first.
* A batch with a refused message is sent again in ever smaller parts, down to the one message at fault: brokers refuse
  whole batches. Then :class:`usage.outlet.Refused`.

A topic that does not exist (yet) is waited for. More partitions for a topic would move organisations between them:
their order then needs an empty outlet. librdkafka: INTRODUCTION.md "Idempotent Producer", CONFIGURATION.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from confluent_kafka import KafkaError

from gateway.telemetry import Logger
from usage.kafka_session import POLL_S, Handed, Lines, Session, producer_settings
from usage.outlet import BATCH_MAX, Message, OutletThread, Refused, check_batch

DEADLINE_S: Final = 10.0
STALLED_S: Final = 120.0
"""A producer that gets no acknowledgement for so long is replaced; a request to a broker takes at most 30 s to fail."""
NARROWING: Final = 8
"""A refused batch is sent again in parts of this fraction."""
RESTART_S: Final = 0.2
RESTART_MAX_S: Final = 5.0
"""Before a new producer tries again; doubled each time until something is acknowledged."""

_MESSAGE_REFUSED: Final = frozenset(
    {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE, KafkaError.INVALID_RECORD, KafkaError.POLICY_VIOLATION}
)
_TOPIC_REFUSED: Final = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TOPIC_EXCEPTION})
_REFUSED: Final = _MESSAGE_REFUSED | _TOPIC_REFUSED


class KafkaOutlet:
    """Delivers to Kafka; see the module."""

    def __init__(
        self,
        brokers: str,
        *,
        log: Logger,
        clock_s: Callable[[], float],
        settings: Mapping[str, str | int | bool] | None = None,
        deadline_s: float = DEADLINE_S,
        stalled_s: float = STALLED_S,
    ) -> None:
        """``brokers``: ``host:port,…``; ``settings`` are librdkafka's, such as SASL and TLS. ``clock_s`` is monotonic.

        Raises:
            ValueError: a setting that librdkafka does not accept, or that is not for others to set.
        """
        self._settings = producer_settings(brokers, settings or {})
        self._log = log
        self._clock_s = clock_s
        self._deadline_s = deadline_s
        self._stalled_s = stalled_s
        self._lines = Lines(log, clock_s)
        self._stop = threading.Event()
        self._behind = False
        self._handed: list[Handed] = []  # always the first messages that the caller does not know to be safe
        self._written: frozenset[tuple[str, str]] = frozenset()  # acknowledged to a producer that is gone
        self._moved_s = clock_s()
        self._pause_s = RESTART_S
        self._at_once = BATCH_MAX
        self._suspects = 0  # so many messages go in small parts, because one of them was refused
        self._session = Session(self._settings, self._lines, clock_s)
        self._thread = OutletThread("usage-kafka", idle=self._idle)

    async def deliver(self, messages: Sequence[Message], /) -> int:
        """See :class:`usage.outlet.Outlet`; returns within the deadline, whether or not a broker answers."""
        check_batch(messages)
        return 0 if self._stop.is_set() else await self._thread.call(lambda: self._deliver(messages))

    async def close(self) -> None:
        """See :class:`usage.outlet.Outlet`; a call under way returns at once."""
        if not self._stop.is_set():
            self._stop.set()
            await self._thread.call(self._session.end)
            self._thread.stop()

    def _idle(self) -> None:
        if not self._stop.is_set():
            self._session.poll(0)

    def _deliver(self, messages: Sequence[Message]) -> int:
        end_s = self._clock_s() + self._deadline_s
        if [each.message for each in self._handed] != list(messages[: len(self._handed)]):
            self._log.warning("kafka_producer_replaced", reason="other messages", messages=len(self._handed))
            self._restart()
        safe = 0
        while safe < len(messages) and not self._is_over(end_s):
            self._hand_over(messages[safe : safe + self._at_once], end_s)
            self._wait(end_s)
            safe += self._take_acked()
            if self._session.fatal or (self._handed and self._handed[0].error is not None):
                self._recover(safe)
            elif self._handed and self._clock_s() - self._moved_s > self._stalled_s:
                self._log.warning("kafka_producer_replaced", reason="stalled", messages=len(self._handed))
                self._restart()
        self._tell(len(messages) - safe)
        return safe

    def _is_over(self, end_s: float) -> bool:
        return self._stop.is_set() or self._clock_s() >= end_s

    def _hand_over(self, part: Sequence[Message], end_s: float) -> None:
        if not self._handed:
            self._moved_s = self._clock_s()
        for message in part[len(self._handed) :]:
            if self._session.failed:
                return
            handed = Handed(message, acked=(message.topic, message.id) in self._written)
            while not handed.acked and not self._session.produce(handed):
                if self._session.failed or self._is_over(end_s):
                    return
                self._session.poll(POLL_S)
            self._handed.append(handed)

    def _wait(self, end_s: float) -> None:
        """Until everything is reported, unless the producer will not report it."""
        while any(each.is_waiting for each in self._handed) and not self._session.fatal and not self._is_over(end_s):
            self._session.poll(min(POLL_S, max(end_s - self._clock_s(), 0)))

    def _take_acked(self) -> int:
        acked = next((at for at, each in enumerate(self._handed) if not each.acked), len(self._handed))
        del self._handed[:acked]
        if acked:
            self._moved_s = self._clock_s()
            self._pause_s = RESTART_S
        self._suspects = max(self._suspects - acked, 0)
        if not self._suspects:
            self._at_once = BATCH_MAX
        return acked

    def _recover(self, safe: int) -> None:
        """Begin anew after a failure; raise Refused once it is sure which message is at fault."""
        failed, was = self._handed, self._session
        self._restart()
        errors = [each.error for each in failed if each.error is not None]
        refused = next((error for error in errors if error.code() in _REFUSED), None)
        if refused is None:
            self._log.warning("kafka_producer_replaced", reason=was.problem or str(errors[:1]), messages=len(failed))
            self._stop.wait(self._pause_s)
            self._pause_s = min(2 * self._pause_s, RESTART_MAX_S)
        elif was.fatal and len(failed) > 1:  # a broker refused the batch, not one of its messages
            self._suspects, self._at_once = len(failed), max(len(failed) // NARROWING, 1)
        elif failed[0].error is refused:
            self._suspects, self._at_once = 0, BATCH_MAX
            is_topic = refused.code() in _TOPIC_REFUSED
            raise Refused(failed[0].message, safe=safe, reason=refused.name(), of_topic=is_topic)

    def _restart(self) -> None:
        """Replace the producer; what it has written stays known, up to an organisation's first message that is not."""
        self._session.end()
        written, waiting = set(), set()
        for each in self._handed:
            of = (each.message.topic, each.message.key)
            if not each.acked:
                waiting.add(of)
            elif of not in waiting:
                written.add((each.message.topic, each.message.id))
        self._written = frozenset(written)
        self._handed = []
        self._moved_s = self._clock_s()
        self._session = Session(self._settings, self._lines, self._clock_s)

    def _tell(self, waiting: int) -> None:
        if waiting and not self._behind:
            self._log.warning("kafka_behind", messages=waiting, error=self._session.problem)
        elif self._behind and not waiting:
            self._log.info("kafka_caught_up")
        self._behind = waiting > 0
