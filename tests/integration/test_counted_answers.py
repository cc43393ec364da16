"""What the access log is told of answers: their tokens, whoever counted them, on the real Envoy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from extproc.tokens import vocabulary
from gateway import names
from limits import figures
from limits.model import LimitKind
from tests.harness.access_log import AccessLog, access_log_of
from tests.harness.calls import CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE, call, chat, inference
from tests.harness.stack import Stack, model_of, policy_of, running_stack
from usage.access_log import decode
from usage.settle import used

pytestmark = pytest.mark.integration

PRICE = {
    "input_usd_per_1k": 0.005,
    "output_usd_per_1k": 0.015,
    "cached_input_usd_per_1k": 0.0025,
    "reasoning_usd_per_1k": 0.06,
}
PATIENT = {"LIMIT_STORE_DEADLINE_S": "5"}
RESPONSES = "/v1/responses"


def a_policy(stack: Stack) -> dict[str, Any]:
    """``gpt-4o`` at ``a``; ``quiet`` at a backend that reports no usage; ``mixed`` at ``a``, but it may be that one."""
    models = [
        model_of({"a": 1}),
        model_of({"silent": 1}, model="quiet"),
        model_of({"a": 1, "silent": 0}, model="mixed"),
    ]
    return policy_of(
        {"a": stack.uris["a"], "silent": stack.uris["b"]},
        models=models,
        backend={"price": PRICE},
        backend_of={"silent": {"reports_usage": False}},
        limits={"default": {"requests_per_second": 1000, "budgets": [{"period": "MONTHLY", "usd": 1000}]}},
    )


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(valkey=True, environ=PATIENT) as running:
        running.apply(a_policy(running))
        yield running


@pytest.fixture(scope="module")
def log(stack: Stack) -> Iterator[AccessLog]:
    with access_log_of(stack) as taken:
        yield taken


@pytest.fixture
def client(stack: Stack, log: AccessLog) -> Iterator[httpx.Client]:
    stack.reset()
    with stack.client("dev-acme-alice") as connected:
        yield connected


def tokens(text: str) -> int:
    return vocabulary("gpt-4o").count(text)


def counted(log: AccessLog, response: httpx.Response | str) -> tuple[int, int] | None:
    """Input and output as ext_proc counted them; None where it did not."""
    said = log.of(response).counted
    return (int(said[names.METADATA_TOKENS_INPUT]), int(said[names.METADATA_TOKENS_OUTPUT])) if said else None


def admitted_input(log: AccessLog, response: httpx.Response) -> int:
    return int(log.of(response).limits[names.METADATA_TOKENS_INPUT])


def texts_of_events(stream: str) -> list[str]:
    """What the events of a chat stream add."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


def answer_with(stack: Stack, backend: str, body: Any, content_type: str = "application/json") -> None:
    stack.mocks[backend].fail("status", status=200, body=body, headers={"content-type": content_type})


# --- What is told of every request.


def test_forwarded_request_is_told_with_policy_endpoint_and_figures(
    stack: Stack, log: AccessLog, client: httpx.Client
) -> None:
    told = log.of(call(client, CHAT))
    assert told.router[names.METADATA_ENDPOINT] == "chat"
    assert told.router[names.METADATA_POLICY] == stack.xds_status()["policy"]
    assert names.METADATA_REASON not in told.router
    consulted = figures.read(told.limits[names.METADATA_FIGURES])
    assert {figure.kind for figure in consulted} == {LimitKind.REQUESTS, LimitKind.MONTHLY_MICRO_USD}
    assert told.counted == {}


def test_inference_is_told_with_what_its_client_calls_it(log: AccessLog, client: httpx.Client) -> None:
    body = inference(metadata={"team": "a;é"})
    told = log.of(client.post(INFERENCE, json=body))
    assert told.limits[names.METADATA_CLIENT_REQUEST_ID] == body["request_id"]
    assert json.loads(told.limits[names.METADATA_LABELS]) == {"team": "a;é"}
    assert told.router[names.METADATA_ENDPOINT] == "inference"
    again = client.post(INFERENCE, json=body)
    assert again.headers["x-idempotent-replay"] == "true"
    assert log.of(again).router[names.METADATA_REASON] == names.REASON_REPEATED
    assert log.of(again).limits[names.METADATA_CLIENT_REQUEST_ID] == body["request_id"]


