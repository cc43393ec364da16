"""The ledger behind the real Envoy: every admitted request is settled, whatever dies, and nothing waits for it."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from typing import Any

import httpx
import pytest

from tests.harness.calls import CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE, call, chat
from tests.harness.limits import StoreView
from tests.harness.process import eventually
from tests.harness.stack import Stack, model_of, policy_of, running_stack

pytestmark = pytest.mark.integration

PRICE = {"input_usd_per_1k": 0.005, "output_usd_per_1k": 0.015, "cached_input_usd_per_1k": 0.0025}
BUDGET = {"period": "MONTHLY", "usd": 1000}
PATIENT = {"LIMIT_STORE_DEADLINE_S": "5"}
"""A machine that is busy with other tests is no store that is down."""
_NUMBERS = count()

STREAM_WITH_USAGE = chat(stream=True, stream_options={"include_usage": True})

Usage = Mapping[str, Any]


def a_policy(stack: Stack, **limits: Any) -> dict[str, Any]:
    """Two priced backends behind ``gpt-4o``, ``a`` alone behind ``quiet``, where it reports no usage on its own."""
    models = [model_of(dict.fromkeys(stack.uris, 50)), model_of({"silent": 1}, model="quiet")]
    uris = {**stack.uris, "silent": stack.uris["a"]}
    return policy_of(
        uris,
        models=[{**model, "max_output_tokens": 1000} for model in models],
        backend={"price": PRICE},
        backend_of={"silent": {"reports_usage": False}},
        limits={"default": {"budgets": [BUDGET], **limits}},
    )


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(valkey=True, environ=PATIENT) as running:
        running.apply(a_policy(running))
        yield running


@pytest.fixture
def frail() -> Iterator[Stack]:
    """A stack to kill parts of; what nobody settles is overdue at once."""
    hasty = {"LIMIT_OVERDUE_S": "1", "USAGE_SWEEP_INTERVAL_S": "0.1"}
    with running_stack(valkey=True, environ=PATIENT | hasty) as running:
        running.apply(a_policy(running))
        yield running


class Organization:
    """An organisation of one test, which nobody else uses."""

    def __init__(self, stack: Stack) -> None:
        self.id = f"org{next(_NUMBERS)}"
        self._stack = stack
        self._store = StoreView(stack)

    def client(self) -> httpx.Client:
        """A client with a key of the organisation."""
        return self._stack.client(f"dev-{self.id}-alice")

    @property
    def spend(self) -> dict[str, int]:
        """What the store has of it this month."""
        return self._store.spend(self.id)

    @property
    def open(self) -> int:
        """Its ledger entries that are open."""
        return self._store.open(self.id)

    def has_spent(self, used: list[Usage]) -> None:
        """Wait until the store has exactly what a client counted, and nothing reserved."""
        expected = {
            "spent_tokens": sum(u["prompt_tokens"] + u["completion_tokens"] for u in used),
            "spent_micro_usd": sum(map(cost_micro_usd, used)),
        }
        eventually(lambda: self.open == 0 and figures(self.spend) == expected, f"{expected} of {self.spend}")


def figures(spend: Mapping[str, int]) -> dict[str, int]:
    """What is not zero, credits aside."""
    names = ("reserved_tokens", "reserved_micro_usd", "spent_tokens", "spent_micro_usd")
    return {name: spend[name] for name in names if spend.get(name)}


def cost_micro_usd(used: Usage) -> int:
    """The price of what a client saw used, rounded up once."""
    cached = (used.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    fresh = used["prompt_tokens"] - cached
    return -(-(fresh * 5000 + cached * 2500 + used["completion_tokens"] * 15_000) // 1000)


def unsettled(stack: Stack) -> int:
    """Requests that are written down and that the store has not taken."""
    with closing(sqlite3.connect(f"file:{stack.directory / 'usage.db'}?mode=ro", uri=True)) as db:
        [(count,)] = db.execute("SELECT count(*) FROM requests WHERE settled = 0")
    return int(count)


def metric(stack: Stack, name: str) -> float:
    """A metric of the ledger, all labels together."""
    text = stack.http.get(f"{stack.usage_url}/metrics").text
    return sum(map(float, re.findall(rf"^router_usage_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


def status_of_ledger(stack: Stack) -> str:
    response = stack.readyz()
    return str(response.json()["components"]["usage"]["status"]) if response is not None else ""


def usage_of_events(text: str) -> Usage:
    """The usage that a stream's last event but one tells."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    [used] = [event["usage"] for event in events if event.get("usage")]
    return dict(used)


@pytest.fixture
def acme(stack: Stack) -> Organization:
    stack.reset()
    return Organization(stack)


