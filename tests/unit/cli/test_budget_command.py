"""``router budget`` on a real Valkey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limits.audit_stream import STREAM
from limits.model import Admitted, Denied, LimitKind
from tests.harness.limit_commands import ACME, KEY, Commands, Server

DAILY = [{"period": "DAILY", "usd": 10, "tokens": 1000}]


def rows(shown: Any) -> dict[str, tuple[Any, Any, str]]:
    """Limit, use and source by period and unit; of a key with its subject before."""
    return {
        f"{'' if row['subject'] == 'organization' else 'key '}{row['period']} {row['unit']}": (
            row["limit"],
            row["current_usage"],
            row["source"],
        )
        for row in shown["budgets"]
    }


def test_show_counts_what_is_spent_without_a_budget_too(commands: Commands) -> None:
    commands.policy(organizations={ACME: {"budgets": DAILY, "max_parallel": 5}})
    commands.admit(tokens=5, micro_usd=1_500_000)
    assert rows(commands.json("budget", "show", ACME)) == {
        "DAILY usd": (10, 1.5, "policy"),
        "DAILY tokens": (1000, 5, "policy"),
        "MONTHLY usd": (None, 1.5, "none"),
        "MONTHLY tokens": (None, 5, "none"),
    }
    text = commands.text("budget", "show", ACME)
    (monthly,) = (line.split() for line in text.splitlines() if "monthly usd" in line)
    assert monthly[3:6] == ["none", "$1.50", "-"]


def test_show_of_a_key_says_where_it_has_no_budget(commands: Commands) -> None:
    commands.policy(keys={KEY: {"budgets": DAILY}})
    commands.admit(tokens=5, micro_usd=1_500_000)
    assert rows(commands.json("budget", "show", ACME, "--key", KEY))["key DAILY usd"] == (10, 1.5, "policy")
    assert "Key k-2 has no budget of its own." in commands.text("budget", "show", ACME, "--key", "k-2")
    assert "no budget" not in commands.text("budget", "show", ACME, "--key", KEY)


def test_a_set_budget_takes_the_place_of_the_policy_s_until_it_returns(commands: Commands) -> None:
    commands.policy(organizations={ACME: {"budgets": DAILY}})
    commands.text("budget", "set", ACME, "--period", "DAILY", "--usd", "0.000005")
    denied = commands.admit(micro_usd=6)
    assert isinstance(denied, Denied)
    assert (denied.denier.kind, denied.denier.limit) == (LimitKind.DAILY_MICRO_USD, 5)
    assert isinstance(commands.admit(micro_usd=5, tokens=600), Admitted)
    assert rows(commands.json("budget", "show", ACME)) == {
        "DAILY usd": (0.000005, 0.000005, "set"),
        "DAILY tokens": (1000, 600, "policy"),
        "MONTHLY usd": (None, 0.000005, "none"),
        "MONTHLY tokens": (None, 600, "none"),
    }
    commands.text("budget", "set", ACME, "--period", "DAILY", "--policy")
    assert isinstance(commands.admit(micro_usd=6), Admitted)
    assert rows(commands.json("budget", "show", ACME))["DAILY usd"] == (10, 0.000011, "policy")


def test_a_set_budget_is_marked_in_limits_show(commands: Commands) -> None:
    commands.policy(organizations={ACME: {"budgets": DAILY}})
    commands.text("budget", "set", ACME, "--period", "daily", "--tokens", "7")
    sources = {row["unit"]: row["source"] for row in commands.json("limits", "show", ACME)["limits"]}
    assert sources == {"usd": "policy", "tokens": "set"}
    (tokens,) = (line for line in commands.text("limits", "show", ACME).splitlines() if "daily tokens" in line)
    assert tokens.rstrip().endswith("budget set")


def test_a_budget_can_be_set_where_the_policy_has_none(commands: Commands) -> None:
    commands.text("budget", "set", ACME, "--period", "MONTHLY", "--usd", "1", "--tokens", "10")
    assert rows(commands.json("budget", "show", ACME))["MONTHLY tokens"] == (10, 0, "set")
    assert isinstance(commands.admit(tokens=11), Denied)
    commands.text("budget", "set", ACME, "--period", "MONTHLY", "--policy")
    assert isinstance(commands.admit(tokens=11), Admitted)


@pytest.mark.parametrize("limits", [{}, {"max_parallel": 100}], ids=["key without limits", "key with limits"])
def test_a_budget_of_a_key_holds_for_that_key(commands: Commands, limits: dict[str, Any]) -> None:
    commands.policy(keys={KEY: limits})
    commands.admit(tokens=50)
    text = commands.text("budget", "set", ACME, "--key", KEY, "--period", "DAILY", "--tokens", "10")
    assert "counted from now on" in text
    denied = commands.admit(tokens=11)
    assert isinstance(denied, Denied)
    assert (denied.denier.subject, denied.denier.kind, denied.denier.limit) == ("key/k-1", LimitKind.DAILY_TOKENS, 10)
    assert isinstance(commands.admit(tokens=11, key="k-2"), Admitted)
    assert isinstance(commands.admit(tokens=10), Admitted)
    shown = commands.json("budget", "show", ACME, "--key", KEY)
    assert rows(shown)["key DAILY tokens"] == (10, 10, "set")
    commands.text("limits", "reset", ACME, "--key", KEY)
    assert isinstance(commands.admit(tokens=10), Admitted)


def test_zero_lets_nothing_pass_not_even_after_a_reset(commands: Commands) -> None:
    commands.text("budget", "set", ACME, "--period", "DAILY", "--tokens", "0")
    assert isinstance(commands.admit(), Denied)
    result = commands.invoke("limits", "reset", ACME)
    assert result.stderr == "Still in the way: the organisation's daily tokens, 0 used of 0.\n"
    assert isinstance(commands.admit(), Denied)


def test_setting_is_in_the_audit_trail_with_before_and_after(commands: Commands) -> None:
    commands.policy(organizations={ACME: {"budgets": DAILY}})
    commands.text("budget", "set", ACME, "--period", "DAILY", "--usd", "2.5", "--actor", "zoe")
    commands.text("budget", "set", ACME, "--period", "DAILY", "--usd", "3", "--tokens", "5", "--actor", "zoe")
    commands.text("budget", "set", ACME, "--period", "DAILY", "--policy", "--key", KEY, "--actor", "zoe")
    commands.text("budget", "set", ACME, "--period", "DAILY", "--policy", "--actor", "zoe")
    events = commands.events("--action", "BUDGET_SET", "--org", ACME)
    assert {event["actor"] for event in events} == {"zoe"}
    changes = [event["metadata"]["changes"] for event in reversed(events)]
    assert changes == [
        [{"unit": "usd", "before": _of(10, "policy"), "after": _of(2.5, "set")}],
        [
            {"unit": "usd", "before": _of(2.5, "set"), "after": _of(3, "set")},
            {"unit": "tokens", "before": _of(1000, "policy"), "after": _of(5, "set")},
        ],
        [
            {"unit": "usd", "before": _of(3, "set"), "after": _of(10, "policy")},
            {"unit": "tokens", "before": _of(5, "set"), "after": _of(1000, "policy")},
        ],
    ]
    assert {(event["metadata"]["subject"], event["metadata"]["period"]) for event in events} == {("org", "DAILY")}


def _of(limit: float, source: str) -> dict[str, Any]:
    return {"limit": limit, "source": source}


def test_what_is_so_already_is_not_set_again(commands: Commands) -> None:
    for _ in range(2):
        commands.text("budget", "set", ACME, "--period", "DAILY", "--usd", "2.5")
    assert "Nothing changes" in commands.text("budget", "set", ACME, "--period", "DAILY", "--usd", "2.50")
    assert "Nothing changes" in commands.text("budget", "set", ACME, "--period", "MONTHLY", "--policy")
    assert len(commands.events("--action", "BUDGET_SET")) == 1


def test_nothing_is_set_where_the_audit_trail_cannot_be_told(commands: Commands, limit_server: Server) -> None:
    limit_server.client.set(STREAM, "not a stream")
    result = commands.invoke("budget", "set", ACME, "--period", "DAILY", "--tokens", "0")
    assert result.exit_code == 1
    assert isinstance(commands.admit(), Admitted)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--usd", "-5"], "expected an amount in dollars"),
        (["--usd", "1.0000001"], "has more than 6 decimals"),
        (["--usd", "1e3"], "expected an amount in dollars"),
        (["--usd", "$5"], "expected an amount in dollars"),
        (["--usd", "nan"], "expected an amount in dollars"),
        (["--usd", "1000000001"], "must be at most 1000000000"),
        (["--tokens", "1.5"], "expected a whole number"),
        (["--tokens", "-1"], "must be from 0"),
        (["--tokens", "1" + "0" * 16], "must be from 0"),
        ([], "Give --usd, --tokens or both, or --policy."),
        (["--policy", "--tokens", "1"], "without --usd and --tokens"),
        (["--period", "YEARLY", "--usd", "1"], "YEARLY"),
    ],
)
def test_nonsense_sets_nothing(commands: Commands, limit_server: Server, arguments: list[str], says: str) -> None:
    result = commands.invoke("budget", "set", ACME, "--period", "DAILY", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert limit_server.client.keys("*") == []


def test_a_dollar_amount_is_exact(commands: Commands, limit_server: Server) -> None:
    commands.text("budget", "set", ACME, "--period", "DAILY", "--usd", "999999999.999999")
    assert limit_server.client.hgetall("router:{acme}:budgets") == {b"org:DAILY:micro_usd": b"999999999999999"}
    assert "$999,999,999.999999" in commands.text("budget", "show", ACME)


def test_an_organisation_that_has_used_nothing_is_told(commands: Commands) -> None:
    says = "amce has not used anything"
    assert says in commands.text("budget", "show", "amce")
    assert says in commands.text("budget", "set", "amce", "--period", "DAILY", "--usd", "1")


def test_a_store_that_is_down_is_one_clear_line(commands: Commands, tmp_path: Path) -> None:
    store = ("--redis", f"unix://{tmp_path}/none")
    for arguments in (("show", ACME), ("set", ACME, "--period", "DAILY", "--usd", "1")):
        result = commands.invoke("budget", *arguments, *store)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert "cannot be used" in result.stderr
