"""Messages to Kafka over the real protocol: order and completeness whatever the brokers do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from gateway.telemetry import get_logger
from tests.harness.kafka import MSG_SIZE_TOO_LARGE, TOPIC_AUTHORIZATION_FAILED, Kafka, a_kafka
from tests.harness.kafka_consumed import first_occurrences
from tests.harness.kafka_messages import EVENTS, RECORDS, a_message, messages, values_by_key
from tests.harness.process import free_ports
from usage.kafka import KafkaOutlet
from usage.outlet import BATCH_MAX, Message, Refused

pytestmark = pytest.mark.integration

SHORT_S: Final = 1.0
"""A deadline that a test can wait for; a new producer may need longer for its first message."""
SLACK_S: Final = 2.0
STRICT: Final = {"max.in.flight": 1}
"""For refused requests: a real broker refuses those behind one it has refused, the mock takes them."""


@pytest.fixture
def kafka() -> Iterator[Kafka]:
    with a_kafka(topics={RECORDS: 12, EVENTS: 3}) as cluster:
        yield cluster


@asynccontextmanager
async def an_outlet(brokers: str, **arguments: Any) -> AsyncIterator[KafkaOutlet]:
    outlet = KafkaOutlet(brokers, log=get_logger(), clock_s=time.monotonic, **arguments)
    try:
        yield outlet
    finally:
        await outlet.close()


async def deliver_all(outlet: KafkaOutlet, batch: list[Message]) -> None:
    """As the caller does it: what is not safe is tried again, from the first on."""
    async with asyncio.timeout(60):
        safe = 0
        while safe < len(batch):
            safe += await outlet.deliver(batch[safe : safe + BATCH_MAX])


def assert_read_in_order(kafka: Kafka, sent: list[Message]) -> int:
    """Each organisation's messages were read, in their order, repetitions aside; how many repetitions there were."""
    kafka.consumed.drain()
    for topic in {message.topic for message in sent}:
        read = kafka.consumed.by_key(topic)
        expected = values_by_key(message for message in sent if message.topic == topic)
        assert {key: first_occurrences(values) for key, values in read.items()} == expected
    return len(kafka.consumed.messages) - len(sent)


async def test_twenty_thousand_messages_arrive_once_in_the_order_of_their_organisations(kafka: Kafka) -> None:
    sent = messages(20_000, padding=300)
    async with an_outlet(kafka.brokers) as outlet:
        for start in range(0, len(sent), BATCH_MAX):
            assert await outlet.deliver(sent[start : start + BATCH_MAX]) == BATCH_MAX
    assert assert_read_in_order(kafka, sent) == 0
    assert len({(read.key, read.partition) for read in kafka.consumed.messages}) == 50


async def test_a_broker_that_goes_down_in_the_middle_and_comes_back(kafka: Kafka) -> None:
    sent = messages(20_000, padding=100)
    async with an_outlet(kafka.brokers) as outlet:
        await deliver_all(outlet, sent[:5000])
        kafka.latency(100)  # the requests of the next batch are under way when the connections break
        delivery = asyncio.create_task(deliver_all(outlet, sent[5000:]))
        await asyncio.to_thread(kafka.consumed.wait_for, 5001)
        kafka.down()
        kafka.latency(0)
        assert not delivery.done()
        kafka.up()
        await delivery
    assert assert_read_in_order(kafka, sent) <= BATCH_MAX


async def test_down_is_told_in_time_and_once_and_the_rest_is_waited_for(kafka: Kafka) -> None:
    sent = messages(1500)
    async with an_outlet(kafka.brokers, deadline_s=SHORT_S) as outlet:
        await deliver_all(outlet, sent[:500])
        kafka.down()
        with capture_logs() as logs:
            for _ in range(2):
                began_s = time.monotonic()
                assert await outlet.deliver(sent[500:]) == 0
                assert SHORT_S <= time.monotonic() - began_s < SHORT_S + SLACK_S
            kafka.up()
            await deliver_all(outlet, sent[500:])
        events = [line["event"] for line in logs if not line["event"].startswith("kafka_library")]
        assert events == ["kafka_behind", "kafka_caught_up"]
        assert sum(line["event"] == "kafka_library" for line in logs) <= 10
    assert assert_read_in_order(kafka, sent) == 0