@pytest.mark.parametrize(
    ("path", "changes", "reason"),
    [
        (CHAT, {"model": "nope"}, "MODEL_NOT_FOUND"),
        (CHAT, {"messages": 1}, "VALIDATION_ERROR"),
        (INFERENCE, {"payload": None}, "MISSING_FIELD"),
    ],
)
def test_refusal_is_told_with_its_reason(
    log: AccessLog, client: httpx.Client, path: str, changes: Mapping[str, Any], reason: str
) -> None:
    told = log.of(client.post(path, json={**(inference() if path == INFERENCE else chat()), **changes}))
    assert told.router[names.METADATA_REASON] == reason
    assert told.router[names.METADATA_CLOSED] is True
    assert told.router[names.METADATA_ENDPOINT] == ("inference" if path == INFERENCE else "chat")


def test_list_of_models_is_told(log: AccessLog, client: httpx.Client) -> None:
    assert log.of(client.get("/v1/models")).router[names.METADATA_REASON] == names.REASON_LISTED


# --- Answers of /v1/inference.

REASONING = {
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "prompt_tokens_details": {"cached_tokens": 40},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }
}


def test_inference_costs_its_details_what_the_policy_says(stack: Stack, log: AccessLog, client: httpx.Client) -> None:
    answer_with(stack, "a", REASONING)
    response = call(client, INFERENCE)
    usage = response.json()["usage"]
    assert (usage["tokens_input"], usage["tokens_output"]) == (100, 50)
    assert usage["cost_usd"] == (60 * 5 + 40 * 2.5 + 30 * 15 + 20 * 60) / 1_000_000
    told = log.of(response)
    assert told.counted == {}
    assert told.usage == {
        names.METADATA_TOKENS_INPUT: 100,
        names.METADATA_TOKENS_OUTPUT: 50,
        names.METADATA_TOKENS_INPUT_CACHED: 40,
        names.METADATA_TOKENS_OUTPUT_REASONING: 20,
    }


@pytest.mark.parametrize(
    "body",
    [{"text": "four words of text"}, {"choices": [{"text": "four words of text"}]}],
    ids=["text", "completion"],
)
def test_inference_without_usage_is_counted(
    stack: Stack, log: AccessLog, client: httpx.Client, body: Mapping[str, Any]
) -> None:
    answer_with(stack, "a", body)
    response = call(client, INFERENCE)
    usage = response.json()["usage"]
    assert usage["tokens_output"] == tokens("four words of text")
    assert usage["tokens_input"] == admitted_input(log, response) > 0
    assert usage["cost_usd"] == (usage["tokens_input"] * 5 + usage["tokens_output"] * 15) / 1_000_000
    assert counted(log, response) == (usage["tokens_input"], usage["tokens_output"])
    assert log.of(response).usage == {}


ODD_USAGES: dict[str, dict[str, Any]] = {
    "tokens_used": {"text": "hi", "tokens_used": 7},
    "both": {"text": "hi", "tokens_used": 7, "usage": {"prompt_tokens": 3, "completion_tokens": 5}},
    "responses": {"usage": {"input_tokens": 3, "output_tokens": 5}},
    "both kinds": {"usage": {"input_tokens": 3, "output_tokens": 5, "prompt_tokens": 4, "completion_tokens": 6}},
    "texts": {"usage": {"prompt_tokens": " 3", "completion_tokens": "5"}},
    "fractions": {"usage": {"prompt_tokens": 3.7, "completion_tokens": 5.2}},
    "negative": {"usage": {"prompt_tokens": -3, "completion_tokens": 5}},
    "no input": {"usage": {"completion_tokens": 5}},
    "no input, but details": {
        "usage": {
            "completion_tokens": 50,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 20},
        }
    },
    "more cached than input": {
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 50}}
    },
    "more reasoning than output": {
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 50}}
    },
    "no output": {"usage": {"prompt_tokens": 5}},
    "booleans": {"usage": {"prompt_tokens": True, "completion_tokens": 5}},
    "too large": {"usage": {"prompt_tokens": 10**10, "completion_tokens": 5}},
    "objects": {"usage": {"prompt_tokens": {}, "completion_tokens": [5]}},
    "null": {"usage": None},
    "list": {"usage": [1]},
    "words": {"usage": {"prompt_tokens": "3_0", "completion_tokens": "five"}},
}


