"""``router limits``, ``budget`` and ``audit`` beside a running router: the next request feels what was done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.harness.calls import CHAT, chat
from tests.harness.limits import PRICE, StoreView, limited_policy, of_organization
from tests.harness.process import eventually
from tests.harness.stack import ROOT, Stack, running_stack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(mocks=("a",), valkey=True, backend={"price": PRICE}) as running:
        yield running


@pytest.fixture
def org() -> str:
    """An organisation that no other test uses: the store keeps what each has used."""
    return f"org{uuid.uuid4().hex[:8]}"


def limit(stack: Stack, org: str, **limits: Any) -> None:
    stack.apply(limited_policy(stack.uris, **of_organization(org, **limits)))


def router(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the stack's RUN_DIR, and tell it of no store: it finds the embedded one.

    Nor of the width of a terminal, which pytest-xdist sets: a line of a table is to stay a line.
    """
    told = {n: value for n, value in (os.environ | stack.environ).items() if n not in {"REDIS_ADDR", "COLUMNS"}}
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments], env=told, cwd=ROOT, capture_output=True, text=True, check=False
    )


def output(stack: Stack, *arguments: str) -> Any:
    """What the command prints for programs; it must succeed."""
    done = router(stack, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ask(stack: Stack, org: str) -> httpx.Response:
    with stack.client(f"dev-{org}-alice") as client:
        return client.post(CHAT, json=chat(max_tokens=10))


def settled(stack: Stack, org: str) -> None:
    store = StoreView(stack)
    store.settled(org)
    store.close()


def test_a_reset_lets_the_next_request_pass(stack: Stack, org: str) -> None:
    limit(stack, org, budgets=[{"period": "MONTHLY", "tokens": 40}])
    answers: list[int] = []
    while not answers or answers[-1] == 200:
        answers.append(ask(stack, org).status_code)
        assert len(answers) < 40
    assert answers[-1] == 402
    settled(stack, org)
    shown = output(stack, "limits", "show", org)
    assert (shown["has_used"], shown["open_requests"]) == (True, 0)
    (row,) = shown["limits"]
    assert (row["unit"], row["period"], row["limit"]) == ("tokens", "MONTHLY", 40)
    assert 0 < row["current_usage"] <= 40
    reset = output(stack, "limits", "reset", org)
    assert {credit["tokens"] for credit in reset["credits"]} == {row["current_usage"]}
    assert ask(stack, org).status_code == 200


def test_a_set_budget_holds_from_the_next_request_on(stack: Stack, org: str) -> None:
    assert ask(stack, org).status_code == 200
    output(stack, "budget", "set", org, "--period", "DAILY", "--usd", "0")
    denied = ask(stack, org)
    assert denied.status_code == 402
    assert denied.headers["x-should-retry"] == "false"
    output(stack, "budget", "set", org, "--period", "DAILY", "--policy")
    assert ask(stack, org).status_code == 200


def test_a_budget_set_for_a_key_that_the_policy_does_not_limit_holds(stack: Stack, org: str) -> None:
    output(stack, "budget", "set", org, "--period", "DAILY", "--tokens", "0")
    assert ask(stack, org).status_code == 402
    denials = ("audit", "list", "--org", org, "--action", "REQUEST_DENIED")
    eventually(lambda: output(stack, *denials), "the denial is in the trail")
    (key_id,) = (event["actor"] for event in output(stack, *denials))
    output(stack, "budget", "set", org, "--period", "DAILY", "--policy")
    assert ask(stack, org).status_code == 200
    output(stack, "budget", "set", org, "--key", key_id, "--period", "DAILY", "--tokens", "0")
    assert ask(stack, org).status_code == 402
    output(stack, "budget", "set", org, "--key", key_id, "--period", "DAILY", "--policy")
    assert ask(stack, org).status_code == 200


def test_denials_and_what_an_operator_did_are_in_one_trail(stack: Stack, org: str) -> None:
    output(stack, "budget", "set", org, "--period", "DAILY", "--tokens", "1", "--actor", "operator")
    denied = ask(stack, org)
    assert denied.status_code == 402
    request_id = denied.headers["x-request-id"]
    eventually(lambda: output(stack, "audit", "list", "--request", request_id), "the denial is in the trail")
    output(stack, "limits", "reset", org, "--actor", "operator")
    trail = ("audit", "list", "--org", org)
    eventually(lambda: output(stack, *trail)[0]["action"] == "LIMIT_RESET", "the ledger has read of the reset")
    events = output(stack, *trail)
    assert [event["action"] for event in events] == ["LIMIT_RESET", "LIMIT_RESET", "REQUEST_DENIED", "BUDGET_SET"]
    assert [event["request_id"] for event in events] == ["", "", request_id, ""]
    assert [event["actor"] == "operator" for event in events] == [True, True, False, True]
    text = router(stack, "audit", "list", "--org", org).stdout
    assert len([line for line in text.splitlines() if "REQUEST_DENIED" in line and request_id in line]) == 1


def test_a_key_that_nobody_knows_is_in_the_trail_without_an_organisation(stack: Stack) -> None:
    with stack.client("nobody-knows-it") as client:
        refused = client.post(CHAT, json=chat())
    assert refused.status_code == 401
    request_id = refused.headers["x-request-id"]
    eventually(lambda: output(stack, "audit", "list", "--request", request_id), "the refusal is in the trail")
    (event,) = output(stack, "audit", "list", "--request", request_id)
    assert (event["organization_id"], event["action"]) == ("", "REQUEST_DENIED")
    assert "nobody-knows-it" not in json.dumps(event)


def test_a_store_that_is_down_is_told_in_one_line(stack: Stack, org: str) -> None:
    done = router(stack, "limits", "show", org, "--redis", f"unix://{stack.directory}/none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"Error: The limit store at {stack.directory}/none cannot be used: [Errno 2] No such file or directory"
    ]
