"""``router audit explain`` as a person reads it."""

from __future__ import annotations

from typing import Any

import pytest

from cli.derive import Check
from cli.explain import _print
from limits.about import About
from limits.model import Opened
from tests.unit.usage.usage_builders import PRICES, REQUEST_ID
from usage.receipt import running_receipt

DIGEST = "e58529ad3c7d61eb8d3e90aa6a29b6aadd575721d4227af59ff418f00bd5abfb"
OPENED = Opened(
    request_id=REQUEST_ID,
    organization_id="acme",
    key_id="k-1",
    admitted_ms=1_800_000_000_000,
    tokens_input=10,
    tokens_output=100,
    micro_usd=1550,
    about=About(model="gpt-4o", endpoint="chat", policy=DIGEST, prices=PRICES).written(),
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys: pytest.CaptureFixture[str], *made: Check, **changes: Any) -> str:
    """What is printed of a request that runs, but for these changes."""
    _print(running_receipt(OPENED, None) | changes, made)
    return capsys.readouterr().out


@pytest.mark.usefixtures("narrow")
def test_what_is_compared_is_folded_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, Check(figure="policy", told=DIGEST, derived="0" * 64, verdict="differs"))
    assert "…" not in text
    _, _, compared = text.partition("Worked out again")
    columns = [line.split() for line in compared.splitlines()[2:]]
    assert "".join(columns[0][1] + "".join(row[0] for row in columns[1:])) == DIGEST
    assert columns[0][-1] == "differs"


def test_what_is_not_known_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, api_key_id=None, endpoint=None)
    assert "None" not in text
    assert {"state RUNNING", "organisation acme", "asked model gpt-4o"} <= {
        " ".join(line.split()) for line in text.splitlines()
    }


def test_metadata_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, metadata={"team": "[red]x", "env": "\x1b[31m"})
    assert "team=[red]x, env=\\x1b[31m" in text


def test_money_has_no_exponent(capsys: pytest.CaptureFixture[str]) -> None:
    limit = {
        "subject": "organization",
        "unit": "usd",
        "period": "MONTHLY",
        "limit": 0.0001,
        "current_usage": 8e-05,
        "remaining": 2e-05,
        "reset_at": "2030-01-01T00:00:00Z",
        "micro_usd": {"limit": 100, "current_usage": 80, "remaining": 20},
    }
    tokens = {"subject": "organization", "unit": "tokens", "limit": 1_000_000, "current_usage": 5, "remaining": 999_995}
    text = shown(capsys, limits=[limit, tokens])
    assert "e-05" not in text
    assert ["$0.0001", "$0.00008", "$0.00002"] in [line.split()[-3:] for line in text.splitlines()]
    assert ["1,000,000", "5", "999,995"] in [line.split()[-3:] for line in text.splitlines()]
