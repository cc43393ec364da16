"""``router audit`` on a real Valkey."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.audit import AuditAction, AuditEvent
from limits.audit_stream import STREAM, append
from limits.valkey import ValkeyLimits
from tests.harness.limit_commands import ACME, Commands, Server, with_store


def record(commands: Commands, *events: AuditEvent) -> None:
    async def write(store: ValkeyLimits) -> None:
        for event in events:
            await append(store.connection, event, events_max=1000)

    with_store(commands.address, write)


def an_event(event_id: str, **changes: Any) -> AuditEvent:
    fields: dict[str, Any] = {
        "event_id": event_id,
        "request_id": f"request-{event_id}",
        "organization_id": ACME,
        "actor": "k-1",
        "action": AuditAction.REQUEST_DENIED,
        "metadata": {"reason": "request_rate"},
        "created_at": 1_700_000_000.25,
    }
    return AuditEvent(**(fields | changes))


def ids(commands: Commands, *arguments: str) -> list[str]:
    return [event["event_id"] for event in commands.events(*arguments)]


def test_list_shows_the_newest_first(commands: Commands) -> None:
    record(commands, an_event("1"), an_event("2", actor="", request_id="", metadata={"credits": [{"tokens": 5}]}))
    table = [line.split() for line in commands.text("audit", "list").splitlines()]
    assert table == [
        ["TIME", "(UTC)", "ACTION", "ORG", "ACTOR", "REQUEST", "DETAILS"],
        ["2023-11-14", "22:13:20", "REQUEST_DENIED", "acme", "-", "-", "credits=[{tokens:5}]"],
        ["2023-11-14", "22:13:20", "REQUEST_DENIED", "acme", "k-1", "request-1", "reason=request_rate"],
    ]


REQUEST_ID = "123e4567-e89b-12d3-a456-426614174000"
ALLOWED = {
    "model": "gpt-4o",
    "backend_id": "a",
    "policy_version": "e58529ad3c7d" + "0" * 52,
    "cost_micro_usd": 80,
    "param": None,
    "trace_id": REQUEST_ID,
}


def test_on_a_narrow_terminal_an_event_has_two_lines(commands: Commands) -> None:
    record(
        commands,
        an_event("1", request_id=REQUEST_ID, action=AuditAction.REQUEST_ALLOWED, metadata=ALLOWED),
        an_event("2", organization_id="", request_id="", metadata={}),
    )
    assert commands.invoke("audit", "list", COLUMNS="80").stdout.splitlines() == [
        "TIME (UTC)           ACTION           ORG   ACTOR",
        "2023-11-14 22:13:20  REQUEST_DENIED   -     k-1",
        "2023-11-14 22:13:20  REQUEST_ALLOWED  acme  k-1",
        f"  {REQUEST_ID}  model=gpt-4o backend_id=a",
        "  policy_version=e58529ad3c7d cost=$0.00008",
    ]


def test_ids_of_requests_stay_on_one_line_of_a_wide_terminal(commands: Commands) -> None:
    record(commands, an_event("1", request_id=REQUEST_ID, metadata={"text": "word " * 100}))
    assert REQUEST_ID in commands.invoke("audit", "list", COLUMNS="140").stdout


def test_money_in_details_has_no_exponent(commands: Commands) -> None:
    limit = {"unit": "usd", "limit": 8e-05, "remaining": 0, "reset_at": "2030-01-01T00:00:00Z"}
    record(commands, an_event("1", metadata={"limit": limit, "usd": 8e-05, "share": 1e-07}))
    shown = commands.text("audit", "list")
    assert "limit={unit:usd,limit:$0.00008,remaining:$0.00,reset_at:2030-01-01T00:00:00Z}" in shown
    assert "usd=$0.00008 share=0.0000001" in shown


def test_list_prints_events_as_the_contract_has_them(commands: Commands) -> None:
    record(commands, an_event("1"))
    assert commands.events() == [
        {
            "event_id": "1",
            "request_id": "request-1",
            "organization_id": "acme",
            "actor": "k-1",
            "action": "REQUEST_DENIED",
            "created_at": "2023-11-14T22:13:20.250000Z",
            "metadata": {"reason": "request_rate"},
        }
    ]


def test_filters_are_all_held(commands: Commands) -> None:
    now = time.time()
    record(
        commands,
        an_event("1"),
        an_event("2", organization_id="other", created_at=now),
        an_event("3", action=AuditAction.LIMIT_RESET, created_at=now - 7200),
        an_event("4", created_at=now),
    )
    assert ids(commands) == ["4", "3", "2", "1"]
    assert ids(commands, "--limit", "1") == ["4"]
    assert ids(commands, "--org", "other") == ["2"]
    assert ids(commands, "--request", "request-3") == ["3"]
    assert ids(commands, "--action", "limit_reset") == ["3"]
    assert ids(commands, "--since", "1h") == ["4", "2"]
    assert ids(commands, "--since", "1h", "--org", ACME) == ["4"]
    assert ids(commands, "--until", "1h") == ["3", "1"]
    assert ids(commands, "--since", "3h", "--until", "1h") == ["3"]
    assert ids(commands, "--since", datetime.fromtimestamp(now - 10_000, UTC).isoformat()) == ["4", "3", "2"]


def test_what_a_client_sent_does_not_steer_the_terminal(commands: Commands) -> None:
    record(commands, an_event("1", request_id="\x1b[31m[bold]", metadata={"model": "a\x1b]0;b\nc"}))
    shown = commands.text("audit", "list")
    assert "\x1b" not in shown
    assert "\\x1b[31m[bold]" in shown
    assert "model=a\\x1b]0;b\\nc" in shown


def test_long_details_are_cut_in_the_table_only(commands: Commands) -> None:
    record(commands, an_event("1", metadata={"text": "x" * 1000}))
    assert commands.text("audit", "list").count("x") < 300
    assert commands.events()[0]["metadata"] == {"text": "x" * 1000}


def test_no_event_is_told(commands: Commands) -> None:
    assert commands.text("audit", "list") == "There is no such event.\n"
    assert commands.events() == []


def test_entries_that_are_no_event_are_told(commands: Commands, limit_server: Server) -> None:
    limit_server.client.xadd(STREAM, {"foreign": "entry"})
    record(commands, an_event("1"))
    result = commands.invoke("audit", "list", "--json")
    assert result.exit_code == 0
    assert "1 entries of the stream" in result.stderr


def test_without_a_ledger_it_is_said_whose_events_these_are(commands: Commands) -> None:
    record(commands, an_event("1"))
    result = commands.invoke("audit", "list", "--json")
    assert "There is no ledger" in result.stderr
    assert "limit store" in result.stderr
    assert [event["event_id"] for event in json.loads(result.stdout)] == ["1"]


def test_store_that_is_named_is_asked_whether_there_is_a_ledger_or_not(commands: Commands) -> None:
    record(commands, an_event("1"))
    result = commands.invoke("audit", "list", "--redis", commands.address, "--json")
    assert result.stderr == ""
    assert [event["event_id"] for event in json.loads(result.stdout)] == ["1"]


def test_router_that_does_not_answer_is_no_reason_to_ask_the_store(commands: Commands) -> None:
    record(commands, an_event("1"))
    result = commands.invoke("audit", "list", "--url", "http://127.0.0.1:1", "--key", "k")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does not answer" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--since", "soon"], "--since"),
        (["--until", "soon"], "--until"),
        (["--url", "http://127.0.0.1:1", "--redis", "127.0.0.1:1"], "--url or --redis"),
        (["--url", "http://127.0.0.1:1"], "ROUTER_API_KEY"),
        (["--limit", "0"], "--limit"),
        (["--action", "SLEPT"], "--action"),
    ],
)
def test_wrong_options_are_told(commands: Commands, arguments: list[str], says: str) -> None:
    result = commands.invoke("audit", "list", *arguments, ROUTER_API_KEY="")
    assert result.exit_code == 2
    assert says in result.stderr
