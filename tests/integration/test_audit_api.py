"""Receipts and audit events through the real Envoy, and the commands that ask the ledger for them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import Any

import httpx
import pytest

from tests.harness.calls import CHAT, INFERENCE, call, chat, inference
from tests.harness.process import eventually
from tests.harness.stack import ROOT, Stack, model_of, policy_of, running_stack

pytestmark = pytest.mark.integration

REQUESTS = "/v1/audit/requests"
ADMIN = "dev-root-admin"
PRICE = {"input_usd_per_1k": 0.005, "output_usd_per_1k": 0.015, "cached_input_usd_per_1k": 0.0025}
_NUMBERS = count()


def a_policy(stack: Stack) -> dict[str, Any]:
    """``gpt-4o`` tries ``a`` first and ``b`` after it; ``poor`` organisations have no money."""
    return policy_of(
        stack.uris,
        models=[model_of({"a": 90, "b": 0}), model_of({"a": 1, "b": 1}, model="spared", degraded=["b"])],
        backend={"price": PRICE},
        limits={
            "default": {"requests_per_second": 500, "budgets": [{"period": "MONTHLY", "usd": 1000}]},
            "organizations": {"poor": {"budgets": [{"period": "DAILY", "tokens": 1}]}},
        },
    )


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    environ = {"LIMIT_STORE_DEADLINE_S": "5"}
    with running_stack(valkey=True, workers=1, environ=environ) as running:
        running.apply(a_policy(running))
        yield running


@pytest.fixture
def org(stack: Stack) -> str:
    """An organisation that nobody else uses."""
    stack.reset()
    return f"audited{next(_NUMBERS)}"


@pytest.fixture
def acme(stack: Stack, org: str) -> Iterator[httpx.Client]:
    with stack.client(f"dev-{org}-alice") as client:
        yield client


def receipt(client: httpx.Client, request_id: str, *, state: str = "ENDED") -> dict[str, Any]:
    """The receipt of a request, once it is there."""
    found: dict[str, Any] = {}

    def is_there() -> bool:
        response = client.get(f"{REQUESTS}/{request_id}")
        found.update(response.json())
        return response.status_code == 200 and found["state"] == state

    eventually(is_there, f"the receipt of {request_id}: {found}")
    return found


def events(client: httpx.Client, **asked: Any) -> list[dict[str, Any]]:
    """All events that are asked for, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        response = client.get(REQUESTS, params=asked)
        assert response.status_code == 200, response.text
        found += response.json()["events"]
        asked["cursor"] = response.json()["next_cursor"]
        if asked["cursor"] is None:
            return found


