"""One producer of librdkafka, its settings, and what it reports; :mod:`usage.kafka` has what is made of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Producer

from gateway.telemetry import Logger
from usage.outlet import BATCH_MAX, Message

POLL_S: Final = 0.1
END_S: Final = 0.5
"""For what a producer still has to report at its end."""
LINES_MAX: Final = 10
LINES_S: Final = 60.0
"""Of librdkafka's log lines so many in so many seconds are passed on."""

_EXPECTED: Final = ("property enable.gapless.guarantee is experimental", "failed: Local: Purged in flight")
_INVARIANTS: Final[Mapping[str, Any]] = {
    "enable.idempotence": True,
    "enable.gapless.guarantee": True,
    "acks": "all",
    "message.timeout.ms": 0,
    "topic.metadata.propagation.max.ms": 3_600_000,
    "partitioner": "murmur2_random",
}
_NOT_YOURS: Final = frozenset(
    [
        *_INVARIANTS,
        *("bootstrap.servers", "metadata.broker.list", "request.required.acks", "delivery.timeout.ms", "retries"),
        *("message.send.max.retries", "transactional.id", "on_delivery", "dr_cb", "error_cb", "logger"),
    ]
)
_DEFAULTS: Final[Mapping[str, Any]] = {
    "client.id": "router-usage",
    "linger.ms": 1,
    "compression.type": "lz4",
    "queue.buffering.max.messages": 10 * BATCH_MAX,
    "queue.buffering.max.kbytes": 64 * 1024,
    "reconnect.backoff.max.ms": 1000,
    "socket.keepalive.enable": True,
    "enable.metrics.push": False,
}


def producer_settings(brokers: str, settings: Mapping[str, str | int | bool]) -> dict[str, Any]:
    """All settings of a producer: ours, and what others may set.

    Raises:
        ValueError: one that is not for others to set.
    """
    if not_yours := sorted(_NOT_YOURS & set(settings)):
        raise ValueError(f"{', '.join(not_yours)}: not to be set, the order and safety of messages depend on it")
    return {**_DEFAULTS, **settings, **_INVARIANTS, "bootstrap.servers": brokers}


class Handed:
    """A message that was handed over, and what became of it."""

    __slots__ = ("acked", "error", "message")

    def __init__(self, message: Message, *, acked: bool) -> None:
        self.message = message
        self.acked = acked
        self.error: KafkaError | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether nothing is known yet."""
        return not self.acked and self.error is None


class Lines:
    """librdkafka's log lines as events; has the one method of a logger that confluent_kafka calls."""

    def __init__(self, log: Logger, clock_s: Callable[[], float]) -> None:
        self._log = log
        self._clock_s = clock_s
        self._since_s = clock_s()
        self._lines = 0

    def log(self, level: int, _: str, facility: str, __: str, line: str, /) -> None:
        """Pass a line on, unless there were too many."""
        if any(expected in line for expected in _EXPECTED):
            return
        now_s = self._clock_s()
        if now_s - self._since_s >= LINES_S:
            if self._lines > LINES_MAX:
                self._log.warning("kafka_library_lines_dropped", lines=self._lines - LINES_MAX)
            self._since_s, self._lines = now_s, 0
        self._lines += 1
        if self._lines <= LINES_MAX:
            self._log.log(level, "kafka_library", facility=facility, line=line)


class Session:
    """One producer. All its methods are called by one thread: two at once in a client object can block each other."""

    def __init__(self, settings: Mapping[str, Any], lines: Lines, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self.failed = False
        """Whether a message has failed: none may follow it."""
        self.fatal = False
        self.problem = ""
        """The last thing that librdkafka complained of."""
        try:
            self._producer = Producer({**settings, "error_cb": self._complained, "logger": lines})
        except (KafkaException, TypeError) as error:
            raise ValueError(f"Kafka producer: {error}") from error

    def produce(self, handed: Handed) -> bool:
        """Queue a message; False when there is no room now. What librdkafka itself refuses is reported at once."""
        message = handed.message

        def reported(error: KafkaError | None, _: Any) -> None:
            handed.acked, handed.error = error is None, error
            self.failed = self.failed or error is not None

        try:
            self._producer.produce(message.topic, message.value, message.key, on_delivery=reported)
        except BufferError:
            return False
        except KafkaException as error:
            reported(error.args[0], None)
        return True

    def poll(self, timeout_s: float) -> None:
        """Let librdkafka report what has happened."""
        try:
            self._producer.poll(timeout_s)
        except KafkaException as error:  # how a fatal error is told, besides the callback
            self._complained(error.args[0])

    def end(self) -> None:
        """Give up what is on its way, once it is reported. Connections end in the background."""
        self._producer.purge(blocking=False)
        end_s = self._clock_s() + END_S
        while len(self._producer) and self._clock_s() < end_s:
            self.poll(POLL_S)
        threading.Thread(target=_let_go, args=([self._producer],), name="usage-kafka-end", daemon=True).start()
        del self._producer

    def _complained(self, error: KafkaError) -> None:
        self.problem = error.str()
        self.fatal = self.fatal or error.fatal()
        self.failed = self.failed or self.fatal


def _let_go(producers: list[Producer]) -> None:
    """Destroy the producer here, where it may take its time: a thread of it may be in a look-up of a name."""
    producers.clear()
