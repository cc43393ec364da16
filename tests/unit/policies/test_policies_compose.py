"""YAML text to marked nodes: what is kept, what is bounded, how broken text is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.compose import compose
from policies.model import Problem
from policies.nodes import Mapping, Node, Scalar, Sequence


def tree(text: str) -> Node:
    node = compose(text, file="f.yaml")
    assert not isinstance(node, Problem), node
    return node


def problem(text: str) -> Problem:
    found = compose(text, file="f.yaml")
    assert isinstance(found, Problem), found
    return found


def plain(node: Node) -> object:
    """Nested tuples and texts of a tree, without places."""
    if isinstance(node, Scalar):
        return node.text
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return [(plain(key), plain(value)) for key, value in node.entries]


def test_scalars_keep_their_text_and_quotes() -> None:
    root = tree("[on, 0.0050, 'x', \"1\", ~]")
    assert isinstance(root, Sequence)
    assert [(item.text, item.quoted, item.kind) for item in root.items if isinstance(item, Scalar)] == [
        ("on", False, "string"),
        ("0.0050", False, "float"),
        ("x", True, "string"),
        ("1", True, "string"),
        ("~", False, "null"),
    ]


def test_nodes_know_their_lines() -> None:
    root = tree("a:\n  - 1\n  -\n    b: 2\n")
    assert isinstance(root, Mapping)
    rows = root.entries[0][1]
    assert isinstance(rows, Sequence)
    assert [item.place.line for item in rows.items] == [2, 4]


def test_duplicate_keys_survive() -> None:
    assert plain(tree("{a: 1, a: 2}")) == [("a", "1"), ("a", "2")]


def test_aliases_are_expanded() -> None:
    assert plain(tree("a: &x [1]\nb: *x\n")) == [("a", ["1"]), ("b", ["1"])]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "--- ~\n"])
def test_empty_text_is_nothing(text: str) -> None:
    root = tree(text)
    assert isinstance(root, Scalar)
    assert root.kind == "null"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("a: 1\nb: [1\nc: 2\n", 3, "YAML:"),
        ("a: 1\n\tb: 2\n", 2, "YAML:"),
        ("a: 1\norganization_id: *\n", 2, 'must be quoted: "*"'),
        ("a: 1\nb: *x\n", 2, "alias *x has no anchor before it"),
        ("a: &x [*x]\n", 1, "alias *x has no anchor before it"),
        ("a: 1\n---\nb: 1\n", 2, "more than one YAML document"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "is not read"),
        ("a: 1\nb: !!int '5'\n", 2, "tag tag:yaml.org,2002:int is not read"),
        ("a: 1\nb: \0\n", 2, "YAML:"),
        ("a: \ud800\n", 1, "YAML:"),
        ("[" * 60 + "]" * 60, 1, "nested deeper than 50"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(text: str, line: int, told: str) -> None:
    found = problem(text)
    assert found.place.line == line
    assert told in found.text


def test_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    assert "aliases expand to more than" in problem("\n".join(lines)).text


@given(st.text(max_size=80))
def test_any_text_is_a_tree_or_a_problem(text: str) -> None:
    found = compose(text, file="f.yaml")
    assert found.place.line >= 1


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#,?~ \n\t%@`", max_size=60))
def test_any_punctuation_is_a_tree_or_a_problem(text: str) -> None:
    found = compose(text, file="f.yaml")
    assert found.place.line >= 1
