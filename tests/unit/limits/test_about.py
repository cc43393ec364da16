"""What a ledger entry keeps of its request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limits.about import About, read

ABOUTS = st.builds(
    About,
    model=st.text(),
    endpoint=st.text(),
    policy=st.text(),
    prices=st.text(),
    client_request_id=st.text(),
    trace=st.text(),
)


@given(ABOUTS)
def test_what_was_written_is_read(about: About) -> None:
    assert read(about.written()) == about
    assert about.written().isascii()


@given(st.text())
def test_any_other_text_is_a_models_name(text: str) -> None:
    assert read(text) == About(model=text)


@pytest.mark.parametrize(
    "text",
    ["", "gpt-4o", "[", "[]", "[1,2,3,4,5,6]", '["a"]', '{"a":"b"}', "[" * 10_000, '["a","b","c","d","e","f","g"]'],
    ids=["nothing", "a model", "open", "empty", "numbers", "too few", "an object", "too deep", "too many"],
)
def test_json_of_another_form_is_taken_as_it_is(text: str) -> None:
    assert read(text) == About(model=text)
