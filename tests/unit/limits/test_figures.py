"""Figures of limits as text: exactly what they were, whatever their subjects hold."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from limits.figures import read, written
from limits.model import Figure, LimitKind

NUMBERS = st.integers(-(10**15), 10**15)
FIGURES = st.builds(Figure, st.sampled_from(LimitKind), st.text(), NUMBERS, NUMBERS, NUMBERS)


@given(st.lists(FIGURES, max_size=6))
@example([Figure(LimitKind.TOKENS, "key/%3B;% 1 2", 1, -5, 0), Figure(LimitKind.PARALLEL, "", 1, 1, 0)])
def test_figures_that_were_written_are_read(figures: list[Figure]) -> None:
    assert read(written(figures)) == tuple(figures)


def test_figures_are_one_line_that_people_can_read() -> None:
    figures = (Figure(LimitKind.REQUESTS, "org", 100, 99, 10), Figure(LimitKind.MONTHLY_MICRO_USD, "key/a", 5, -1, 9))
    assert written(figures) == "1 org 100 99 10;6 key/a 5 -1 9"
    assert written(()) == ""


@pytest.mark.parametrize("text", ["1", "1 org 1 2", "9 org 1 2 3", "x org 1 2 3", "1 org 1 2 x", "1 org 1 2 3;", ";"])
def test_line_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whichever of its parts says so
        read(text)
