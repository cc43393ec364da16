"""A Kafka cluster that a test can take down, freeze, slow down, kill and start again on the same addresses.

It is librdkafka's mock cluster in a process of its own: the real protocol, everything in memory, at most 5 MB of a
partition. It does not look at the sequence numbers of idempotent producers: what is sent again is written again, and
what follows a refused request on the same connection is taken.

    with a_kafka(topics={"usage.records.v1": 12}) as kafka:
        outlet = KafkaOutlet(kafka.brokers, …)
        …
        kafka.consumed.wait_for(1000)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.harness import kafka_broker
from tests.harness.kafka_consumed import Consumed
from tests.harness.process import Process, eventually, free_ports
from tests.harness.valkey import a_directory

MSG_SIZE_TOO_LARGE: Final = 10
NOT_LEADER: Final = 6
TOPIC_AUTHORIZATION_FAILED: Final = 29


class Kafka:
    """The cluster, and what was read from it; topics that nobody has named get four partitions when first used."""

    def __init__(self, directory: Path, *, brokers: int, topics: Mapping[str, int]) -> None:
        ports = free_ports(brokers)
        self.brokers = ",".join(f"127.0.0.1:{port}" for port in ports)
        self.consumed = Consumed(self.brokers)
        self._control = str(directory / "control")
        run = json.dumps({"control": self._control, "ports": ports, "topics": topics})
        command = (sys.executable, str(Path(kafka_broker.__file__)), run)
        self._process = Process("kafka", command, directory=directory, environ={})

    def start(self) -> None:
        """Start it, or start it again, empty."""
        Path(self._control).unlink(missing_ok=True)
        self._process.start()
        eventually(lambda: Path(self._control).exists(), "the cluster listens")
        self.consumed.start()

    def kill(self) -> None:
        """End it at once, as a crash would, when everything that it has acknowledged is read."""
        self.down()
        self.consumed.drain()
        self.consumed.stop()
        self._process.stop(signal.SIGKILL)

    def end(self) -> None:
        """Leave nothing behind."""
        if self._process.running:
            self.thaw()
        self.consumed.stop()
        self._process.stop(signal.SIGKILL)

    def down(self) -> None:
        """Cut every connection and let no new one in."""
        self._tell("down")

    def up(self) -> None:
        """Let connections in."""
        self._tell("up")

    def freeze(self) -> None:
        """Let it do nothing: connections stay, and are still made."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self._process.pid, signal.SIGCONT)

    def latency(self, ms: int) -> None:
        """Answer everything so much later."""
        self._tell("latency", ms=ms)

    def refuse(self, code: int, *, times: int) -> None:
        """Answer the next so many Produce requests with this error of the protocol; 0: no longer."""
        self._tell("refuse", code=code, times=times)

    def topic_error(self, topic: str, code: int) -> None:
        """What Metadata requests are told of a topic; 0: that it is well."""
        self._tell("topic_error", topic=topic, code=code)

    def log(self) -> str:
        """What the process has printed."""
        return self._process.log()

    def _tell(self, do: str, **arguments: str | int) -> None:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(10)
            control.connect(self._control)
            control.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            assert control.recv(16) == b"done\n", self.log()


@contextmanager
def a_kafka(*, brokers: int = 1, topics: Mapping[str, int] | None = None) -> Iterator[Kafka]:
    """A running cluster of so many brokers, whose ``topics`` have so many partitions."""
    with a_directory() as directory:
        kafka = Kafka(directory, brokers=brokers, topics=topics or {})
        try:
            kafka.start()
            yield kafka
        finally:
            kafka.end()
