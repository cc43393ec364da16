"""``router limits`` on a real Valkey."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import LAST_GOOD_FILE
from limits.audit_stream import STREAM
from limits.model import Admitted, Denied, LimitKind
from policies.load import read_bundle
from policies.source import save_last_good
from tests.harness.limit_commands import ACME, KEY, Commands, Server

LIMITS: dict[LimitKind, dict[str, Any]] = {
    LimitKind.REQUESTS: {"requests_per_second": 1, "burst": 2},
    LimitKind.TOKENS: {"tokens_per_minute": 10},
    LimitKind.PARALLEL: {"max_parallel": 2},
    LimitKind.DAILY_MICRO_USD: {"budgets": [{"period": "DAILY", "usd": 0.11}]},
    LimitKind.DAILY_TOKENS: {"budgets": [{"period": "DAILY", "tokens": 11}]},
    LimitKind.MONTHLY_MICRO_USD: {"budgets": [{"period": "MONTHLY", "usd": 0.11}]},
    LimitKind.MONTHLY_TOKENS: {"budgets": [{"period": "MONTHLY", "tokens": 11}]},
}
KINDS = pytest.mark.parametrize("kind", list(LIMITS), ids=lambda kind: kind.name.lower())
ASKED = {"tokens": 4, "micro_usd": 40_000}


def lines(text: str) -> dict[str, list[str]]:
    """Cells of a table by its first two columns, which are set apart by two spaces or more."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {" ".join(row[:2]): row[2:] for row in rows if len(row) > 3}


@KINDS
def test_after_a_reset_the_next_request_of_an_organisation_passes(commands: Commands, kind: LimitKind) -> None:
    commands.policy(organizations={ACME: LIMITS[kind]})
    denied = commands.exhaust(**ASKED)
    assert (denied.denier.kind, denied.denier.subject) == (kind, "org")
    commands.text("limits", "reset", ACME)
    assert isinstance(commands.admit(**ASKED), Admitted)


@KINDS
def test_after_a_reset_the_next_request_of_a_key_passes(commands: Commands, kind: LimitKind) -> None:
    commands.policy(keys={KEY: LIMITS[kind]})
    denied = commands.exhaust(**ASKED)
    assert (denied.denier.kind, denied.denier.subject) == (kind, f"key/{KEY}")
    commands.text("limits", "reset", ACME, "--key", KEY)
    assert isinstance(commands.admit(**ASKED), Admitted)


def test_a_reset_of_a_key_leaves_the_organisation_and_says_so(commands: Commands) -> None:
    budgets = [{"period": "DAILY", "tokens": 11}]
    commands.policy(organizations={ACME: {"budgets": budgets}}, keys={KEY: {"max_parallel": 100}})
    commands.exhaust(**ASKED)
    commands.exhaust(tokens=1)
    result = commands.invoke("limits", "reset", ACME, "--key", KEY)
    assert result.exit_code == 0
    assert result.stderr == "Still in the way: the organisation's daily tokens, 11 used of 11.\n"
    assert isinstance(commands.admit(), Denied)


def test_a_reset_of_an_organisation_leaves_its_keys(commands: Commands) -> None:
    commands.policy(keys={KEY: LIMITS[LimitKind.DAILY_TOKENS]})
    commands.exhaust(**ASKED)
    commands.text("limits", "reset", ACME)
    assert isinstance(commands.admit(**ASKED), Denied)


