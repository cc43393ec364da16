"""What the real Envoy writes of requests: no query, a beginning that nobody can forge, what is no request at all."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime

import pytest

from gateway.settings import JOURNAL
from tests.harness.access_log import access_log_of
from tests.harness.calls import CHAT, INFERENCE, chat, inference
from tests.harness.process import eventually
from tests.harness.raw import connected, exchange, read_response
from tests.harness.usage import problems_of
from tests.harness.usage_world import World, running_world
from usage.access_log import decode
from usage.finished import Finished
from usage.journal import BEGINS, decode_line
from usage.ledger import SPOOL_FILE
from usage.record import kind_of

pytestmark = pytest.mark.integration

SECRET = "sk-in-the-query"
FORGED = '"}{"attempts":1,"listener":"backends","request_id":"forged'
NO_REQUESTS = (
    b"GET /v1/audit/requests/a%00b HTTP/1.1\r\nhost: router\r\n\r\n",
    b"GET /v1/models#part HTTP/1.1\r\nhost: router\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"GET \x01 HTTP/1.1\r\nhost: router\r\n\r\n",
)
"""Envoy refuses them before it gives them an id."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as running:
        yield running


def journal_of(world: World) -> bytes:
    """What is in the journal, with what Envoy holds back."""
    world.stack.http.post(f"{world.stack.envoy_url}/reopen_logs").raise_for_status()
    return (world.stack.directory / JOURNAL).read_bytes()


def refuse(world: World) -> None:
    """Send what is no request."""
    for sent in NO_REQUESTS:
        assert exchange(world.stack.http_port, sent).status_code == 400


# --- Paths.


def test_query_of_a_path_is_nowhere(world: World) -> None:
    """Neither in what the ledger keeps, nor in what Envoy writes for operators."""
    client = world.client()
    answers = [
        client.get("/v1/models", params={"api_key": SECRET}),
        client.post(CHAT, params={"api_key": SECRET}, json=chat("solo")),
        client.post(INFERENCE, params={"api_key": SECRET}, json=inference("solo")),
        client.post(CHAT, params={"api_key": SECRET}, json=chat("solo"), headers={"x-mock-fault": "status=500"}),
        client.get("/nowhere", params={"api_key": SECRET}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 502, 404]
    world.records.complete(answers)
    assert SECRET.encode() not in journal_of(world)
    ids = [answer.headers["x-request-id"] for answer in answers]
    eventually(lambda: all(each in world.stack.envoy.log() for each in ids), "Envoy has told operators")
    assert SECRET not in world.stack.envoy.log()
    with closing(sqlite3.connect(f"file:{world.stack.directory / SPOOL_FILE}?mode=ro", uri=True)) as db:
        told = "".join(text for (text,) in db.execute("SELECT told FROM requests"))
    assert SECRET not in told
    for path in ("/v1/models", CHAT):
        assert f'"path":"{path}"' in told


def test_both_ways_tell_the_same_of_queries_and_of_what_is_no_request(world: World) -> None:
    """While the ledger is away: it reads the journal once it is back."""
    before = len(journal_of(world))
    with access_log_of(world.stack) as log:
        client = world.client()
        answers = [
            client.get("/v1/models", params={"api_key": SECRET}),
            client.post(CHAT, params={"a": "1?b"}, json=chat("solo")),
            client.get("/v1/models/a%3Fb?c=d"),
        ]
        refuse(world)
        ids = [answer.headers["x-request-id"] for answer in answers]
        by_grpc = {each: decode(log.of(each).message).finished[0] for each in ids}
        [no_request] = decode(log.of("").message).finished
    world.stack.usage.start()
    world.records.complete(ids)
    told = [decode_line(line) for line in journal_of(world)[before:].splitlines()]
    by_line = {ended.request_id: ended for ended in told if isinstance(ended, Finished)}
    assert {each: by_line[each] for each in ids} == by_grpc
    assert [by_grpc[each].path for each in ids] == ["/v1/models", CHAT, "/v1/models/a%3Fb"]
    assert kind_of(no_request) == "anonymous"
    assert no_request in told
    assert sum(ended.request_id == "" for ended in told) == len(NO_REQUESTS)


def test_what_is_no_request_is_counted_as_nobodys(world: World) -> None:
    response = world.client().get("/v1/models")
    refuse(world)
    size = len(journal_of(world))
    world.records.complete([response])
    eventually(lambda: world.records._read_up_to() >= size, "the ledger has read it")
    text = world.stack.http.get(f"{world.stack.usage_url}/metrics").text
    assert "router_usage_malformed_total 0.0" in text
    assert "access_log_malformed" not in world.stack.usage.log()


# --- Where a line begins.


def test_nobody_can_make_a_line_seem_to_begin(world: World) -> None:
    client, before = world.client(), len(journal_of(world))
    answers = [
        client.post(INFERENCE, json=inference("solo", metadata={FORGED: FORGED})),
        client.post(CHAT, json=chat(FORGED)),
        client.post(CHAT, json=chat("solo"), headers={"x-mock-fault": "status=500"}),
        client.get(f"/v1/models/{FORGED}"),
    ]
    sent = f"GET /v1/{FORGED} HTTP/1.1\r\nhost: router\r\nx-request-id: {FORGED}\r\n\r\n"
    answers.append(exchange(world.stack.http_port, sent.encode()))
    world.records.complete(answers)
    lines = journal_of(world)[before:].splitlines()
    assert any(b"attempts" in line[len(BEGINS) :] for line in lines)
    for line in lines:
        assert line.startswith(BEGINS)
        assert line.count(BEGINS) == 1
        names = list(json.loads(line))
        assert names == sorted(names)


def test_line_after_a_torn_one_is_not_lost(world: World) -> None:
    """A full disk takes a part of a line, and later whole ones again. The ledger has only the journal here."""
    client = world.client()
    first = client.post(CHAT, json=chat("solo"))
    world.records.complete([first])
    [line] = [each for each in journal_of(world).splitlines() if first.headers["x-request-id"].encode() in each]
    world.stack.usage.stop()
    for cut in (20, len(line) // 2, len(line) - 1):
        with (world.stack.directory / JOURNAL).open("ab") as journal:
            journal.write(line[:cut])
        answer = client.post(CHAT, json=chat("solo"))
        eventually(lambda answer=answer: answer.headers["x-request-id"].encode() in journal_of(world), "it is told of")
        assert line[:cut] + BEGINS in journal_of(world)
        last = answer
    world.stack.usage.start()
    record = world.records.of(last)
    assert (record["status"], record["usage_source"]) == (200, "provider")


# --- The moment of the admission.


def moment_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_record_has_the_moment_of_the_admission(world: World) -> None:
    """Whose body takes long to arrive is admitted after it began."""
    body = json.dumps(chat("solo")).encode()
    key = world.client().headers["authorization"]
    head = f"POST {CHAT} HTTP/1.1\r\nhost: router\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
    before_s = time.time()
    with connected(world.stack.http_port) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        time.sleep(1.5)
        connection.sendall(body)
        response = read_response(connection, method="POST", path=CHAT)
    assert response.status_code == 200
    record = world.records.of(response)
    assert problems_of(record) == []
    began_s, admitted_s = moment_s(record["timestamp"]), moment_s(record["admitted_at"])
    assert admitted_s - began_s >= 1.4
    assert before_s - 0.01 <= began_s <= admitted_s <= time.time()


def test_refused_request_has_no_moment_of_an_admission(world: World) -> None:
    answer = world.client("poor").post(CHAT, json=chat("dear"))
    assert answer.status_code == 402
    assert "admitted_at" not in world.records.of(answer)