# --- What is charged.


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_answers_are_charged_what_the_client_was_told(acme: Organization, path: str) -> None:
    with acme.client() as client:
        answers = [call(client, path, mock_cached_tokens=number % 2) for number in range(10)]
    assert {answer.status_code for answer in answers} == {200}
    acme.has_spent([{"completion_tokens": 0, **answer.json()["usage"]} for answer in answers])


def test_answers_of_the_routers_own_schema_are_charged_what_they_say(acme: Organization) -> None:
    with acme.client() as client:
        used = [call(client, INFERENCE).json()["usage"] for _ in range(5)]
    told = [{"prompt_tokens": u["tokens_input"], "completion_tokens": u["tokens_output"]} for u in used]
    acme.has_spent(told)
    assert acme.spend["spent_micro_usd"] == round(sum(u["cost_usd"] for u in used) * 1_000_000)


@pytest.mark.parametrize("asked", [True, False], ids=["the client asked for usage", "the router asked for it"])
def test_streams_are_charged_what_was_streamed(acme: Organization, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    with acme.client() as client:
        texts = [call(client, CHAT, stream=True, mock_events=7, **options).text for _ in range(5)]
        plain = call(client, CHAT, mock_events=7).json()["usage"]
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    used = [usage_of_events(text) for text in texts] if asked else [plain] * len(texts)
    acme.has_spent([*used, plain])


def test_failover_is_charged_once_and_failure_not_at_all(stack: Stack, acme: Organization) -> None:
    stack.mocks["a"].fail("status", status=500)
    with acme.client() as client:
        answers = [call(client, CHAT) for _ in range(6)]
        assert {(answer.status_code, answer.headers["x-routing-backend"]) for answer in answers} == {(200, "b")}
        stack.mocks["b"].fail("status", status=500)
        assert call(client, CHAT).status_code == 502
        stack.mocks["a"].fail("status", status=400)
        assert call(client, "/v1/chat/completions", "quiet").status_code == 400
    acme.has_spent([answer.json()["usage"] for answer in answers])


def test_silent_backend_is_charged_an_estimate_below_what_was_reserved(stack: Stack, acme: Organization) -> None:
    stack.mocks["a"].fail("hold", events=1)
    with acme.client() as client, client.stream("POST", CHAT, json=chat("quiet", stream=True)) as response:
        assert response.status_code == 200
        chunks = response.iter_text()
        next(chunks)
        eventually(lambda: acme.spend.get("reserved_micro_usd"), "the request's worst case is reserved")
        reserved = acme.spend
        stack.mocks["a"].heal()
        stack.mocks["a"].release()
        assert "[DONE]" in "".join(chunks)
    eventually(lambda: acme.open == 0, "the request is settled")
    assert 0 < acme.spend["spent_micro_usd"] <= reserved["reserved_micro_usd"]
    assert 0 < acme.spend["spent_tokens"] <= reserved["reserved_tokens"]
    assert acme.spend["reserved_micro_usd"] == acme.spend["reserved_tokens"] == 0


def test_client_that_leaves_a_stream_pays_for_what_was_sent(stack: Stack, acme: Organization) -> None:
    stack.mocks["a"].fail("hold", events=2)
    stack.mocks["b"].fail("hold", events=2)
    with acme.client() as client, client.stream("POST", CHAT, json=chat(stream=True)) as response:
        assert response.status_code == 200
        chunks = response.iter_raw()  # an iterator that nobody holds closes the connection
        next(chunks)
        eventually(lambda: acme.spend.get("reserved_micro_usd"), "the request's worst case is reserved")
        reserved = acme.spend
    eventually(lambda: acme.open == 0, "the request is settled without a sweep")
    assert 0 < acme.spend["spent_micro_usd"] < reserved["reserved_micro_usd"]
    assert acme.spend["reserved_micro_usd"] == 0


# --- What the ledger is told.


def test_only_requests_of_a_known_organisation_are_written_down_and_refusals_are_not_settled(
    stack: Stack, acme: Organization
) -> None:
    with acme.client() as client, stack.client(None) as nobody:
        eventually(lambda: metric(stack, "unsettled_requests") == 0, "the ledger is idle")
        before, settled = metric(stack, "requests_total"), metric(stack, "settlements_total")
        assert call(nobody, CHAT).status_code == 401
        assert nobody.get("/v1/status/healthz").status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert call(client, CHAT, "nonsense").status_code == 404
        assert call(client, CHAT).status_code == 200
    eventually(lambda: metric(stack, "settlements_total") > settled, "the last request is settled")
    assert metric(stack, "requests_total") == before + 3
    assert metric(stack, "settlements_total") == settled + 1
    assert metric(stack, "malformed_total") == 0


def test_place_among_parallel_requests_is_free_again_when_the_answer_is_there(stack: Stack, acme: Organization) -> None:
    stack.apply(a_policy(stack, max_parallel=1))
    try:
        with acme.client() as client:
            assert {call(client, CHAT).status_code for _ in range(30)} == {200}
    finally:
        stack.apply(a_policy(stack))


# --- What dies.


def test_killed_ledger_costs_no_request_and_reads_what_it_missed_in_the_journal(frail: Stack) -> None:
    acme = Organization(frail)
    with acme.client() as client:
        used = [call(client, CHAT).json()["usage"] for _ in range(3)]
        acme.has_spent(used)
        frail.usage.stop(signal.SIGKILL)
        used += [call(client, CHAT).json()["usage"] for _ in range(10)]
        eventually(lambda: status_of_ledger(frail) == "down", "readiness shows the ledger down")
        response = frail.readyz()
        assert response is not None
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert acme.open == 10
        frail.usage.start()
        acme.has_spent(used)
        assert metric(frail, "swept_total") == 0
        eventually(lambda: status_of_ledger(frail) == "up", "the ledger is back")
        acme.has_spent([*used, call(client, CHAT).json()["usage"]])


def test_ledger_that_hangs_holds_up_nothing(frail: Stack) -> None:
    acme = Organization(frail)
    with acme.client() as client:
        os.kill(frail.usage.pid, signal.SIGSTOP)
        try:
            answers = [call(client, CHAT, stream_padding="x" * 2000) for _ in range(100)]
            eventually(lambda: status_of_ledger(frail) == "down", "readiness shows the ledger down")
        finally:
            os.kill(frail.usage.pid, signal.SIGCONT)
    assert {answer.status_code for answer in answers} == {200}
    acme.has_spent([answer.json()["usage"] for answer in answers])


class Held:
    """A stream that does not go on; ``used`` is what it has told in the end."""

    used: Usage


@contextmanager
def a_held_stream(stack: Stack, organization: Organization) -> Iterator[Held]:
    """A stream that has begun, and is read to its end after the block."""
    held = Held()
    for mock in stack.mocks.values():
        mock.fail("hold", events=1)
    with organization.client() as client, client.stream("POST", CHAT, json=STREAM_WITH_USAGE) as response:
        assert response.status_code == 200
        chunks = response.iter_text()
        first = next(chunks)
        yield held
        for mock in stack.mocks.values():
            mock.heal()
            mock.release()
        held.used = usage_of_events(first + "".join(chunks))


def test_request_that_outlives_its_deadline_is_charged_what_it_used_in_the_end(frail: Stack) -> None:
    acme = Organization(frail)
    with a_held_stream(frail, acme) as held:
        eventually(lambda: acme.open == 0 and acme.spend["spent_micro_usd"], "the sweep has charged what was reserved")
    acme.has_spent([held.used])


def test_settlement_that_the_store_has_lost_is_made_again(frail: Stack) -> None:
    """A replica that was behind takes over, and what was acknowledged is open again."""
    acme, view = Organization(frail), StoreView(frail)
    with a_held_stream(frail, acme) as held:
        before = view.save(acme.id)
    acme.has_spent([held.used])
    swept = metric(frail, "swept_total")
    view.lose_since(acme.id, before)
    eventually(lambda: metric(frail, "swept_total") > swept, "the ledger finds it open again")
    acme.has_spent([held.used])
    view.close()


def test_what_ends_while_the_store_is_down_is_charged_when_it_is_back(frail: Stack) -> None:
    acme = Organization(frail)
    assert frail.valkey is not None
    with a_held_stream(frail, acme) as held:
        frail.valkey.stop(signal.SIGKILL)  # with everything it knew
    eventually(lambda: unsettled(frail) == 1, "the ledger holds the settlement")
    assert metric(frail, "limit_store_up") == 0
    frail.valkey.start()
    eventually(lambda: unsettled(frail) == 0, "the store has taken it")
    acme.has_spent([held.used])
    assert metric(frail, "dropped_total") == 0


def test_ledger_told_to_stop_settles_what_it_has_and_ends_well(frail: Stack) -> None:
    acme = Organization(frail)
    with acme.client() as client:
        used = [call(client, CHAT).json()["usage"] for _ in range(20)]
    assert frail.usage.stop() == 0
    assert '"stopping"' in frail.usage.log()
    assert "stopped_before_settled" not in frail.usage.log()
    assert not (frail.directory / "usage.sock").exists()
    acme.has_spent(used)
