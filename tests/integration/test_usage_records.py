"""A usage record for every request that was admitted or limited, however it ended, on the real Envoy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.harness.calls import CHAT, EMBEDDINGS, INFERENCE
from tests.harness.process import eventually
from tests.harness.usage import Record, problems_of
from tests.harness.usage_world import ASKS, RESPONSES, STREAMS, Ask, World, cost_of, name_of, running_world

pytestmark = pytest.mark.integration

EVENTS = 5
"""With text, before a stream is left or cut."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as running:
        yield running


def check(record: Record, ask: Ask, **expected: Any) -> None:
    """Hold a record against the schema, this test's own arithmetic, and what is expected of it."""
    assert problems_of(record) == []
    assert record["cost_micro_usd"] == cost_of(record)
    assert (record["endpoint"], record["stream"]) == (ask.endpoint, ask.stream)
    assert ("client_request_id" in record, "metadata" in record) == (ask.path == INFERENCE,) * 2
    assert {name: record.get(name) for name in expected} == expected


every_ask = pytest.mark.parametrize("ask", ASKS, ids=name_of)
every_stream = pytest.mark.parametrize("ask", STREAMS, ids=name_of)
PRIMARY = {"decision_reason": "PRIMARY", "retry_count": 0, "limit_state": "WITHIN_LIMIT"}
FAILOVER = {"decision_reason": "FAILOVER", "retry_count": 1, "limit_state": "WITHIN_LIMIT"}
NOTHING = {"usage_source": None, "tokens_input": 0, "tokens_output": 0, "cost_micro_usd": 0}

# --- Every endpoint, streamed or not, however it ends.


@every_ask
def test_success(world: World, ask: Ask) -> None:
    record = world.send(ask)
    check(record, ask, **PRIMARY, backend_id="a", status=200, usage_source="provider")
    assert (record["tokens_input"], record["tokens_output"]) == (1, ask.tokens_output)
    assert record["budget_snapshot"]["period"] == "MONTHLY"
    assert record["policy_version"] == world.stack.xds_status()["policy"]


@every_ask
def test_backend_that_refuses(world: World, ask: Ask) -> None:
    check(world.send(ask, fault="status=400"), ask, **PRIMARY, **NOTHING, backend_id="a", status=400)


@every_ask
def test_failover(world: World, ask: Ask) -> None:
    world.stack.mocks["a"].fail("status", status=500)
    try:
        record = world.send(ask)
    finally:
        world.stack.mocks["a"].heal()
    check(record, ask, **FAILOVER, backend_id="b", status=200, usage_source="provider")
    assert (record["tokens_input"], record["tokens_output"]) == (1, ask.tokens_output)


@every_ask
def test_every_backend_fails(world: World, ask: Ask) -> None:
    check(world.send(ask, fault="status=500"), ask, **FAILOVER, **NOTHING, backend_id="b", status=502)


@every_stream
def test_client_leaves_in_the_middle(world: World, ask: Ask) -> None:
    record = world.records.of(world.leave(ask, EVENTS))
    check(record, ask, **PRIMARY, backend_id="a", status=200, usage_source="partial", tokens_output=EVENTS)


@every_stream
@pytest.mark.parametrize("kind", ["stream_cut", "stream_clean_cut"])
def test_backend_is_cut_in_the_middle(world: World, ask: Ask, kind: str) -> None:
    # Were everything to come at once with the cut, Envoy would fail over instead.
    fault = f"{kind}={ask.events_before_text + EVENTS}, event_delay_s=0.05"
    record = world.send(ask, fault=fault, mock_events=20)
    check(record, ask, **PRIMARY, backend_id="a", status=200, usage_source="partial", tokens_output=EVENTS)


@pytest.mark.parametrize("ask", [ask for ask in ASKS if not ask.stream], ids=name_of)
def test_answer_is_cut_in_the_middle(world: World, ask: Ask) -> None:
    """It has been held until its usage was known, so its client has seen nothing of it."""
    record = world.send(ask, "solo", fault="stream_cut=1")
    check(record, ask, **PRIMARY, **NOTHING, backend_id="a", status=502)


@every_ask
def test_backend_that_says_it_reports_nothing_is_counted(world: World, ask: Ask) -> None:
    """The mock reports all the same where it is not a stream."""
    record = world.send(ask, "quiet")
    source = "tokenizer" if ask.stream and ask.path != RESPONSES else "provider"
    check(record, ask, **PRIMARY, backend_id="silent", status=200, usage_source=source)
    assert record["tokens_input"] > 0
    assert bool(record["tokens_output"]) == (ask.path != EMBEDDINGS)


def without_usage(ask: Ask) -> tuple[str, str]:
    """Content type and text of an answer of four words, or of a stream of so many events."""
    if not ask.stream:
        text = {"message": {"content": "four words of text"}} if ask.path == CHAT else {"text": "four words of text"}
        return "application/json", json.dumps({"choices": [text]})
    delta = {"type": "response.output_text.delta", "delta": " a"}
    event = delta if ask.path == RESPONSES else {"choices": [{"text": " a"}]}
    return "text/event-stream", f"data: {json.dumps(event)}\n\n" * EVENTS + "data: [DONE]\n\n"


@every_ask
@pytest.mark.parametrize("model", ["solo", "quiet"], ids=["unsaid", "said"])
def test_backend_that_reports_nothing(world: World, ask: Ask, model: str) -> None:
    """Where it was said, and for /v1/inference, the text is counted; else its events, or its size."""
    content_type, text = without_usage(ask)
    world.stack.mocks["a"].fail("status", status=200, body=text, headers={"content-type": content_type})
    try:
        record = world.send(ask, model)
    finally:
        world.stack.mocks["a"].heal()
    assert record["tokens_input"] > 0
    expected: dict[str, Any] = {"usage_source": "estimated", "tokens_output": -(-len(text) // 4)}
    if model == "quiet" or ask.path == INFERENCE:
        expected = {"usage_source": "tokenizer", "tokens_output": EVENTS if ask.stream else 4}
    elif ask.stream:
        expected = {"usage_source": "partial", "tokens_output": EVENTS}
    if ask.path == EMBEDDINGS:
        expected["tokens_output"] = 0
    check(record, ask, **PRIMARY, **expected, status=200)


@every_ask
def test_rate_limited(world: World, ask: Ask) -> None:
    answers: list[httpx.Response] = []

    def is_refused() -> bool:
        answers.append(world.answer(ask, org="hasty"))
        return answers[-1].status_code == 429

    eventually(is_refused, "the organisation has used its burst")
    limited = {"decision_reason": "RATE_LIMIT", "limit_state": "RATE_LIMITED", "retry_count": 0}
    check(world.records.of(answers[-1]), ask, **limited, **NOTHING, backend_id="", status=429)


@every_ask
def test_without_budget(world: World, ask: Ask) -> None:
    record = world.send(ask, "dear", org="poor")
    limited = {"decision_reason": "RATE_LIMIT", "limit_state": "BUDGET_EXCEEDED", "retry_count": 0}
    check(record, ask, **limited, **NOTHING, backend_id="", status=402)
    assert record["budget_snapshot"] == {"period": "DAILY", "currency_remaining": 0.0005}


# --- A stream is left after every event.


@every_stream
@pytest.mark.parametrize("events", range(6))
def test_stream_is_left_after_every_event(world: World, ask: Ask, events: int) -> None:
    record = world.records.of(world.leave(ask, events))
    check(record, ask, **PRIMARY, backend_id="a", usage_source="partial")
    assert abs(record["tokens_output"] - events) <= 1