def test_a_reset_is_in_the_audit_trail_with_figures_and_what_was_forgiven(commands: Commands) -> None:
    commands.policy(organizations={ACME: LIMITS[LimitKind.DAILY_TOKENS]})
    commands.admit(tokens=7, micro_usd=1_250_000)
    text = commands.text("limits", "reset", ACME, "--actor", "ticket-42")
    after, before = commands.events("--action", "LIMIT_RESET")
    assert {event["actor"] for event in (before, after)} == {"ticket-42"}
    assert {event["organization_id"] for event in (before, after)} == {ACME}
    assert before["metadata"]["phase"] == "before"
    (figure,) = before["metadata"]["figures"]
    assert {name: figure[name] for name in ("subject", "unit", "period", "limit", "current_usage", "remaining")} == {
        "subject": "organization",
        "unit": "tokens",
        "period": "DAILY",
        "limit": 11,
        "current_usage": 7,
        "remaining": 4,
    }
    assert (after["metadata"]["phase"], after["metadata"]["of"]) == ("after", before["event_id"])
    today = datetime.now(UTC)
    assert after["metadata"]["credits"] == [
        {"period": f"org:DAILY:{today:%Y-%m-%d}", "tokens": 7, "usd": 1.25, "micro_usd": 1_250_000},
        {"period": f"org:MONTHLY:{today:%Y-%m}", "tokens": 7, "usd": 1.25, "micro_usd": 1_250_000},
    ]
    assert f"org:DAILY:{today:%Y-%m-%d} $1.25 and 7 tokens" in text


def test_a_second_reset_forgives_only_what_came_after_the_first(commands: Commands) -> None:
    commands.admit(tokens=7, micro_usd=70)
    commands.text("limits", "reset", ACME)
    commands.admit(tokens=2, micro_usd=20)
    credits_ = commands.json("limits", "reset", ACME)["credits"]
    assert [(credit["tokens"], credit["micro_usd"]) for credit in credits_] == [(2, 20), (2, 20)]


def test_the_actor_is_the_user_unless_said_otherwise(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    commands.text("limits", "reset", ACME)
    assert {event["actor"] for event in commands.events()} == {getpass.getuser()}


def test_nothing_is_reset_where_the_audit_trail_cannot_be_told(commands: Commands, limit_server: Server) -> None:
    commands.policy(organizations={ACME: LIMITS[LimitKind.DAILY_TOKENS]})
    commands.exhaust(**ASKED)
    limit_server.client.set(STREAM, "not a stream")
    result = commands.invoke("limits", "reset", ACME)
    assert result.exit_code == 1
    assert "WRONGTYPE" in result.stderr
    assert isinstance(commands.admit(**ASKED), Denied)


def test_show_has_every_figure_of_the_organisation_and_the_key(commands: Commands) -> None:
    budgets = [{"period": "DAILY", "usd": 1, "tokens": 1000}, {"period": "MONTHLY", "usd": 500.5, "tokens": 20_000}]
    rates = {"requests_per_second": 1, "burst": 200, "tokens_per_minute": 60, "max_parallel": 20}
    commands.policy(default={**rates, "budgets": budgets}, keys={KEY: {"max_parallel": 5}})
    commands.admit(tokens=50, micro_usd=1_234_567 - 300_000)
    commands.admit(tokens=3, micro_usd=13)
    shown = commands.text("limits", "show", ACME, "--key", KEY)
    assert shown.startswith("acme: 2 requests are open.\n")
    table = lines(shown)
    assert {name: cells[:3] for name, cells in table.items() if "minute" not in name and "second" not in name} == {
        "WHOSE WHAT": ["LIMIT", "USED", "REMAINING"],
        "organisation requests at once": ["20", "2", "18"],
        "organisation daily usd": ["$1.00", "$0.93458", "$0.06542"],
        "organisation daily tokens": ["1,000", "53", "947"],
        "organisation monthly usd": ["$500.50", "$0.93458", "$499.56542"],
        "organisation monthly tokens": ["20,000", "53", "19,947"],
        "key k-1 requests at once": ["5", "2", "3"],
    }
    assert table["organisation requests (1 a second)"][0] == "200"
    assert table["organisation tokens (60 a minute)"][0] == "60"
    assert all(cells[-1] == "policy" for name, cells in table.items() if name != "WHOSE WHAT")
    tomorrow = table["organisation daily usd"][3]
    assert tomorrow.startswith("in ")
    assert tomorrow.endswith("T00:00:00Z)")


def test_show_without_a_key_has_the_organisation_only(commands: Commands) -> None:
    commands.policy(default={"max_parallel": 20}, default_key={"max_parallel": 5})
    assert [row["subject"] for row in commands.json("limits", "show", ACME)["limits"]] == ["organization"]
    both = commands.json("limits", "show", ACME, "--key", "any")["limits"]
    assert [(row["subject"], row["limit"]) for row in both] == [("organization", 20), ("api_key", 5)]


def test_show_prints_json_in_the_words_of_a_refusal(commands: Commands) -> None:
    commands.policy(organizations={ACME: {"budgets": [{"period": "MONTHLY", "usd": 2.5}]}})
    commands.admit(tokens=5, micro_usd=1_000_001)
    shown = commands.json("limits", "show", ACME)
    (row,) = shown.pop("limits")
    assert shown == {"organization_id": "acme", "api_key_id": None, "has_used": True, "open_requests": 1}
    assert row.pop("reset_at").endswith("-01T00:00:00Z")
    assert row == {
        "subject": "organization",
        "unit": "usd",
        "limit": 2.5,
        "current_usage": 1.000001,
        "remaining": 1.499999,
        "period": "MONTHLY",
        "micro_usd": {"limit": 2_500_000, "current_usage": 1_000_001, "remaining": 1_499_999},
        "source": "policy",
    }


def test_looking_changes_nothing(commands: Commands, limit_server: Server) -> None:
    commands.policy(default={"requests_per_second": 1, "budgets": [{"period": "DAILY", "usd": 1}]})
    commands.text("limits", "show", ACME, "--key", KEY)
    assert limit_server.client.keys("*") == []


def test_an_organisation_that_has_used_nothing_is_told(commands: Commands) -> None:
    commands.policy(default={"max_parallel": 20})
    says = "amce has not used anything: the store does not know it."
    assert says in commands.text("limits", "show", "amce")
    assert says in commands.text("limits", "reset", "amce")
    assert commands.json("limits", "show", "amce")["has_used"] is False
    commands.admit(organization="amce")
    assert says not in commands.text("limits", "show", "amce")


def test_no_limit_at_all_is_told(commands: Commands) -> None:
    assert "Nothing is limited." in commands.text("limits", "show", ACME)


@pytest.mark.parametrize("command", [["show"], ["reset"]], ids=["show", "reset"])
def test_a_store_that_is_down_is_one_clear_line(commands: Commands, tmp_path: Path, command: list[str]) -> None:
    result = commands.invoke("limits", *command, ACME, "--redis", f"unix://{tmp_path}/none")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: The limit store at {tmp_path}/none cannot be used: [Errno 2] No such file or directory\n"
    )


