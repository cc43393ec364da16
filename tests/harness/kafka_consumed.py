"""Everything that a Kafka cluster of the tests has been told, read in the background as a consumer would read it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from tests.harness.kafka_broker import READER
from tests.harness.process import WAIT_S, eventually

REFRESH_S: Final = 0.2
"""Between two looks for new topics."""
ANSWER_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One message as it was read; ``life`` counts the starts of the cluster, whose offsets begin at 0 each time."""

    life: int
    topic: str
    partition: int
    offset: int
    key: str
    value: bytes


class Consumed:
    """What was read so far, in the order of reading, which is that of the log within a partition."""

    def __init__(self, brokers: str) -> None:
        self._settings: dict[str, Any] = {
            "bootstrap.servers": brokers,
            "client.id": READER,
            "group.id": READER,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            "fetch.wait.max.ms": 20,
            "fetch.error.backoff.ms": 20,
            "reconnect.backoff.ms": 20,
            "reconnect.backoff.max.ms": 200,
            "log_level": 0,
        }
        self.messages: list[Read] = []
        self.problems: list[str] = []
        """What makes the messages no whole record: gaps in the offsets."""
        self._life = 0
        self._next: dict[tuple[str, int], int] = {}
        self._consumer: Consumer | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Read a cluster that has just been started, from its beginning."""
        self._life += 1
        self._next = {}
        self._stopping.clear()
        self._consumer = Consumer(self._settings)
        self._thread = threading.Thread(target=self._run, args=(self._consumer,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read no more."""
        self._stopping.set()
        if self._thread is not None and self._consumer is not None:
            self._thread.join()
            self._consumer.close()
            self._consumer = None

    def drain(self) -> None:
        """Wait until everything that the cluster has now is read."""
        for at, end in self._ends().items():
            eventually(partial(self._has_read, at, end), f"{at} is read up to {end}")
        assert not self.problems, self.problems

    def wait_for(self, count: int, *, within_s: float = WAIT_S) -> list[Read]:
        """The messages, once there are at least so many."""
        eventually(lambda: len(self.messages) >= count, f"{count} messages are read", within_s=within_s)
        assert not self.problems, self.problems
        return list(self.messages)

    def by_key(self, topic: str) -> dict[str, list[bytes]]:
        """Values of each key of a topic, in order."""
        values: dict[str, list[bytes]] = defaultdict(list)
        for message in list(self.messages):
            if message.topic == topic:
                values[message.key].append(message.value)
        return dict(values)

    def _ends(self) -> dict[tuple[str, int], int]:
        # A consumer of its own: two threads that use one at the same time wait for each other for ever.
        consumer = Consumer(self._settings)
        try:
            topics = consumer.list_topics(timeout=ANSWER_S).topics
            places = [TopicPartition(topic, number) for topic, each in topics.items() for number in each.partitions]
            ends = [consumer.get_watermark_offsets(place, timeout=ANSWER_S)[1] for place in places]
        finally:
            consumer.close()
        return {(place.topic, place.partition): end for place, end in zip(places, ends, strict=True)}

    def _has_read(self, at: tuple[str, int], end: int) -> bool:
        return self._next.get(at, 0) >= end

    def _run(self, consumer: Consumer) -> None:
        while not self._stopping.is_set():
            self._take_new_topics(consumer)
            for message in consumer.consume(10_000, REFRESH_S):
                if message.error() is None:
                    self._take(message)

    def _take_new_topics(self, consumer: Consumer) -> None:
        try:
            topics = consumer.list_topics(timeout=1.0).topics
        except KafkaException:
            return  # the cluster does not answer at the moment
        found = [(topic, number) for topic, each in topics.items() for number in each.partitions]
        if new := [at for at in found if at not in self._next]:
            self._next |= dict.fromkeys(new, 0)
            consumer.incremental_assign([TopicPartition(*at, OFFSET_BEGINNING) for at in new])

    def _take(self, message: Any) -> None:
        at = (message.topic(), message.partition())
        if message.offset() != self._next[at]:
            self.problems.append(f"{at}: {message.offset()} follows {self._next[at] - 1}")
        self._next[at] = message.offset() + 1
        self.messages.append(
            Read(
                life=self._life,
                topic=message.topic(),
                partition=message.partition(),
                offset=message.offset(),
                key=(message.key() or b"").decode(),
                value=message.value(),
            )
        )


def first_occurrences(values: Sequence[bytes]) -> list[bytes]:
    """The values without repetitions, as a consumer that recognises them keeps them."""
    return list(dict.fromkeys(values))
