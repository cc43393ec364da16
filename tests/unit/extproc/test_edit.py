"""Edits of a body: they change what they are meant to change, and not one character more."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.edit import Edit, edited, in_order, place_after, setting
from extproc.json_body import Document, places
from tests.unit.extproc.json_texts import NAMES, OBJECTS, RANDOMS, VALUES, text_of

PLAIN = st.sampled_from(["max_tokens", "max_completion_tokens", "stream_options", "n"])
MEMBERS = st.dictionaries(NAMES | PLAIN, VALUES, min_size=1, max_size=6)


def document(members: dict[str, Any], random: Random) -> Document:
    return Document(text=text_of(members, random), members=members)


@given(MEMBERS, st.dictionaries(PLAIN, VALUES, max_size=4), RANDOMS)
def test_edits_set_exactly_the_members_meant(members: dict[str, Any], wanted: dict[str, Any], random: Random) -> None:
    body = document(members, random)
    edits = in_order(setting(body, name, json.dumps(value)) for name, value in wanted.items())
    text = edited(body.text, edits)
    assert json.loads(text) == members | wanted
    before, after = places(body.text), places(text)
    longer = 0
    for name, (start, end) in after.items():
        if name not in wanted:
            assert text[start:end] == body.raw(name)
        elif name in before:
            longer += end - start - len(body.raw(name))
        else:
            longer += end - start + len(f'"{name}":,')
    assert len(text) == len(body.text) + longer


@given(MEMBERS, OBJECTS, st.dictionaries(PLAIN, VALUES, max_size=4), RANDOMS)
def test_members_are_found_where_edits_have_moved_them(
    members: dict[str, Any], more: dict[str, Any], wanted: dict[str, Any], random: Random
) -> None:
    body = document(members | more, random)
    edits = in_order(setting(body, name, json.dumps(value)) for name, value in wanted.items())
    after = places(edited(body.text, edits))
    for name, place in places(body.text).items():
        if name not in wanted:
            assert place_after(edits, place) == after[name]


@given(st.text(), st.data())
def test_edits_are_the_same_one_by_one_from_the_end(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pairs = zip(cuts[::2], cuts[1::2], strict=False)
    edits = [Edit(start, end, data.draw(st.text(max_size=3))) for start, end in pairs]
    expected = text
    for edit in reversed(edits):
        expected = expected[: edit.start] + edit.replacement + expected[edit.end :]
    ordered = in_order(data.draw(st.permutations(edits)) if len(set(cuts)) == len(cuts) else edits)
    assert edited(text, ordered) == expected
    assert len(expected) - len(text) == sum(edit.moved for edit in edits)


def test_insertions_at_one_place_keep_their_order() -> None:
    assert edited("{}", in_order([Edit(1, 1, "a"), Edit(1, 1, "b"), Edit(0, 1, "[")])) == "[ab}"


@pytest.mark.parametrize("other", [Edit(0, 3, ""), Edit(2, 3, ""), Edit(2, 2, ""), Edit(1, 3, "")])
def test_edits_that_overlap_are_refused(other: Edit) -> None:
    with pytest.raises(ValueError, match="overlap"):
        in_order([Edit(1, 3, ""), other])


@pytest.mark.parametrize("other", [Edit(0, 1, ""), Edit(1, 1, ""), Edit(3, 3, ""), Edit(3, 4, "")])
def test_edits_that_touch_do_not_overlap(other: Edit) -> None:
    assert set(in_order([Edit(1, 3, ""), other])) == {Edit(1, 3, ""), other}
