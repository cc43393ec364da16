"""Limits on the real Envoy and Valkey: exact under concurrency, truthful to clients, settled by what was used."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.harness.calls import CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE, call, chat, error_code
from tests.harness.limits import StoreView, at_once, limited_policy, of_organization
from tests.harness.process import eventually
from tests.harness.stack import Stack, running_stack

pytestmark = pytest.mark.integration

KEY = "dev-acme-alice"
RATE_HEADERS = {
    f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
}
ANSWER_TOKENS = 100


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(mocks=("a", "b"), valkey=True) as running:
        yield running


@pytest.fixture
def store(stack: Stack) -> Iterator[StoreView]:
    stack.reset()
    view = StoreView(stack)
    view.clear()
    yield view
    view.close()


def limit(stack: Stack, **limits: Any) -> None:
    stack.apply(limited_policy(stack.uris, max_output_tokens=ANSWER_TOKENS, **of_organization("acme", **limits)))


def reserved_micro_usd(store: StoreView) -> int:
    """What one chat request reserves, as the store has it."""
    return store.spend("acme")["reserved_micro_usd"]


def holding(stack: Stack, denied: int, *, total: int) -> Any:
    """Keep every admitted request running until so many were denied, then let all go."""
    for mock in stack.mocks.values():
        mock.fail("hold", events=0)

    def release(answered: int) -> None:
        if answered >= denied:
            for mock in stack.mocks.values():
                mock.heal()
                mock.release()

    return release


def cost_of_one(stack: Stack, store: StoreView) -> tuple[int, int]:
    """Tokens and micro-dollars that one chat request reserves."""
    limit(stack, max_parallel=1000)
    seen: dict[str, int] = {}

    def look(_: int) -> None:
        spend = store.spend("acme")
        if spend.get("reserved_micro_usd"):
            seen.update(spend)
            for mock in stack.mocks.values():
                mock.heal()
                mock.release()

    for mock in stack.mocks.values():
        mock.fail("hold", events=0)
    at_once(stack, 1, key=KEY, meanwhile=look)
    store.settled("acme")
    store.clear()
    return seen["reserved_tokens"], seen["reserved_micro_usd"]


# --- Exact under concurrency.


def test_of_500_at_once_exactly_as_many_as_the_budget_pays_for_succeed(stack: Stack, store: StoreView) -> None:
    _, micro_usd = cost_of_one(stack, store)
    cap = 37 * micro_usd + micro_usd - 1
    limit(stack, budgets=[{"period": "MONTHLY", "usd": cap / 1_000_000}])
    answers = at_once(stack, 500, key=KEY, connections=500, meanwhile=holding(stack, 463, total=500))
    assert Counter(answer.status_code for answer in answers) == {200: 37, 402: 463}
    store.settled("acme")
    spend = store.spend("acme")
    assert spend["reserved_micro_usd"] == 0
    used = [answer.json()["usage"] for answer in answers if answer.status_code == 200]
    cost = sum(-(-(u["prompt_tokens"] * 5000 + u["completion_tokens"] * 15000) // 1000) for u in used)
    assert spend["spent_micro_usd"] == cost <= cap
    assert spend["spent_tokens"] == sum(u["prompt_tokens"] + u["completion_tokens"] for u in used)


def test_of_500_at_once_exactly_as_many_as_the_quota_covers_succeed(stack: Stack, store: StoreView) -> None:
    tokens, _ = cost_of_one(stack, store)
    limit(stack, budgets=[{"period": "DAILY", "tokens": 37 * tokens + tokens - 1}])
    answers = at_once(stack, 500, key=KEY, connections=500, meanwhile=holding(stack, 463, total=500))
    assert Counter(answer.status_code for answer in answers) == {200: 37, 402: 463}
    assert {error_code(answer) for answer in answers if answer.status_code == 402} == {"INSUFFICIENT_QUOTA"}


def test_of_500_at_once_no_more_run_than_may_run_in_parallel(stack: Stack, store: StoreView) -> None:
    limit(stack, max_parallel=37)
    answers = at_once(stack, 500, key=KEY, connections=500, meanwhile=holding(stack, 463, total=500))
    assert Counter(answer.status_code for answer in answers) == {200: 37, 429: 463}
    store.settled("acme")
    with stack.client(KEY) as client:
        assert call(client, CHAT).status_code == 200


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_of_500_at_once_only_what_the_bucket_holds_is_admitted(stack: Stack, store: StoreView, unit: str) -> None:
    tokens, _ = cost_of_one(stack, store)
    if unit == "requests":
        limit(stack, requests_per_second=1, burst=37)
        refill_per_s = 1.0
    else:
        limit(stack, tokens_per_minute=37 * tokens)
        refill_per_s = 37 / 60
    began = time.monotonic()
    answers = at_once(stack, 500, key=KEY, connections=500, meanwhile=holding(stack, 400, total=500))
    refilled = (time.monotonic() - began) * refill_per_s
    counted = Counter(answer.status_code for answer in answers)
    assert set(counted) == {200, 429}
    assert 37 <= counted[200] <= 37 + refilled


# --- What clients are told.


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS, INFERENCE])
def test_routed_answers_carry_the_rate_limit_headers(stack: Stack, store: StoreView, path: str) -> None:
    limit(stack, requests_per_second=10, burst=20, tokens_per_minute=60_000)
    with stack.client(KEY) as client:
        response = call(client, path)
    assert response.status_code == 200
    assert set(response.headers) >= RATE_HEADERS
    assert response.headers["x-ratelimit-limit-requests"] == "20"
    assert response.headers["x-ratelimit-remaining-requests"] == "19"
    assert response.headers["x-ratelimit-limit-tokens"] == "60000"
    assert 59_000 < int(response.headers["x-ratelimit-remaining-tokens"]) < 60_000


def test_streams_carry_them_too_and_are_settled_by_the_usage_that_clients_do_not_see(
    stack: Stack, store: StoreView
) -> None:
    limit(stack, requests_per_second=10, tokens_per_minute=60_000)
    with stack.client(KEY) as client, client.stream("POST", CHAT, json=chat(stream=True)) as response:
        text = response.read().decode()
    assert set(response.headers) >= RATE_HEADERS
    assert '"prompt_tokens"' not in text
    store.settled("acme")
    assert 0 < store.spend("acme")["spent_tokens"] < ANSWER_TOKENS


def test_nothing_is_said_of_limits_that_are_not_there(stack: Stack, store: StoreView) -> None:
    limit(stack, max_parallel=100)
    with stack.client(KEY) as client:
        response = call(client, CHAT)
    assert not RATE_HEADERS & set(response.headers)


def test_429_tells_when_to_come_back_and_is_right(stack: Stack, store: StoreView) -> None:
    limit(stack, requests_per_second=2, burst=1)
    with stack.client(KEY) as client:
        assert call(client, INFERENCE).status_code == 200
        denied = call(client, INFERENCE)
        assert denied.status_code == 429
        wait_ms = int(denied.headers["retry-after-ms"])
        assert 0 < wait_ms <= 500
        assert denied.headers["retry-after"] == "1"
        body = denied.json()
        assert (body["code"], body["retry_after_seconds"]) == ("RATE_LIMIT_EXCEEDED", 1)
        assert body["limit_context"]["limit"] == 1
        assert body["limit_context"]["window"] == "burst"
        time.sleep(wait_ms / 1000)
        assert call(client, INFERENCE).status_code == 200


def test_402_says_what_is_left_and_not_to_retry(stack: Stack, store: StoreView) -> None:
    limit(stack, budgets=[{"period": "DAILY", "usd": 0.0001}])
    with stack.client(KEY) as client:
        denied = call(client, INFERENCE)
    assert denied.status_code == 402
    assert denied.headers["x-should-retry"] == "false"
    body = denied.json()
    assert body["code"] == "BUDGET_EXCEEDED"
    context = body["limit_context"]
    assert (context["limit"], context["remaining"], context["period"]) == (0.0001, 0.0001, "DAILY")
    assert context["reset_at"].endswith("T00:00:00Z")


def test_openai_client_gets_through_a_429_by_its_own_retry(stack: Stack, store: StoreView) -> None:
    limit(stack, requests_per_second=2, burst=1)
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=KEY, max_retries=2) as client:
        for _ in range(3):
            assert client.chat.completions.create(**chat()).choices
    assert stack.contacted() == 3


def test_openai_client_does_not_retry_a_402(stack: Stack, store: StoreView) -> None:
    limit(stack, budgets=[{"period": "MONTHLY", "tokens": 1}])
    sent: list[httpx.Request] = []
    with (
        httpx.Client(event_hooks={"request": [sent.append]}, trust_env=False) as http,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key=KEY, http_client=http) as client,
        pytest.raises(openai.APIStatusError) as refused,
    ):
        client.chat.completions.create(**chat())
    assert refused.value.status_code == 402
    assert refused.value.code == "insufficient_quota"
    assert len(sent) == 1
    assert stack.contacted() == 0


# --- Whose limits, and which.


def test_one_key_cannot_use_up_what_is_there_for_the_others(stack: Stack, store: StoreView) -> None:
    section = {"default_key": {"requests_per_second": 1, "burst": 3}}
    stack.apply(limited_policy(stack.uris, **section))
    with stack.client("dev-acme-greedy") as greedy, stack.client("dev-acme-modest") as modest:
        statuses = Counter(call(greedy, CHAT).status_code for _ in range(10))
        assert statuses[429] >= 6
        assert call(modest, CHAT).status_code == 200


def test_an_edit_of_limits_is_in_force_at_once(stack: Stack, store: StoreView) -> None:
    limit(stack, requests_per_second=1, burst=1)
    with stack.client(KEY) as client:
        assert [call(client, CHAT).status_code for _ in range(2)] == [200, 429]
        limit(stack, requests_per_second=100, burst=100)
        assert [call(client, CHAT).status_code for _ in range(5)] == [200] * 5


def test_slot_is_free_for_the_next_request_as_soon_as_the_answer_is_there(stack: Stack, store: StoreView) -> None:
    limit(stack, max_parallel=1)
    with stack.client(KEY) as client:
        assert [call(client, CHAT).status_code for _ in range(30)] == [200] * 30


def test_output_is_cut_to_what_the_budget_still_pays_for(stack: Stack, store: StoreView) -> None:
    limit(stack, budgets=[{"period": "MONTHLY", "tokens": 60}], clamp_output=True)
    body = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens" : 90, "model":"gpt-4o", "x": 0.70}'
    with stack.client(KEY) as client:
        response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    [received] = [request for mock in stack.mocks.values() for request in mock.requests()]
    granted = received.json()["max_tokens"]
    assert 1 <= granted < 60
    assert received.body == body.replace(b"90", str(granted).encode())


def test_a_failed_request_costs_nothing(stack: Stack, store: StoreView) -> None:
    limit(stack, budgets=[{"period": "MONTHLY", "usd": 1}])
    for mock in stack.mocks.values():
        mock.fail("status", status=500)
    with stack.client(KEY) as client:
        assert call(client, CHAT).status_code == 502
    store.settled("acme")
    assert store.spend("acme") == {"reserved_tokens": 0, "reserved_micro_usd": 0} | store.spend("acme")
    assert store.spent_micro_usd("acme") == 0


# --- Audit.


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"requests_per_second": 1, "burst": 1}, "RATE_LIMIT_EXCEEDED"),
        ({"budgets": [{"period": "DAILY", "tokens": 1}]}, "QUOTA_EXCEEDED"),
    ],
    ids=["rate", "quota"],
)
def test_denials_are_audited_with_who_what_and_figures(
    stack: Stack, store: StoreView, limits: dict[str, Any], code: str
) -> None:
    limit(stack, **limits)
    with stack.client(KEY) as client:
        denied = [response for response in (call(client, INFERENCE) for _ in range(2)) if response.status_code != 200][
            -1
        ]
    eventually(store.audit_events, "the denial is in the stream")
    event = store.audit_events()[-1]
    assert (event["action"], event["organization_id"], event["actor"]) == ("REQUEST_DENIED", "acme", KEY)
    assert event["request_id"] == denied.headers["x-request-id"]
    assert '"limit"' in event["metadata"]
    assert denied.json()["code"] == code


def test_an_unknown_key_is_audited_without_the_key(stack: Stack, store: StoreView) -> None:
    with stack.client("rk-secret-of-nobody") as client:
        assert call(client, CHAT).status_code == 401
    eventually(store.audit_events, "the denial is in the stream")
    [event] = store.audit_events()
    assert event["organization_id"] == ""
    assert "rk-secret" not in str(event)
