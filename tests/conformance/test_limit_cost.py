"""What a script costs does not grow with what the store holds; tests/live has the same with more of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.limit_cost import (
    GROWTH_MAX,
    growth_with_budgets_set,
    growth_with_open_reservations,
    growth_with_organizations,
)

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("growth", "many"),
    [(growth_with_organizations, 4000), (growth_with_open_reservations, 4000), (growth_with_budgets_set, 20_000)],
    ids=["organisations", "open reservations", "budgets set"],
)
def test_cost_does_not_grow(growth: Callable[[int], tuple[float, float]], many: int) -> None:
    admit, settle = growth(many)
    assert admit < GROWTH_MAX
    assert settle < GROWTH_MAX
