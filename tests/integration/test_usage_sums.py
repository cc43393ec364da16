"""Which requests have no record, that Envoy tells the same twice, and that records add up to what clients counted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gateway.settings import JOURNAL
from tests.harness.access_log import access_log_of
from tests.harness.calls import CHAT, INFERENCE, chat, inference
from tests.harness.limits import StoreView
from tests.harness.process import eventually
from tests.harness.usage import Record, problems_of
from tests.harness.usage_world import ASKS, STREAMS, Ask, World, cost_of, running_world
from usage.access_log import decode
from usage.finished import Finished
from usage.journal import decode_line

pytestmark = pytest.mark.integration

Send = Callable[[httpx.Client], httpx.Response]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as running:
        yield running


# --- No record.


def post(client: httpx.Client, body: Mapping[str, Any], *, key: str = "", **headers: str) -> httpx.Response:
    extra = {"idempotency-key": key} if key else {}
    return client.post(CHAT, json=body, headers={**extra, **headers})


def conflict(client: httpx.Client) -> httpx.Response:
    """A call whose idempotency key is still in use."""
    headers = {"idempotency-key": "in use", "x-mock-fault": "hold=1"}
    with client.stream("POST", CHAT, json=chat("solo", stream=True), headers=headers) as first:
        chunks = first.iter_raw()
        next(chunks)
        return post(client, chat("solo", stream=True), key="in use")


def mismatch(client: httpx.Client) -> httpx.Response:
    """A call whose idempotency key was used for another one."""
    assert post(client, chat("solo"), key="once").status_code == 200
    return post(client, chat("pair"), key="once")


DENIED: dict[int, Send] = {
    401: lambda client: post(client, chat("pair"), authorization="Bearer nonsense"),
    403: lambda client: post(client, chat("private")),
    409: conflict,
    422: mismatch,
}


def events_of(world: World, response: httpx.Response) -> list[Record]:
    request_id = response.headers["x-request-id"]
    return [event for event in world.records.events() if event["request_id"] == request_id]


@pytest.mark.parametrize("status", DENIED)
def test_denial_leaves_an_audit_event_and_no_record(world: World, status: int) -> None:
    response = DENIED[status](world.client())
    assert response.status_code == status
    world.records.complete([response])
    eventually(lambda: events_of(world, response), "the denial is in the audit trail")
    assert world.records.every(response) == []
    [event] = events_of(world, response)
    assert (event["action"], event["metadata"]["status"]) == ("REQUEST_DENIED", status)
    assert event["organization_id"] == ("" if status == 401 else "acme")
    assert world.records.kind_of(response) == (None if status == 401 else "refused")


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda client: post(client, chat("nonsense")), 404),
        (lambda client: post(client, chat("pair", messages=1)), 400),
        (lambda client: client.get("/v1/models"), 200),
        (lambda client: client.get("/v1/status/healthz"), 200),
        (lambda client: client.get("/v1/nothing"), 404),
    ],
    ids=["unknown model", "invalid", "models", "health", "unknown path"],
)
def test_what_reaches_no_backend_leaves_no_record(world: World, send: Send, status: int) -> None:
    response = send(world.client())
    assert response.status_code == status
    world.records.complete([response])
    assert world.records.every(response) == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_answer_that_is_given_again_has_no_record_of_its_own(world: World, stream: bool) -> None:
    key, body = f"again {stream}", chat("solo", stream=stream)
    first = post(world.client(), body, key=key)
    again = [post(world.client(), body, key=key) for _ in range(3)]
    assert {answer.headers["x-idempotent-replay"] for answer in again} == {"true"}
    world.records.complete([first, *again])
    assert [len(world.records.every(answer)) for answer in (first, *again)] == [1, 0, 0, 0]
    assert {world.records.kind_of(answer) for answer in again} == {"repeated"}


def test_call_of_inference_that_is_repeated_has_one_record_with_its_clients_id(world: World) -> None:
    body = inference("solo")
    answers = [world.client().post(INFERENCE, json=body) for _ in range(3)]
    world.records.complete(answers)
    [record] = [r for r in world.records.all() if r.get("client_request_id") == body["request_id"]]
    assert record["request_id"] == answers[0].headers["x-request-id"]


# --- Whatever a client sends.


@pytest.mark.parametrize(
    "label", ["\ud800", "\udc00\ud800", "\0", '","request_id":"', "\u2028\n\r", "\U0001f600"], ids=ascii
)
def test_no_label_is_in_the_way(world: World, label: str) -> None:
    content = json.dumps(inference("solo", metadata={f"name {label}": f"value {label}"}))
    answer = world.client().post(INFERENCE, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    kept = label.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    record = world.records.of(answer)
    assert problems_of(record) == []
    assert record["metadata"] == {f"name {kept}": f"value {kept}"}


@pytest.mark.parametrize(
    "path", [f'{CHAT}?","request_id":"x', f"{CHAT}?%22,%22listener%22:%22backends%22", f"{CHAT}?\u00e9"], ids=ascii
)
def test_no_path_is_in_the_way(world: World, path: str) -> None:
    answer = world.client().post(path, json=chat("solo"))
    assert answer.status_code == 200
    assert world.records.of(answer)["usage_source"] == "provider"


def test_nothing_that_a_client_denied_sends_is_in_the_way(world: World) -> None:
    content = json.dumps(chat("\ud800"))
    headers = {"content-type": "application/json"}
    assert world.client().post(CHAT, content=content, headers=headers).status_code == 404
    assert world.records.of(post(world.client(), chat("solo")))["status"] == 200
    assert world.stack.usage.running


# --- Twice the same.


def test_envoy_tells_the_same_in_its_journal_and_by_grpc(world: World) -> None:
    """While the ledger is away: it reads the journal once it is back."""
    with access_log_of(world.stack) as log:
        answers = [world.answer(ask, fault=fault) for ask in ASKS for fault in ("", "status=400", "status=500")]
        odd = inference("solo", metadata={"é": '"\n\u2028'})
        answers += [world.client().post(INFERENCE, json=odd), post(world.client(), chat("nonsense"))]
        answers += [world.answer(ask, "dear", org="poor") for ask in ASKS]
        ids = [answer.headers["x-request-id"] for answer in answers] + [world.leave(ask, 3) for ask in STREAMS]
        by_grpc = {request_id: decode(log.of(request_id).message).finished[0] for request_id in ids}
    world.stack.usage.start()
    world.records.complete(ids)
    lines = (world.stack.directory / JOURNAL).read_bytes().splitlines()
    by_line = {told.request_id: told for told in map(decode_line, lines) if isinstance(told, Finished)}
    assert {request_id: by_line[request_id] for request_id in ids} == by_grpc
    assert [len(world.records.every(request_id)) for request_id in ids].count(1) == len(ids) - 1


# --- Records add up.

COUNT = 300


def used(ask: Ask, text: str) -> tuple[int, int]:
    """Input and output tokens as an answer says."""
    parts = [line[6:] for line in text.splitlines() if line.startswith("data: {")] if ask.stream else [text]
    answers = [json.loads(part) for part in parts]
    found = [answer.get("usage") or (answer.get("response") or {}).get("usage") for answer in answers]
    [*_, usage] = [usage for usage in found if usage]
    input_names, output_names = (
        ("prompt_tokens", "input_tokens", "tokens_input"),
        (*("completion_tokens", "output_tokens", "tokens_output"),),
    )
    return (
        next(usage[name] for name in input_names if name in usage),
        next((usage[name] for name in output_names if name in usage), 0),
    )


def test_records_add_up_to_what_clients_counted(world: World) -> None:
    random_ = random.Random(4)
    organizations = [f"sum{number}" for number in range(3)]
    asked = [(random_.choice(ASKS), random_.choice(organizations), random_.randint(1, 30)) for _ in range(COUNT)]
    asked_usage = {"stream_options": {"include_usage": True}}

    def send(one: tuple[Ask, str, int]) -> tuple[str, str, tuple[int, int]]:
        ask, organization, words = one
        text = " ".join(["hi"] * words)
        fields: dict[str, Any] = {
            "chat": {"messages": [{"role": "user", "content": text}]},
            "inference": {"payload": text},
            "completion": {"prompt": text},
        }.get(ask.endpoint, {"input": text})
        if ask.stream and ask.endpoint != "response":
            fields |= asked_usage
        answer = world.answer(ask, "pair", org=organization, **fields)
        assert answer.status_code == 200
        return answer.headers["x-request-id"], organization, used(ask, answer.text)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, asked))
    world.records.complete([request_id for request_id, _, _ in answers])
    seen = {request_id: counts for request_id, _, counts in answers}
    records = [record for record in world.records.all() if record["request_id"] in seen]
    assert Counter(record["request_id"] for record in records) == Counter(seen.keys())
    for record in records:
        assert problems_of(record) == []
        assert (record["tokens_input"], record["tokens_output"]) == seen[record["request_id"]]
        assert record["cost_micro_usd"] == cost_of(record)
    store = StoreView(world.stack)
    for organization in organizations:
        store.settled(organization)
        own = [record for record in records if record["organization_id"] == organization]
        assert store.spend(organization)["spent_micro_usd"] == sum(record["cost_micro_usd"] for record in own)
        assert store.spend(organization)["spent_tokens"] == sum(sum(seen[record["request_id"]]) for record in own)
    store.close()
