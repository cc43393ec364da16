"""Which backends a request may reach, and in what shares: weights, kill switches, degradation, organisations, lists."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.harness.calls import CHAT, EMBEDDINGS, INFERENCE, burst, call, error_code
from tests.harness.stack import Stack, model_of, policy_of, running_stack

pytestmark = pytest.mark.integration

ALICE, BOB = "dev-acme-alice", "dev-acme-bob"
GLOBEX = "dev-globex-carol"
both_formats = pytest.mark.parametrize("path", [CHAT, INFERENCE])


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(mocks=("a", "b", "c")) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(stack: Stack) -> None:
    stack.reset()


def apply(stack: Stack, *models: dict[str, Any], **sections: Any) -> None:
    """Put a policy of these models in force."""
    stack.apply(policy_of(stack.uris, models=models, **sections))


def killed(*backends: str) -> list[dict[str, Any]]:
    return [{"backend_id": backend, "enabled": True, "reason": "test"} for backend in backends]


def send(stack: Stack, key: str = ALICE, *, path: str = CHAT, model: str = "gpt-4o") -> httpx.Response:
    with stack.client(key) as client:
        return call(client, path, model)


def outcome(stack: Stack, key: str = ALICE) -> tuple[str, str]:
    """Backend and decision of one request that succeeds."""
    response = send(stack, key)
    assert response.status_code == 200, response.text
    return response.headers["x-routing-backend"], response.headers["x-routing-decision"]


def send_many(stack: Stack, count: int, key: str = ALICE) -> Counter[tuple[int, str, str]]:
    """Send so many requests, several at a time, and count them by status, backend and decision."""
    answers = burst(stack.url, EMBEDDINGS, {"model": "gpt-4o", "input": "hi"}, key=key, count=count)
    return Counter(
        (status, headers.get("x-routing-backend", ""), headers.get("x-routing-decision", ""))
        for status, headers in answers
    )


def test_weights_divide_the_traffic(stack: Stack) -> None:
    apply(stack, model_of({"a": 70, "b": 30}))
    count, share = 2_000, 0.7
    seen = send_many(stack, count)
    assert set(seen) == {(200, "a", "PRIMARY"), (200, "b", "PRIMARY")}
    to_a = seen[200, "a", "PRIMARY"]
    assert stack.mocks["a"].count() == to_a
    assert stack.mocks["b"].count() == count - to_a
    # Five standard deviations of a binomial: wrong once in two million runs.
    assert abs(to_a - count * share) < 5 * math.sqrt(count * share * (1 - share))


def test_weight_0_is_a_fallback_and_nothing_else(stack: Stack) -> None:
    apply(stack, model_of({"a": 1, "b": 0, "c": 0}))
    assert send_many(stack, 100) == {(200, "a", "PRIMARY"): 100}
    assert stack.mocks["b"].count() + stack.mocks["c"].count() == 0
    stack.mocks["a"].fail("status", status=500)
    stack.mocks["b"].fail("status", status=500)
    assert outcome(stack) == ("c", "FAILOVER")


def test_every_backend_is_tried_once_before_a_request_fails(stack: Stack) -> None:
    apply(stack, model_of({"a": 5, "b": 3, "c": 1}))
    for mock in stack.mocks.values():
        mock.fail("status", status=500)
    response = send(stack)
    assert response.status_code == 502
    assert [mock.count() for mock in stack.mocks.values()] == [1, 1, 1]


def test_a_killed_backend_gets_no_request(stack: Stack) -> None:
    apply(stack, model_of({"a": 50, "b": 50}), kill_switches=killed("b"))
    assert send_many(stack, 100) == {(200, "a", "OVERRIDE"): 100}
    assert stack.mocks["b"].count() == 0


def test_a_killed_backend_is_no_fallback_either(stack: Stack) -> None:
    apply(stack, model_of({"a": 50, "b": 50}), kill_switches=killed("b"))
    stack.mocks["a"].fail("status", status=500)
    response = send(stack)
    assert response.status_code == 502
    assert error_code(response) == "BACKEND_ERROR"
    assert stack.mocks["b"].count() == 0


def test_a_kill_switch_that_is_off_changes_nothing(stack: Stack) -> None:
    apply(stack, model_of({"b": 1}), kill_switches=[{"backend_id": "b", "enabled": False, "reason": "later"}])
    assert outcome(stack) == ("b", "PRIMARY")


@both_formats
def test_with_every_backend_killed_nothing_is_contacted(stack: Stack, path: str) -> None:
    apply(stack, model_of({"a": 50, "b": 50}), kill_switches=killed("a", "b"))
    response = send(stack, path=path)
    assert response.status_code == 503
    assert error_code(response) == "NO_BACKEND_AVAILABLE"
    assert stack.contacted() == 0


def test_a_degraded_backend_is_avoided_with_a_warning(stack: Stack) -> None:
    apply(stack, model_of({"a": 10, "b": 90}, degraded=["b"]))
    assert send_many(stack, 300) == {(200, "a", "OVERRIDE"): 300}
    assert stack.mocks["b"].count() == 0
    assert send(stack).headers["warning"] == '299 api-router "degraded backend avoided: b"'


def test_a_degraded_backend_is_the_last_resort(stack: Stack) -> None:
    apply(stack, model_of({"a": 1, "b": 90, "c": 1}, degraded=["b"]))
    stack.mocks["a"].fail("status", status=500)
    stack.mocks["c"].fail("status", status=500)
    response = send(stack)
    assert response.status_code == 200
    assert response.headers["x-routing-backend"] == "b"
    assert response.headers["x-routing-decision"] == "FAILOVER"


def test_a_degraded_backend_that_answered_was_not_avoided(stack: Stack) -> None:
    apply(stack, model_of({"a": 1, "b": 1}, degraded=["b"]))
    stack.mocks["a"].fail("status", status=500)
    response = send(stack)
    assert response.headers["x-routing-backend"] == "b"
    assert "warning" not in response.headers


def test_degraded_backends_serve_where_there_is_no_other(stack: Stack) -> None:
    apply(stack, model_of({"b": 1}, degraded=["b"]))
    response = send(stack)
    assert response.headers["x-routing-backend"] == "b"
    assert response.headers["x-routing-decision"] == "OVERRIDE"
    assert "warning" not in response.headers


@pytest.mark.parametrize("model", ["gpt-4o", "*"], ids=["of-this-model", "of-every-model"])
def test_an_override_concerns_one_organization(stack: Stack, model: str) -> None:
    override = {"organization_id": "acme", "model": model, "backends": [{"backend_id": "b", "weight": 1}]}
    apply(stack, model_of({"a": 1}), organization_overrides=[override])
    assert outcome(stack, ALICE) == ("b", "OVERRIDE")
    assert outcome(stack, GLOBEX) == ("a", "PRIMARY")


def test_an_override_of_one_model_leaves_the_others(stack: Stack) -> None:
    override = {"organization_id": "acme", "model": "gpt-4o", "backends": [{"backend_id": "b", "weight": 1}]}
    apply(stack, model_of({"a": 1}), model_of({"a": 1}, model="other"), organization_overrides=[override])
    assert send(stack, model="other").headers["x-routing-backend"] == "a"
    assert send(stack, model="gpt-4o").headers["x-routing-backend"] == "b"


def test_an_organizations_own_entry_wins(stack: Stack) -> None:
    apply(stack, model_of({"a": 1}), model_of({"b": 1}, organization_id="acme"))
    assert outcome(stack, ALICE) == ("b", "PRIMARY")
    assert outcome(stack, GLOBEX) == ("a", "PRIMARY")


@both_formats
def test_a_model_of_another_organization_does_not_exist(stack: Stack, path: str) -> None:
    apply(stack, model_of({"a": 1}), model_of({"b": 1}, model="private", organization_id="acme"))
    assert send(stack, ALICE, model="private").headers["x-routing-backend"] == "b"
    stack.reset()
    response = send(stack, GLOBEX, model="private", path=path)
    assert response.status_code == 404
    assert error_code(response) == "MODEL_NOT_FOUND"
    assert stack.contacted() == 0


LISTS: dict[str, dict[str, dict[str, list[str]]]] = {
    "denied": {"a": {"deny_list": [ALICE]}},
    "allowed-to-another": {"a": {"allow_list": [BOB]}},
    "denied-wins": {"a": {"allow_list": [ALICE, BOB], "deny_list": [ALICE]}},
}


@pytest.mark.parametrize("lists", LISTS)
def test_a_list_takes_a_backend_from_one_key(stack: Stack, lists: str) -> None:
    apply(stack, model_of({"a": 99, "b": 0, "c": 1}, lists=LISTS[lists]))
    assert {decision for _, _, decision in send_many(stack, 30, ALICE)} == {"OVERRIDE"}
    assert stack.mocks["a"].count() == 0
    stack.reset()
    stack.mocks["c"].fail("status", status=500)
    assert outcome(stack, ALICE) == ("b", "FAILOVER")
    assert stack.mocks["a"].count() == 0
    assert {backend for _, backend, _ in send_many(stack, 30, BOB)} >= {"a"}


@pytest.mark.parametrize("lists", LISTS)
def test_a_backend_that_lists_take_is_no_fallback(stack: Stack, lists: str) -> None:
    apply(stack, model_of({"a": 50, "b": 50}, lists=LISTS[lists]))
    stack.mocks["b"].fail("status", status=500)
    response = send(stack, ALICE)
    assert response.status_code == 502
    assert stack.mocks["a"].count() == 0


def test_a_key_that_no_list_names_keeps_the_primary_decision(stack: Stack) -> None:
    apply(stack, model_of({"a": 1, "b": 0}, lists={"a": {"deny_list": [ALICE]}}))
    assert outcome(stack, BOB) == ("a", "PRIMARY")
    assert outcome(stack, ALICE) == ("b", "OVERRIDE")


@both_formats
def test_a_key_without_any_backend_left_is_refused(stack: Stack, path: str) -> None:
    lists = {"a": {"deny_list": [ALICE]}, "b": {"allow_list": [BOB]}}
    apply(stack, model_of({"a": 50, "b": 50}, lists=lists))
    response = send(stack, ALICE, path=path)
    assert response.status_code == 403
    assert error_code(response) == "FORBIDDEN"
    assert stack.contacted() == 0
    assert send(stack, BOB, path=path).status_code == 200


@both_formats
def test_a_key_whose_last_backend_is_killed_gets_503(stack: Stack, path: str) -> None:
    apply(stack, model_of({"a": 50, "b": 50}, lists={"a": {"deny_list": [ALICE]}}), kill_switches=killed("b"))
    response = send(stack, ALICE, path=path)
    assert response.status_code == 503
    assert error_code(response) == "NO_BACKEND_AVAILABLE"
    assert stack.contacted() == 0
    assert outcome(stack, BOB) == ("a", "OVERRIDE")


def test_lists_of_an_override_count(stack: Stack) -> None:
    override = {
        "organization_id": "acme",
        "model": "gpt-4o",
        "backends": [{"backend_id": "b", "weight": 50, "deny_list": [ALICE]}, {"backend_id": "c", "weight": 50}],
    }
    apply(stack, model_of({"a": 1}), organization_overrides=[override])
    assert {backend for _, backend, _ in send_many(stack, 30, ALICE)} == {"c"}
    assert {backend for _, backend, _ in send_many(stack, 30, BOB)} == {"b", "c"}
    assert outcome(stack, GLOBEX) == ("a", "PRIMARY")


@pytest.mark.parametrize("header", ["x-router-variant", "x-router-org", "x-router-backend"])
def test_a_client_cannot_choose_by_header(stack: Stack, header: str) -> None:
    override = {"organization_id": "globex", "model": "gpt-4o", "backends": [{"backend_id": "c", "weight": 1}]}
    apply(stack, model_of({"a": 1, "b": 0}, lists={"a": {"deny_list": [BOB]}}), organization_overrides=[override])
    spoofed = {"x-router-variant": "b", "x-router-org": "globex", "x-router-backend": "b"}[header]
    with stack.client(ALICE) as client:
        client.headers[header] = spoofed
        response = call(client, CHAT)
    assert response.headers["x-routing-backend"] == "a"
    assert response.headers["x-routing-decision"] == "PRIMARY"
