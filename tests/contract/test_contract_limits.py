"""What clients are told of limits: in headers while there is something left, in refusals when there is not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from gateway import names
from gateway.errors import Reason
from tests.contract.conftest import World
from tests.contract.organizations import LIMITS, key_of
from tests.contract.produce import BOTH, CHAT, INFERENCE, SERVED, Produce, called, post
from tests.contract.produce_limits import RATES, own_budget
from tests.contract.produce_limits import of as refused

pytestmark = pytest.mark.integration

OF_REQUESTS = {name for name in names.RATE_LIMIT_HEADERS if name.endswith("requests")}
BUDGETS: dict[str, tuple[Produce, dict[str, Any]]] = {
    "dollars of an organisation": (
        refused("broke"),
        {"subject": "organization", "unit": "usd", "limit": 0.0001, "period": "DAILY"},
    ),
    "tokens of an organisation": (
        refused("rationed"),
        {"subject": "organization", "unit": "tokens", "limit": 1, "period": "MONTHLY"},
    ),
    "tokens of a key": (own_budget, {"subject": "api_key", "unit": "tokens", "limit": 1, "period": "DAILY"}),
}
WINDOWS = {Reason.REQUEST_RATE: "burst", Reason.TOKEN_RATE: "1m", Reason.PARALLEL_REQUESTS: "parallel"}


def told(response: httpx.Response) -> set[str]:
    """Which of the rate limit headers are there."""
    return set(names.RATE_LIMIT_HEADERS).intersection(response.headers)


def moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def rates() -> Iterator[Any]:
    for reason, [(paths, produce)] in RATES.items():
        for path in paths:
            yield pytest.param(reason, path, produce, id=f"{reason.value}-{path}")


@pytest.fixture
def counted(world: World) -> Iterator[httpx.Client]:
    """A client whose organisation has both rates."""
    with world.client(key_of("counted")) as client:
        yield client


@pytest.mark.parametrize("path", SERVED)
def test_answer_tells_what_is_left(world: World, counted: httpx.Client, path: str) -> None:
    response = post(counted, path)
    assert response.status_code == 200
    world.check(response)
    limits = LIMITS["counted"]
    for unit, limit in (("requests", limits["burst"]), ("tokens", limits["tokens_per_minute"])):
        assert response.headers[f"x-ratelimit-limit-{unit}"] == str(limit)
        assert 0 < int(response.headers[f"x-ratelimit-remaining-{unit}"]) < limit
        assert response.headers[f"x-ratelimit-reset-{unit}"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_stream_tells_what_is_left(world: World, counted: httpx.Client, path: str) -> None:
    response = post(counted, path, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    world.check(response)
    assert told(response) == set(names.RATE_LIMIT_HEADERS)


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(("status", "answered"), [(500, 502), (400, 400)])
def test_error_of_a_backend_tells_what_is_left(
    world: World, counted: httpx.Client, path: str, status: int, answered: int
) -> None:
    world.a.fail("status", status=status)
    response = post(counted, path, "solo")
    assert response.status_code == answered
    world.check(response)
    assert told(response) == set(names.RATE_LIMIT_HEADERS)


@pytest.mark.parametrize("path", BOTH)
def test_only_limits_that_there_are_are_told(world: World, path: str) -> None:
    with world.client(key_of("half_counted")) as client:
        half = post(client, path)
    assert told(half) == OF_REQUESTS
    world.check(half)
    with world.client() as client:
        assert told(post(client, path)) == set()


@pytest.mark.parametrize("path", BOTH)
def test_refusal_before_any_limit_is_asked_tells_of_none(world: World, path: str) -> None:
    with world.client(key_of("counted")) as client:
        response = post(client, path, "nope")
    assert response.status_code == 404
    assert told(response) == set()


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(("produce", "figures"), BUDGETS.values(), ids=BUDGETS)
def test_spent_budget_says_whose_it_is_and_until_when(
    world: World, path: str, produce: Produce, figures: dict[str, Any]
) -> None:
    before = datetime.now(UTC)
    response = produce(world, path)
    assert response.status_code == 402
    world.check(response)
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers
    daily = figures["period"] == "DAILY"
    if path == CHAT:
        assert response.json()["error"]["type"] == "insufficient_quota"
        assert figures["period"].lower() in response.json()["error"]["message"]
        return
    context = response.json()["limit_context"]
    assert {name: context[name] for name in figures} == figures
    assert context["current_usage"] + context["remaining"] == pytest.approx(figures["limit"])
    ends = moment(context["reset_at"])
    assert ends > before
    assert (ends.hour, ends.minute, ends.second) == (0, 0, 0)
    assert ends - before < timedelta(days=1, minutes=1) if daily else ends.day == 1


@pytest.mark.parametrize("path", BOTH)
def test_budget_service_that_says_no_has_no_figures_of_ours(world: World, path: str) -> None:
    response = refused("barred")(world, path)
    assert response.status_code == 402
    world.check(response)
    assert "limit_context" not in response.json()


@pytest.mark.parametrize(("reason", "path", "produce"), list(rates()))
def test_rate_says_when_to_come_back(world: World, reason: Reason, path: str, produce: Produce) -> None:
    response = produce(world, path)
    assert response.status_code == 429
    world.check(response)
    wait_s, wait_ms = int(response.headers["retry-after"]), int(response.headers["retry-after-ms"])
    assert wait_s - 1 < wait_ms / 1000 <= wait_s
    if path == INFERENCE:
        assert response.json()["retry_after_seconds"] == wait_s
        assert response.json()["limit_context"]["window"] == WINDOWS[reason]
    else:
        assert response.json()["error"]["type"] == ("tokens" if reason is Reason.TOKEN_RATE else "requests")


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(("organization", "unit"), [("hurried", "requests"), ("wordy", "tokens")])
def test_rate_that_is_used_up_shows_in_the_headers_too(world: World, path: str, organization: str, unit: str) -> None:
    response = refused(organization)(world, path)
    assert response.status_code == 429
    assert response.headers[f"x-ratelimit-limit-{unit}"] == "1"
    assert response.headers[f"x-ratelimit-remaining-{unit}"] == "0"


def test_limits_hold_for_one_organisation_alone(world: World) -> None:
    assert refused("rationed")(world, CHAT).status_code == 402
    assert called()(world, CHAT).status_code == 200


def test_models_are_listed_for_one_that_has_nothing_left(world: World) -> None:
    assert refused("rationed")(world, CHAT).status_code == 402
    with world.client(key_of("rationed")) as client:
        response = client.get("/v1/models")
    assert response.status_code == 200
    world.check(response)