def test_a_password_is_not_repeated(commands: Commands) -> None:
    result = commands.invoke("limits", "show", ACME, "--redis", "redis://user:secret@127.0.0.1:1")
    assert result.exit_code == 1
    assert "127.0.0.1:1 cannot be used" in result.stderr
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ac me"], "holds whitespace"),
        (["x" * 257], "longer than 256 bytes"),
        ([ACME, "--key", "a,b"], "comma"),
        ([ACME, "--redis", "http://x"], "--redis: not a Redis address"),
        ([], "ORG"),
    ],
)
def test_wrong_arguments_are_told(commands: Commands, arguments: list[str], says: str) -> None:
    result = commands.invoke("limits", "show", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_store_must_be_named(commands: Commands) -> None:
    result = commands.invoke("limits", "show", ACME, REDIS_ADDR="")
    assert result.exit_code == 2
    assert "set REDIS_ADDR" in result.stderr


def test_names_that_steer_a_terminal_do_not(commands: Commands) -> None:
    shown = commands.text("limits", "show", "[red]\u202eacme", "--key", "[b]k\u200b")
    assert "[red]\\u202eacme: 0 requests" in shown


def test_a_broken_policy_directory_leaves_the_last_good_limits(commands: Commands, tmp_path: Path) -> None:
    commands.policy(default={"max_parallel": 7})
    save_last_good(read_bundle(commands.policy_dir), tmp_path / "run" / LAST_GOOD_FILE)
    (commands.policy_dir / "router.yaml").write_text("limits: [")
    result = commands.invoke("limits", "show", ACME, "--json")
    assert result.exit_code == 0
    assert '"limit": 7' in result.stdout
    assert "last good policy" in result.stderr
