"""Organisations that run into limits, each into one. Their keys are ``dev-<organisation>-<name>``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

LIMITS: Final[Mapping[str, Mapping[str, Any]]] = {
    "hurried": {"requests_per_second": 1, "burst": 1},
    "wordy": {"tokens_per_minute": 1},
    "crowded": {"max_parallel": 1},
    "broke": {"budgets": [{"period": "DAILY", "usd": 0.0001}]},
    "rationed": {"budgets": [{"period": "MONTHLY", "tokens": 1}]},
    "counted": {"requests_per_second": 500, "burst": 10_000, "tokens_per_minute": 100_000_000},
    "half_counted": {"requests_per_second": 500, "burst": 10_000},
    "strict": {"budgets": [{"period": "MONTHLY", "usd": 1_000_000}]},
}
"""The last three never deny: the first of them has rates, the second one rate, the third a budget."""
OWN_BUDGET: Final[Mapping[str, Any]] = {"budgets": [{"period": "DAILY", "tokens": 1}]}
"""Of one key; its organisation has no limit."""
BARRED: Final[Mapping[str, str]] = {"barred": "USD", "barred_by_tokens": "TOKENS"}
"""Organisations to which the budget service allows nothing, and the type of quota that it names."""
UNASKED: Final = "unasked"
"""Organisation of which the budget service says nothing at all: it fails."""


def key_of(organization: str) -> str:
    """A key of an organisation."""
    return f"dev-{organization}-alice"