def router(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``router`` as an operator on the machine does."""
    command = [sys.executable, "-m", "cli", *arguments]
    # Without the width that pytest-xdist gives a terminal: a line of a table is to stay a line.
    env = {name: value for name, value in (os.environ | stack.environ).items() if name != "COLUMNS"}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def output(stack: Stack, *arguments: str, code: int = 0) -> Any:
    """What a command prints for programs."""
    done = router(stack, *arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


# --- Receipts.


def test_receipt_says_what_happened_and_what_it_cost(acme: httpx.Client, org: str) -> None:
    answer = call(acme, CHAT)
    used = answer.json()["usage"]
    found = receipt(acme, answer.headers["x-request-id"])
    assert (found["organization_id"], found["api_key_id"]) == (org, f"dev-{org}-alice")
    assert (found["endpoint"], found["model"], found["status"]) == ("chat", "gpt-4o", 200)
    assert found["decision"] == {"what": "PRIMARY", "reason": None, "limit_state": "WITHIN_LIMIT"}
    assert found["candidates"] == [
        {"backend_id": "a", "weight": 90, "standing": "normal"},
        {"backend_id": "b", "weight": 0, "standing": "normal"},
    ]
    assert [(a["backend_id"], a["outcome"], a["status"]) for a in found["attempts"]] == [("a", "ANSWERED", 200)]
    tokens = (used["prompt_tokens"], used["completion_tokens"])
    assert (found["usage"]["tokens_input"], found["usage"]["tokens_output"]) == tokens
    assert found["usage"]["source"] == "provider"
    assert found["cost_micro_usd"] == -(-(tokens[0] * 5000 + tokens[1] * 15_000) // 1000)
    assert {(limit["unit"], limit.get("period") or limit.get("window")) for limit in found["limits"]} == {
        ("requests", "burst"),
        ("usd", "MONTHLY"),
    }
    assert found["timestamps"]["started"] < found["timestamps"]["ended"]


def test_receipt_tells_when_it_was_settled_and_delivered(acme: httpx.Client) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    eventually(lambda: receipt(acme, request_id)["settlement"]["state"] == "SETTLED", "it is settled")
    eventually(lambda: receipt(acme, request_id)["delivery"]["state"] == "DELIVERED", "it is delivered")
    found = receipt(acme, request_id)
    assert found["settlement"]["micro_usd"] == found["cost_micro_usd"]


def test_clients_own_id_leads_to_the_request_and_not_to_its_repetition(acme: httpx.Client) -> None:
    body = inference()
    first = acme.post(INFERENCE, json=body)
    eventually(lambda: "x-idempotent-replay" in acme.post(INFERENCE, json=body).headers, "the answer is repeated")
    repeated = acme.post(INFERENCE, json=body)
    again = receipt(acme, repeated.headers["x-request-id"])
    assert (again["decision"]["what"], again["decision"]["reason"], again["attempts"]) == ("REPEATED", None, [])
    found = receipt(acme, body["request_id"])
    assert (found["request_id"], found["client_request_id"]) == (first.headers["x-request-id"], body["request_id"])
    assert found["decision"]["what"] == "PRIMARY"


def test_failover_shows_both_attempts(stack: Stack, acme: httpx.Client) -> None:
    stack.mocks["a"].fail("status", status=500)
    answer = call(acme, CHAT)
    assert answer.headers["x-routing-decision"] == "FAILOVER"
    request_id = answer.headers["x-request-id"]
    eventually(lambda: len(receipt(acme, request_id)["attempts"]) == 2, "both attempts are told of")
    found = receipt(acme, request_id)
    assert found["decision"]["what"] == "FAILOVER"
    outcomes = [(a["backend_id"], a["outcome"], a["status"]) for a in found["attempts"]]
    assert outcomes == [("a", "FAILED", 502), ("b", "ANSWERED", 200)]


def test_request_that_every_backend_failed_shows_them_all(stack: Stack, acme: httpx.Client) -> None:
    for mock in stack.mocks.values():
        mock.fail("status", status=503)
    answer = call(acme, CHAT)
    assert answer.status_code == 502
    eventually(lambda: len(receipt(acme, answer.headers["x-request-id"])["attempts"]) == 2, "both are told of")
    found = receipt(acme, answer.headers["x-request-id"])
    assert [(a["backend_id"], a["outcome"]) for a in found["attempts"]] == [("a", "FAILED"), ("b", "FAILED")]
    assert found["cost_micro_usd"] == 0


def test_denied_request_has_a_receipt_with_its_event(stack: Stack) -> None:
    with stack.client("dev-poor-bob") as client:
        denied = call(client, CHAT)
        assert denied.status_code == 402
        request_id = denied.headers["x-request-id"]
        eventually(lambda: receipt(client, request_id)["events"], "the denial is in the trail")
        found = receipt(client, request_id)
    assert found["decision"] == {"what": "DENIED", "reason": "QUOTA_EXCEEDED", "limit_state": "BUDGET_EXCEEDED"}
    assert [event["action"] for event in found["events"]] == ["REQUEST_DENIED"]
    assert found["attempts"] == []
    assert found["limits"][0]["remaining"] <= 1


def test_request_that_runs_says_so(stack: Stack, acme: httpx.Client, org: str) -> None:
    stack.mocks["a"].fail("hold", events=1)
    with acme.stream("POST", CHAT, json=chat(stream=True)) as response:
        assert response.status_code == 200
        found = receipt(acme, response.headers["x-request-id"], state="RUNNING")
        assert found["settlement"]["state"] == "RESERVED"
        assert found["settlement"]["micro_usd"] > 0
        assert found["candidates"][0]["backend_id"] == "a"
        with stack.client(ADMIN) as admin:
            assert receipt(admin, found["request_id"], state="RUNNING")["organization_id"] == org
        assert output(stack, "audit", "explain", found["request_id"])["receipt"]["state"] == "RUNNING"
        stack.mocks["a"].release()
        response.read()
    assert receipt(acme, response.headers["x-request-id"])["state"] == "ENDED"


def test_receipt_holds_no_key_body_or_address(stack: Stack) -> None:
    with stack.client("dev-secretive-alice") as client:
        answer = client.post(CHAT, json=chat(messages=[{"role": "user", "content": "xyzzy plugh"}]))
        text = json.dumps(receipt(client, answer.headers["x-request-id"]))
    for secret in ("xyzzy", "127.0.0.1", str(stack.directory), "Bearer"):
        assert secret not in text


# --- Whose.


def test_others_requests_are_as_unknown_as_those_that_never_were(stack: Stack, acme: httpx.Client) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    receipt(acme, request_id)
    with stack.client("dev-globex-bob") as other:
        theirs, none = (other.get(f"{REQUESTS}/{id_}") for id_ in (request_id, str(uuid.uuid4())))
    for response in (theirs, none):
        assert response.status_code == 404
        assert response.headers["cache-control"] == "no-store"
        assert response.json()["code"] == "REQUEST_NOT_FOUND"
        assert response.json()["trace_id"] == response.headers["x-request-id"]
    assert {**theirs.json(), "trace_id": ""} == {**none.json(), "trace_id": ""}


def test_another_organisations_id_of_its_own_does_not_hide_mine(stack: Stack, acme: httpx.Client, org: str) -> None:
    body = inference()
    mine = acme.post(INFERENCE, json=body)
    with stack.client("dev-globex-bob") as other:
        theirs = other.post(INFERENCE, json=body)
        assert receipt(other, body["request_id"])["request_id"] == theirs.headers["x-request-id"]
    assert receipt(acme, body["request_id"])["request_id"] == mine.headers["x-request-id"]


def test_admin_sees_every_organisation(stack: Stack, acme: httpx.Client, org: str) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    with stack.client(ADMIN) as admin:
        assert receipt(admin, request_id)["organization_id"] == org
        assert {event["organization_id"] for event in events(admin, organization=org)} == {org}


def test_nobody_makes_himself_an_admin_or_another_organisation(stack: Stack, acme: httpx.Client) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    receipt(acme, request_id)
    feigned = {"x-router-admin": "true", "x-router-org": "globex", "X-Router-Admin": "true"}
    with stack.client("dev-globex-bob", follow_redirects=False) as other:
        other.headers.update(feigned)
        assert other.get(f"{REQUESTS}/{request_id}").status_code == 404
        assert other.get(REQUESTS, params={"organization": "somebody"}).status_code == 403
    with stack.client("nobody-knows-it") as nobody:
        refused = nobody.get(f"{REQUESTS}/{request_id}")
        assert (refused.status_code, refused.headers["cache-control"]) == (401, "no-store")


@pytest.mark.parametrize("path", ["/operator/sums", "/v1/audit/../../operator/sums", "/healthz", "/v1/audit"])
def test_operators_paths_are_not_reached_from_outside(stack: Stack, path: str) -> None:
    with stack.client(ADMIN) as admin:
        request = admin.build_request("GET", "/")
        request.url = httpx.URL(stack.url).copy_with(raw_path=path.encode())
        response = admin.send(request)
    assert response.status_code == 404
    assert response.json()["code"] == "NOT_FOUND"


@pytest.mark.parametrize("path", ["..%2F..%2Foperator%2Fsums", "a/b", ""])
def test_no_id_leads_anywhere_else(stack: Stack, path: str) -> None:
    with stack.client(ADMIN) as admin:
        response = admin.get(f"{REQUESTS}/{path}")
    assert (response.status_code, response.json()["code"]) == (404, "REQUEST_NOT_FOUND")


# --- Listings.


def test_listing_has_every_request_once_page_by_page(stack: Stack, acme: httpx.Client, org: str) -> None:
    ids = [call(acme, CHAT).headers["x-request-id"] for _ in range(7)]
    eventually(lambda: len(events(acme)) == 7, "all are written down")
    first = acme.get(REQUESTS, params={"limit": 3}).json()
    ids_of_first = [event["request_id"] for event in first["events"]]
    assert ids_of_first == ids[:3:-1]
    later = call(acme, CHAT).headers["x-request-id"]
    eventually(lambda: later in {event["request_id"] for event in events(acme)}, "a new one is there")
    rest = events(acme, limit=3, cursor=first["next_cursor"])
    assert ids_of_first + [event["request_id"] for event in rest] == ids[::-1]
    assert {event["action"] for event in rest} == {"REQUEST_ALLOWED"}


def test_listing_shows_what_was_let_through_and_what_was_not(stack: Stack) -> None:
    with stack.client("dev-poor-carol") as client:
        denied = call(client, CHAT).headers["x-request-id"]
        eventually(lambda: denied in {e["request_id"] for e in events(client, action="REQUEST_DENIED")}, "it is there")
        assert events(client, action="REQUEST_ALLOWED") == []
        [event] = events(client, request_id=denied)
        assert event["metadata"]["reason"] == "quota_spent"
        assert events(client, request_id=denied, until=event["created_at"]) == []
        assert events(client, request_id=denied, since=event["created_at"]) == [event]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("since", "soon"),
        ("until", "-1"),
        ("action", "SLEPT"),
        ("limit", "0"),
        ("limit", "501"),
        ("cursor", "!"),
        ("cursor", "WzFd"),
        ("cursor", "WzEsMiwzXQ"),
        ("organisation", "acme"),
    ],
)
def test_bad_parameter_is_named(acme: httpx.Client, name: str, value: str) -> None:
    response = acme.get(REQUESTS, params={name: value})
    assert response.status_code == 400
    assert (response.json()["code"], response.json()["param"]) == ("VALIDATION_ERROR", name)


def test_receipt_takes_no_parameter(acme: httpx.Client) -> None:
    response = acme.get(f"{REQUESTS}/x", params={"verbose": "1"})
    assert (response.status_code, response.json()["param"]) == (400, "verbose")


def test_listing_finds_a_request_by_its_clients_own_id(acme: httpx.Client) -> None:
    body = inference()
    request_id = acme.post(INFERENCE, json=body).headers["x-request-id"]
    receipt(acme, request_id)
    assert [event["request_id"] for event in events(acme, request_id=body["request_id"])] == [request_id]


# --- Commands.


def test_explain_agrees_with_what_was_written_down(stack: Stack, acme: httpx.Client) -> None:
    stack.mocks["a"].fail("status", status=500)
    ids = [call(acme, CHAT).headers["x-request-id"]]
    eventually(lambda: len(receipt(acme, ids[0])["attempts"]) == 2, "both attempts are told of")
    stack.reset()
    ids += [call(acme, CHAT, "spared", mock_cached_tokens=1).headers["x-request-id"]]
    ids += [call(acme, INFERENCE).headers["x-request-id"]]
    for request_id, decision in zip(ids, ("FAILOVER", "OVERRIDE", "PRIMARY"), strict=True):
        receipt(acme, request_id)
        shown = output(stack, "audit", "explain", request_id)
        assert shown["receipt"]["decision"]["what"] == decision
        verdicts = {check["figure"]: check["verdict"] for check in shown["checks"]}
        assert set(verdicts.values()) == {"agrees"}
        assert verdicts.keys() >= {"candidates", "decision", "price of 1,000 tokens", "cost in micro-dollars", "policy"}


def tamper(stack: Stack, request_id: str, column: str, before: str, after: str) -> None:
    """Change what the ledger has on its disk."""
    with closing(sqlite3.connect(stack.directory / "usage.db", isolation_level=None, timeout=10)) as db:
        [(kept,)] = db.execute(f"SELECT {column} FROM requests WHERE request_id = ?", (request_id,))
        assert before in kept
        db.execute(f"UPDATE requests SET {column} = ? WHERE request_id = ?", (kept.replace(before, after), request_id))


@pytest.mark.parametrize(
    ("change", "figures"),
    [
        (("told", "a=5000", "a=4000"), {"price version", "price of 1,000 tokens"}),
        (("record", '"cost_micro_usd":', '"cost_micro_usd":9'), {"cost in micro-dollars", "cost in dollars"}),
        (("record", '"tokens_output":', '"tokens_output":1'), {"cost in micro-dollars", "tokens settled"}),
        (("record", '"decision_reason":"PRIMARY"', '"decision_reason":"OVERRIDE"'), {"decision"}),
        (("told", '"backend":"a"', '"backend":"c"'), {"backends tried"}),
        (("settlement", "[", "[1"), {"tokens settled"}),
    ],
    ids=["price", "cost", "tokens", "decision", "backend", "settlement"],
)
def test_explain_sees_what_was_changed(
    stack: Stack, acme: httpx.Client, change: tuple[str, str, str], figures: set[str]
) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    eventually(lambda: receipt(acme, request_id)["settlement"]["state"] == "SETTLED", "it is settled")
    tamper(stack, request_id, *change)
    shown = output(stack, "audit", "explain", request_id, code=1)
    assert figures <= {check["figure"] for check in shown["checks"] if check["verdict"] == "differs"}


def test_explain_through_envoy_checks_the_price_alone(stack: Stack, acme: httpx.Client, org: str) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    receipt(acme, request_id)
    asked = ("audit", "explain", request_id, "--url", stack.url, "--key", f"dev-{org}-alice")
    verdicts = {check["figure"]: check["verdict"] for check in output(stack, *asked)["checks"]}
    assert verdicts["cost in micro-dollars"] == "agrees"
    assert verdicts["candidates"] == "unknown"
    text = router(stack, *asked).stdout
    assert "not checked" in text
    assert request_id in text
    assert router(stack, "audit", "explain", str(uuid.uuid4())).returncode == 1


def test_explain_is_read_by_people_too(stack: Stack, acme: httpx.Client) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    receipt(acme, request_id)
    done = router(stack, "audit", "explain", request_id)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "differs" not in done.stdout
    assert {"Candidates", "Attempts", "Limits", "Worked out again"} <= set(done.stdout.splitlines())


def test_list_shows_what_the_ledger_keeps(stack: Stack, acme: httpx.Client, org: str) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    receipt(acme, request_id)
    done = router(stack, "audit", "list", "--org", org, "--json")
    assert done.stderr == ""
    [event] = json.loads(done.stdout)
    assert (event["action"], event["request_id"]) == ("REQUEST_ALLOWED", request_id)
    assert event["created_at"] == receipt(acme, request_id)["timestamps"]["started"]
    through = router(stack, "audit", "list", "--url", stack.url, "--key", f"dev-{org}-alice", "--json")
    assert json.loads(through.stdout) == [event]
    assert output(stack, "audit", "list", "--org", org, "--until", event["created_at"]) == []


def test_sums_are_exact(stack: Stack, acme: httpx.Client, org: str) -> None:
    answers = [call(acme, CHAT) for _ in range(5)] + [call(acme, CHAT, "spared") for _ in range(2)]
    receipts = [receipt(acme, answer.headers["x-request-id"]) for answer in answers]
    sums = {one["model"]: one for one in output(stack, "usage", "show", "--org", org)}
    assert {model: one["requests"] for model, one in sums.items()} == {"gpt-4o": 5, "spared": 2}
    cost = sum(found["cost_micro_usd"] for found in receipts if found["model"] == "gpt-4o")
    assert sums["gpt-4o"]["cost_micro_usd"] == cost
    assert sums["gpt-4o"]["cost_usd"] == cost / 1_000_000
    assert output(stack, "usage", "show", "--org", org, "--since", "2999-01-01T00:00:00Z") == []
    text = router(stack, "usage", "show", "--org", org).stdout
    assert [line.split()[:2] for line in text.splitlines() if org in line] == [[org, "gpt-4o"], [org, "spared"]]


def test_counts_agree_and_differences_are_told(stack: Stack, acme: httpx.Client) -> None:
    for _ in range(5):
        call(acme, CHAT)
    assert acme.get(f"{REQUESTS}/a%00b").status_code == 400  # Envoy itself: it has no request id yet
    assert acme.get("/nowhere").status_code == 404
    with pytest.raises(httpx.ReadTimeout):  # the client leaves before there are headers
        acme.post(CHAT, json=chat(), headers={"x-mock-fault": "slow=2"}, timeout=0.3)

    def told() -> Any:
        return output(stack, "usage", "reconcile")

    def is_quiet() -> bool:
        counts = told()
        return counts["completed"] == counts["known"] and counts["waiting"] == 0

    eventually(is_quiet, "everything is in the journal and delivered")
    counts = told()
    assert counts["unaccounted"] == 0
    assert counts["records"] == counts["delivered"] == counts["kinds"]["forwarded"] + counts["kinds"].get("limited", 0)
    done = router(stack, "usage", "reconcile")
    assert done.returncode == 0
    assert "Every request is accounted for." in done.stdout


def test_request_that_runs_is_told_as_open(stack: Stack, acme: httpx.Client) -> None:
    stack.mocks["a"].fail("hold", events=1)
    with acme.stream("POST", CHAT, json=chat(stream=True)) as response:
        assert response.status_code == 200
        counts = output(stack, "usage", "reconcile")
        assert counts["running"] >= 1
        assert "OPEN" in {difference["reason"] for difference in counts["differences"]}
        stack.mocks["a"].release()
        response.read()


# --- What dies. The last: it takes the ledger away from the others.


def test_dead_ledger_is_a_503_and_the_store_tells_what_it_knows(stack: Stack, acme: httpx.Client, org: str) -> None:
    request_id = call(acme, CHAT).headers["x-request-id"]
    receipt(acme, request_id)
    stack.usage.stop(signal.SIGKILL)
    try:
        for path in (REQUESTS, f"{REQUESTS}/{request_id}"):
            response = acme.get(path)
            assert response.status_code == 503
            assert response.json()["code"] == "SERVICE_UNAVAILABLE"
            assert response.json()["trace_id"] == response.headers["x-request-id"]
            assert response.headers["cache-control"] == "no-store"
        done = router(stack, "audit", "list", "--org", "poor")
        assert done.returncode == 0
        assert "limit store" in done.stderr
        assert router(stack, "usage", "reconcile").returncode == 1
    finally:
        stack.usage.start()
    assert receipt(acme, request_id)["state"] == "ENDED"


def test_ledger_that_hangs_is_a_503_too(stack: Stack, acme: httpx.Client) -> None:
    eventually(lambda: acme.get(REQUESTS).status_code == 200, "the ledger is there")
    os.kill(stack.usage.pid, signal.SIGSTOP)
    try:
        response = acme.get(REQUESTS)
    finally:
        os.kill(stack.usage.pid, signal.SIGCONT)
    assert (response.status_code, response.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
