"""Whatever dies: every request that its client saw completed has one record, and budgets and records agree."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from tests.harness.kafka import Kafka, a_kafka
from tests.harness.limits import StoreView, limited_policy
from tests.harness.process import eventually
from tests.harness.stack import Stack, running_stack
from tests.harness.usage_load import Load, Seen, mixed_load

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

REQUESTS = 5000
ORGANIZATIONS = ("one", "two", "three")
BUDGET = {"budgets": [{"period": "MONTHLY", "usd": 1000}]}
HASTY = {"LIMIT_OVERDUE_S": "10", "SIGN_OF_LIFE_S": "1", "USAGE_SWEEP_INTERVAL_S": "1"}
RECORDS = "usage.records.v1"
Records = dict[str, Mapping[str, Any]]


@pytest.fixture
def kafka() -> Iterator[Kafka]:
    with a_kafka(topics={RECORDS: 4, "audit.events.v1": 4}) as running:
        yield running


@pytest.fixture
def stack(kafka: Kafka) -> Iterator[Stack]:
    with running_stack(valkey=True, environ=HASTY | {"KAFKA_BROKERS": kafka.brokers}) as running:
        running.apply(limited_policy(running.uris, organizations=dict.fromkeys(ORGANIZATIONS, BUDGET)))
        yield running


def records_of(kafka: Kafka) -> Records:
    """What a reader has who keeps the highest revision of each record, by request id."""
    kept: Records = {}
    for message in list(kafka.consumed.messages):
        if message.topic == RECORDS:
            record = json.loads(message.value)
            before = kept.get(record["request_id"])
            if before is None or record["revision"] >= before["revision"]:
                assert before is None or before["record_id"] == record["record_id"]
                kept[record["request_id"]] = record
    return kept


class Killer:
    """Kills one thing after another, each as soon as so many more requests have been answered, and starts it again."""

    def __init__(self, stack: Stack, kafka: Kafka, random_: random.Random) -> None:
        self._stack = stack
        self._kafka = kafka
        self._random = random_
        self.answered = 0
        self.killed: Counter[str] = Counter()

    def run(self, until: threading.Event) -> None:
        """Kill until told to stop."""
        kills: list[Callable[[], None]] = [self.ledger, self.worker, self.envoy, self.kafka]
        while not until.is_set():
            self._random.shuffle(kills)
            for kill in kills:
                at = self.answered + self._random.randint(150, 300)
                while self.answered < at and not until.wait(0.01):
                    pass
                if until.is_set():
                    return
                kill()
                self.killed[kill.__name__] += 1

    def _answer(self, more: int) -> None:
        """Requests go on meanwhile; towards the end there may be fewer."""
        at = min(self.answered + more, REQUESTS)
        eventually(lambda: self.answered >= at, "requests go on")

    def ledger(self) -> None:
        self._stack.usage.stop(signal.SIGKILL)
        self._answer(self._random.randint(0, 100))
        self._stack.usage.start()

    def worker(self) -> None:
        pids = self._workers()
        worker = self._random.choice(sorted(pids))
        os.kill(pids[worker], signal.SIGKILL)
        eventually(lambda: self._workers()[worker] != pids[worker], "the worker is started again")

    def _workers(self) -> dict[int, int]:
        """The process id that each worker last served with."""
        events = (json.loads(line) for line in self._stack.extproc.log().splitlines() if '"worker_serving"' in line)
        return {event["worker"]: event["pid"] for event in events}

    def envoy(self) -> None:
        self._stack.envoy.stop(signal.SIGKILL)
        self._stack.envoy.start()

    def kafka(self) -> None:
        self._kafka.kill()
        self._answer(self._random.randint(0, 100))
        self._kafka.start()


def load_under_fire(stack: Stack, kafka: Kafka, seed: int) -> tuple[Load, Killer]:
    killer, stop, failures = Killer(stack, kafka, random.Random(seed)), threading.Event(), []

    def fire() -> None:
        try:
            killer.run(stop)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    thread = threading.Thread(target=fire)
    thread.start()
    try:
        load = asyncio.run(
            mixed_load(
                stack,
                REQUESTS,
                organizations=ORGANIZATIONS,
                random_=random.Random(seed + 1),
                progress=lambda answered: setattr(killer, "answered", answered),
            )
        )
    finally:
        stop.set()
        thread.join()
    assert not failures, failures
    return load, killer


def cost_micro_usd(tokens: tuple[int, int]) -> int:
    return -(-(tokens[0] * 5000 + tokens[1] * 15_000) // 1000)


def is_billed(seen: Seen) -> bool:
    """A request that was let through to a backend, and answered."""
    return seen.status in {200, 502}


def test_every_completed_request_has_one_record_whatever_is_killed(stack: Stack, kafka: Kafka) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    load, killer = load_under_fire(stack, kafka, seed)
    print(f"{killer.killed} killed, {load.broken} requests broken, {Counter(seen.status for seen in load.completed)}")
    assert min(killer.killed[kind] for kind in ("ledger", "worker", "envoy", "kafka")) >= 2
    with ExitStack() as views:
        store = StoreView(stack)
        views.callback(store.close)
        for organization in ORGANIZATIONS:
            eventually(lambda org=organization: store.open(org) == 0, "every request is closed", within_s=60)
        billed = [seen for seen in load.completed if is_billed(seen)]
        eventually(
            lambda: {seen.request_id for seen in billed} <= set(records_of(kafka)), "every request has its record"
        )
        agrees(store, kafka)
        records = records_of(kafka)
        for seen in billed:
            record = records[seen.request_id]
            assert record["organization_id"] == seen.organization_id
            if record["revision"] and seen.tokens is not None:
                assert (record["tokens_input"], record["tokens_output"]) == seen.tokens, record
                assert record["cost_micro_usd"] == cost_micro_usd(seen.tokens)
        estimated = [seen for seen in billed if not records[seen.request_id]["revision"]]
        print(f"{len(records)} records, {len(estimated)} of {len(billed)} completed requests estimated")
        # Only what died with an Envoy before it had told anybody is estimated.
        assert len(estimated) <= 100 * killer.killed["envoy"]


def agrees(store: StoreView, kafka: Kafka) -> None:
    """Money and tokens in budgets are those in records, exactly."""

    def difference() -> dict[str, tuple[int, int, int, int]]:
        found = {}
        for organization in ORGANIZATIONS:
            records = [r for r in records_of(kafka).values() if r["organization_id"] == organization]
            spend = store.spend(organization)
            found[organization] = (
                spend["spent_micro_usd"] - sum(r["cost_micro_usd"] for r in records),
                spend["spent_tokens"] - sum(r["tokens_input"] + r["tokens_output"] for r in records),
                spend["reserved_micro_usd"],
                spend["reserved_tokens"],
            )
        return found

    eventually(lambda: not any(map(any, difference().values())), f"budgets agree with records: {difference()}")