@pytest.mark.parametrize("body", ODD_USAGES.values(), ids=ODD_USAGES)
def test_what_a_client_is_told_is_what_the_log_has(
    stack: Stack, log: AccessLog, client: httpx.Client, body: Mapping[str, Any]
) -> None:
    """Envoy reads the usage and so does ext_proc: the ledger charges by the one, the client sees the other."""
    answer_with(stack, "a", body)
    response = call(client, INFERENCE)
    usage, told = response.json()["usage"], log.of(response)
    reported = {key: int(value) for key, value in told.usage.items() if 0 <= value <= 10**9}
    if reported:
        charged = (reported.get(names.METADATA_TOKENS_INPUT, 0), reported.get(names.METADATA_TOKENS_OUTPUT, 0))
        if not charged[0]:
            charged = (admitted_input(log, response), charged[1])
            assert counted(log, response) == charged
        else:
            assert told.counted == {}
    else:
        charged = counted(log, response) or (-1, -1)
    assert (usage["tokens_input"], usage["tokens_output"]) == charged
    [finished] = decode(told.message).finished
    use = used(finished)
    assert (use.tokens.tokens_input, use.tokens.tokens_output) == charged
    assert use.micro_usd / 1_000_000 == usage["cost_usd"]


# --- Backends that report no usage.