async def test_a_broker_that_is_killed_and_starts_again(kafka: Kafka) -> None:
    sent = messages(6000, padding=100)
    async with an_outlet(kafka.brokers, deadline_s=SHORT_S) as outlet:
        await deliver_all(outlet, sent[:3000])
        kafka.latency(100)  # the kill is in the middle of the requests of a batch
        delivery = asyncio.create_task(deliver_all(outlet, sent[3000:]))
        await asyncio.to_thread(kafka.consumed.wait_for, 3001)
        await asyncio.to_thread(kafka.kill)
        assert not delivery.done()
        await asyncio.to_thread(kafka.start)
        await delivery
    assert assert_read_in_order(kafka, sent) <= BATCH_MAX
    assert {read.life for read in kafka.consumed.messages} == {1, 2}


async def test_killed_while_nothing_is_under_way_nothing_comes_twice(kafka: Kafka) -> None:
    sent = messages(1000)
    async with an_outlet(kafka.brokers, deadline_s=SHORT_S) as outlet:
        await deliver_all(outlet, sent[:500])
        kafka.kill()
        assert await outlet.deliver(sent[500:]) == 0
        kafka.start()
        await deliver_all(outlet, sent[500:])
    assert assert_read_in_order(kafka, sent) == 0
    assert Counter(read.life for read in kafka.consumed.messages) == {1: 500, 2: 500}


async def test_a_frozen_broker_keeps_nobody_waiting_and_loses_nothing(kafka: Kafka) -> None:
    sent = messages(4000)
    async with an_outlet(kafka.brokers, deadline_s=SHORT_S) as outlet:
        await deliver_all(outlet, sent[:1000])
        kafka.freeze()
        for _ in range(2):
            began_s = time.monotonic()
            assert await outlet.deliver(sent[1000:2000]) == 0
            assert time.monotonic() - began_s < SHORT_S + SLACK_S
        kafka.thaw()
        await deliver_all(outlet, sent[1000:])
    assert assert_read_in_order(kafka, sent) == 0


async def test_a_producer_that_stalls_is_replaced_and_only_the_tail_comes_twice(kafka: Kafka) -> None:
    sent = messages(3000)
    async with an_outlet(kafka.brokers, deadline_s=3 * SHORT_S, stalled_s=SHORT_S) as outlet:
        await deliver_all(outlet, sent[:1000])
        kafka.freeze()
        with capture_logs() as logs:
            assert await outlet.deliver(sent[1000:2000]) == 0
        assert {
            "event": "kafka_producer_replaced",
            "reason": "stalled",
            "messages": 1000,
            "log_level": "warning",
        } in logs
        kafka.thaw()
        await deliver_all(outlet, sent[1000:])
    assert 0 < assert_read_in_order(kafka, sent) <= BATCH_MAX
    times = Counter(read.value for read in kafka.consumed.messages)
    assert {value for value, count in times.items() if count > 1} <= {message.value for message in sent[1000:2000]}


async def test_other_messages_than_before_are_sent_and_order_is_kept(kafka: Kafka) -> None:
    sent = messages(30, organizations=2)
    async with an_outlet(kafka.brokers, deadline_s=SHORT_S) as outlet:
        await deliver_all(outlet, sent[:10])
        kafka.down()
        assert await outlet.deliver(sent[10:]) == 0
        kafka.up()
        await deliver_all(outlet, [sent[10], *sent[12:]])  # one was set aside
    assert assert_read_in_order(kafka, [*sent[:11], *sent[12:]]) == 0


async def test_too_large_for_librdkafka_is_refused_by_its_id(kafka: Kafka) -> None:
    sent = messages(40)
    sent[17] = a_message(17, padding=2_000_000)
    async with an_outlet(kafka.brokers) as outlet:
        with pytest.raises(Refused, match="id-17") as refused:
            await outlet.deliver(sent)
        assert (refused.value.message, refused.value.safe, refused.value.of_topic) == (sent[17], 17, False)
        assert refused.value.reason == "MSG_SIZE_TOO_LARGE"
        await deliver_all(outlet, sent[18:])
    assert assert_read_in_order(kafka, [*sent[:17], *sent[18:]]) == 0


