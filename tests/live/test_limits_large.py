"""The limit store with very much in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.limit_cost import GROWTH_MAX, growth_with_open_reservations, growth_with_organizations

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    "growth", [growth_with_organizations, growth_with_open_reservations], ids=["organisations", "open reservations"]
)
def test_cost_does_not_grow_up_to_a_hundred_thousand(growth: Callable[[int], tuple[float, float]]) -> None:
    admit, settle = growth(100_000)
    assert admit < GROWTH_MAX
    assert settle < GROWTH_MAX