TALK = {
    "choices": [
        {
            "index": 0,
            "message": {
                "content": "The answer.",
                "reasoning_content": "Let me think.",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
        }
    ]
}


def test_json_answer_of_a_silent_backend_is_counted(stack: Stack, log: AccessLog, client: httpx.Client) -> None:
    answer_with(stack, "b", TALK)
    response = call(client, CHAT, "quiet")
    assert response.json() == TALK
    output = sum(map(tokens, ("The answer.", "Let me think.", "f", '{"a": 1}')))
    assert counted(log, response) == (admitted_input(log, response), output)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_endpoint_of_a_silent_backend_is_counted(
    log: AccessLog, client: httpx.Client, path: str, stream: bool
) -> None:
    body = {"input": "hi", "model": "quiet"} if path == RESPONSES else None
    fields = {"stream": stream, "mock_events": 30}
    response = client.post(path, json=body | fields) if body else call(client, path, "quiet", **fields)
    assert response.status_code == 200
    found = counted(log, response)
    assert found is not None
    words = " ".join(["b heard 1 tokens: hi"] * 6)
    assert found == (admitted_input(log, response), tokens(words))


def test_embeddings_of_a_silent_backend_have_no_output(log: AccessLog, client: httpx.Client) -> None:
    response = call(client, EMBEDDINGS, "quiet")
    assert counted(log, response) == (admitted_input(log, response), 0)


def test_failed_answer_of_a_silent_backend_is_not_counted(stack: Stack, log: AccessLog, client: httpx.Client) -> None:
    stack.mocks["b"].fail("status", status=400)
    response = call(client, CHAT, "quiet")
    assert response.status_code == 400
    assert counted(log, response) is None


def test_backend_that_reports_is_not_counted_beside_one_that_does_not(log: AccessLog, client: httpx.Client) -> None:
    whole = call(client, CHAT, "mixed")
    assert whole.headers["x-routing-backend"] == "a"
    assert counted(log, whole) is None
    asked = call(client, CHAT, "mixed", stream=True, stream_options={"include_usage": True})
    assert counted(log, asked) is None
    assert log.of(asked).usage[names.METADATA_TOKENS_OUTPUT] > 0


def test_stream_that_may_not_be_asked_for_usage_is_counted(log: AccessLog, client: httpx.Client) -> None:
    response = call(client, CHAT, "mixed", stream=True)
    assert response.headers["x-routing-backend"] == "a"
    assert counted(log, response) == (
        admitted_input(log, response),
        tokens("".join(texts_of_events(response.text))),
    )


def test_failover_to_a_silent_backend_is_counted(stack: Stack, log: AccessLog, client: httpx.Client) -> None:
    stack.mocks["a"].fail("status", status=500)
    response = call(client, CHAT, "mixed")
    assert (response.status_code, response.headers["x-routing-decision"]) == (200, "FAILOVER")
    text = response.json()["choices"][0]["message"]["content"]
    assert counted(log, response) == (admitted_input(log, response), tokens(text))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_counted_answer_is_kept_for_its_idempotency_key(log: AccessLog, client: httpx.Client, stream: bool) -> None:
    key = {"idempotency-key": f"counted-{stream}"}
    body = chat("quiet", stream=stream)
    first = client.post(CHAT, json=body, headers=key)
    again = client.post(CHAT, json=body, headers=key)
    assert again.headers["x-idempotent-replay"] == "true"
    assert again.content == first.content
    found = counted(log, first)
    assert found is not None
    assert found[1] > 0
    assert counted(log, again) is None


def test_events_of_a_counted_stream_pass_as_they_come(stack: Stack, log: AccessLog, client: httpx.Client) -> None:
    stack.mocks["b"].fail("hold", events=3)
    with client.stream("POST", CHAT, json=chat("quiet", stream=True, mock_events=9)) as response:
        chunks, got = response.iter_text(), ""
        while got.count("data: ") < 3:
            got += next(chunks)
        assert got.count("data: ") == 3
        stack.mocks["b"].heal()
        stack.mocks["b"].release()
        got += "".join(chunks)
    assert got.endswith("data: [DONE]\n\n")
    assert counted(log, response) == (admitted_input(log, response), tokens("".join(texts_of_events(got))))


def leave_after(client: httpx.Client, body: Mapping[str, Any], events: int) -> tuple[httpx.Response, str]:
    """Read so many events of a stream, then go."""
    with client.stream("POST", CHAT, json=body) as response:
        chunks, got = response.iter_text(), ""
        while got.count("\n\n") < events:
            got += next(chunks)
    return response, got


@pytest.mark.parametrize("events", [1, 2, 7, 120])
def test_stream_that_the_client_leaves_is_counted_as_far_as_it_went(
    stack: Stack, log: AccessLog, client: httpx.Client, events: int
) -> None:
    stack.mocks["b"].fail("hold", events=events)
    response, got = leave_after(client, chat("quiet", stream=True, mock_events=events + 5), events)
    sent = tokens("".join(texts_of_events(got)))
    found = counted(log, response)
    assert found is not None
    assert found[0] == admitted_input(log, response)
    assert sent * 0.5 <= found[1] <= sent
    assert log.of(response).usage[names.METADATA_EVENTS] == events


@pytest.mark.parametrize("events", [1, 2, 7, 40])
def test_events_are_counted_until_the_client_leaves(
    stack: Stack, log: AccessLog, client: httpx.Client, events: int
) -> None:
    stack.mocks["a"].fail("hold", events=events)
    response, got = leave_after(client, chat(stream=True, mock_events=events + 5), events)
    assert len(texts_of_events(got)) == events
    told = log.of(response)
    assert told.usage == {names.METADATA_EVENTS: events}
    assert told.flags != ()


def test_events_and_usage_of_a_whole_stream_are_told_together(log: AccessLog, client: httpx.Client) -> None:
    response = call(client, CHAT, stream=True, mock_events=12)
    usage = log.of(response).usage
    assert usage[names.METADATA_EVENTS] == usage[names.METADATA_TOKENS_OUTPUT] == 12
    assert '"usage":{' not in response.text


def test_nothing_is_told_of_answers_where_every_backend_reports(stack: Stack, log: AccessLog) -> None:
    stack.reset()
    document = a_policy(stack)
    for backend in document["backends"]:
        backend["reports_usage"] = True
    stack.apply(document)
    try:
        with stack.client("dev-acme-alice") as client:
            before = stack.stats("ext_proc.stream_msgs_sent")
            response = call(client, CHAT, "quiet")
            assert response.status_code == 200
            assert counted(log, response) is None
            sent = stack.stats("ext_proc.stream_msgs_sent")
            assert sum(sent.values()) - sum(before.values()) == 2
    finally:
        stack.apply(a_policy(stack))