async def test_too_large_for_the_broker_is_found_among_the_batch(kafka: Kafka) -> None:
    async with an_outlet(kafka.brokers, settings=STRICT) as outlet:
        assert await outlet.deliver(messages(1)) == 1
        kafka.refuse(MSG_SIZE_TOO_LARGE, times=3)  # of 64, of 8 and of one
        sent = messages(64, start=1, organizations=1)
        with pytest.raises(Refused, match="id-1/1 ") as refused:
            await outlet.deliver(sent)
        assert (refused.value.safe, refused.value.of_topic) == (0, False)
        await deliver_all(outlet, sent[1:])
    assert assert_read_in_order(kafka, [*messages(1), *sent[1:]]) == 0


async def test_what_is_refused_only_once_is_delivered_in_parts(kafka: Kafka) -> None:
    sent = messages(400, organizations=1)
    async with an_outlet(kafka.brokers, settings=STRICT) as outlet:
        kafka.refuse(MSG_SIZE_TOO_LARGE, times=2)
        assert await outlet.deliver(sent) == 400
    assert assert_read_in_order(kafka, sent) == 0


async def test_a_topic_without_authorization_is_refused_as_a_topic(kafka: Kafka) -> None:
    sent = [a_message(n, topic=EVENTS if n % 2 else RECORDS) for n in range(10)]
    async with an_outlet(kafka.brokers) as outlet:
        kafka.topic_error(EVENTS, TOPIC_AUTHORIZATION_FAILED)
        with pytest.raises(Refused) as refused:
            await outlet.deliver(sent)
        assert (refused.value.message, refused.value.safe, refused.value.of_topic) == (sent[1], 1, True)
        assert refused.value.reason == "TOPIC_AUTHORIZATION_FAILED"
        await deliver_all(outlet, sent[2::2])
        kafka.topic_error(EVENTS, 0)
        await deliver_all(outlet, sent[1::2])
    assert assert_read_in_order(kafka, sent) == 0


async def test_errors_that_pass_are_nobody_s_business(kafka: Kafka) -> None:
    not_enough_replicas, sent = 19, messages(1000)
    async with an_outlet(kafka.brokers, settings=STRICT) as outlet:
        kafka.refuse(not_enough_replicas, times=20)
        assert await outlet.deliver(sent) == 1000
    assert assert_read_in_order(kafka, sent) == 0


async def test_a_topic_that_is_not_there_is_made() -> None:
    with a_kafka() as kafka:
        sent = messages(100)
        async with an_outlet(kafka.brokers) as outlet:
            assert await outlet.deliver(sent) == 100
        assert assert_read_in_order(kafka, sent) == 0


async def test_no_broker_at_all_is_told_in_time_and_closing_waits_for_nobody() -> None:
    outlet = KafkaOutlet(f"127.0.0.1:{free_ports(1)[0]}", log=get_logger(), clock_s=time.monotonic, deadline_s=SHORT_S)
    assert await outlet.deliver(messages(10)) == 0
    delivery = asyncio.create_task(outlet.deliver(messages(10)))
    await asyncio.sleep(0)
    began_s = time.monotonic()
    await outlet.close()
    assert time.monotonic() - began_s < SHORT_S
    assert await delivery == 0
    assert await outlet.deliver(messages(10)) == 0


LEFT_ALONE: Final = """
import asyncio, sys, time
from gateway.telemetry import configure_logging, get_logger
from tests.harness.kafka_messages import messages
from usage.kafka import KafkaOutlet

async def main():
    outlet = KafkaOutlet(sys.argv[1], log=get_logger(), clock_s=time.monotonic, deadline_s=600)
    delivery = asyncio.ensure_future(outlet.deliver(messages(1000)))
    await asyncio.sleep(0.5)

configure_logging(program="test")
asyncio.run(main())
"""


def test_the_interpreter_ends_while_a_delivery_is_under_way() -> None:
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    run = subprocess.run([sys.executable, "-c", LEFT_ALONE, nobody], capture_output=True, check=False, timeout=20)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"acks": "1"}, "acks"),
        ({"enable.idempotence": False, "retries": 1}, "enable.idempotence, retries"),
        ({"message.timeout.ms": 5}, "message.timeout.ms"),
        ({"max.in.flight": 6}, "max.in.flight"),
        ({"no.such": 1}, "no.such"),
    ],
    ids=["acks", "idempotence", "timeout", "in flight", "unknown"],
)
async def test_settings_that_would_break_the_promise_are_no_settings(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        KafkaOutlet("127.0.0.1:9", log=get_logger(), clock_s=time.monotonic, settings=settings)
