"""Marked nodes, the tree that a policy file is read as, and strict access to them. Pure.

Scalars keep the text that was written, so that prices stay exact and ``no`` can be a model's name.
A reader of one value raises :class:`Wrong`; whoever reads a field or an item turns that into a problem and
goes on.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias, TypeVar

from policies.model import Place, Problem

T = TypeVar("T")

ScalarKind = Literal["null", "bool", "int", "float", "string"]

_SHOWN_CHARS_MAX = 60
_SUGGESTION_OPTIONS_MAX = 1_000
_PLAIN_STEP = re.compile(r"[A-Za-z0-9_-]+")
_STEP = re.compile(r'\[(\d+)\]|\["((?:[^"\\]|\\.)*)"\]|\.?([A-Za-z0-9_-]+)')
_KINDS: tuple[tuple[ScalarKind, re.Pattern[str]], ...] = (
    ("null", re.compile(r"|~|null|Null|NULL")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+")),
    ("float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")),
)


class Wrong(Exception):
    """What is wrong with the one node that was being read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """One scalar as written; ``quoted`` ones are strings whatever they look like."""

    text: str
    quoted: bool = False
    place: Place

    @property
    def kind(self) -> ScalarKind:
        """Type by the core schema of YAML 1.2, where ``yes`` and ``on`` are strings."""
        if not self.quoted:
            for kind, pattern in _KINDS:
                if pattern.fullmatch(self.text):
                    return kind
        return "string"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A list."""

    items: tuple[Node, ...]
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """Keys and values in the order written; a key written twice is here twice."""

    entries: tuple[tuple[Node, Node], ...]
    place: Place


Node: TypeAlias = Scalar | Sequence | Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A node on its way to becoming a value: its path, and where its problems go."""

    node: Node
    path: str
    problems: list[Problem]

    @property
    def place(self) -> Place:
        """File, line and path of the node."""
        return Place(file=self.node.place.file, line=self.node.place.line, path=self.path)

    def fail(self, text: str) -> None:
        """Add a problem with this node."""
        self.problems.append(Problem(place=self.place, text=text))

    def to(self, name: str, node: Node) -> Cursor:
        """Cursor at a mapping's value."""
        return Cursor(node=node, path=_join(self.path, name), problems=self.problems)


Read: TypeAlias = Callable[[Cursor], T]
"""Turns a node into a value or raises :class:`Wrong`; adds problems with what is inside the node."""


class Fields:
    """A mapping with a closed set of fields."""

    __slots__ = ("_at", "_values")

    def __init__(self, at: Cursor, values: dict[str, Cursor]) -> None:
        self._at = at
        self._values = values

    def at(self, name: str) -> Cursor | None:
        """Cursor at a field's value; None where it is absent."""
        return self._values.get(name)

    def get(self, name: str, read: Read[T], default: T) -> T:
        """Value of a field; the default where it is absent or wrong."""
        at = self._values.get(name)
        return default if at is None else attempt(at, read, default)

    def need(self, name: str, read: Read[T], stand_in: T) -> T:
        """Value of a field that must be there; the stand-in, and a problem, where it is not."""
        if name not in self._values:
            self._at.fail(f"field '{name}' is missing")
        return self.get(name, read, stand_in)


def attempt(at: Cursor, read: Read[T], default: T) -> T:
    """Value of a node; the default, and a problem, where it is wrong."""
    try:
        return read(at)
    except Wrong as wrong:
        at.fail(str(wrong))
        return default


def fields_of(at: Cursor, known: frozenset[str]) -> Fields:
    """Fields of a mapping; every unknown one is a problem.

    Raises:
        Wrong: it is no mapping.
    """
    values = pairs(at)
    for name, value in values.items():
        if name == "<<" and name not in known:
            value.fail("merge keys are not read; repeat the fields")
        elif name not in known:
            value.fail(f"unknown field{suggestion(name, known)}")
    return Fields(at, values)


def pairs(at: Cursor) -> dict[str, Cursor]:
    """Values of a mapping by key, the first of each key.

    Raises:
        Wrong: it is no mapping.
    """
    if not isinstance(at.node, Mapping):
        raise Wrong(f"expected a mapping, got {describe(at.node)}")
    values: dict[str, Cursor] = {}
    for key, value in at.node.entries:
        if not isinstance(key, Scalar):
            Cursor(node=key, path=at.path, problems=at.problems).fail(f"expected a key, got {describe(key)}")
        elif key.text in values:
            at.to(key.text, key).fail(f"duplicate key, first in line {values[key.text].node.place.line}")
        else:
            values[key.text] = at.to(key.text, value)
    return values


def each(read: Read[T | None]) -> Read[tuple[T, ...]]:
    """Reader of a list whose items are read by ``read``; items that are wrong or None are left out."""

    def read_each(at: Cursor) -> tuple[T, ...]:
        if not isinstance(at.node, Sequence):
            raise Wrong(f"expected a list, got {describe(at.node)}")
        values = (
            attempt(Cursor(node=item, path=f"{at.path}[{i}]", problems=at.problems), read, None)
            for i, item in enumerate(at.node.items)
        )
        return tuple(value for value in values if value is not None)

    return read_each


def keyed(read_key: Read[str | None], read: Read[T | None]) -> Read[tuple[tuple[str, T], ...]]:
    """Reader of a mapping with keys of the writer's choice: pairs sorted by key; wrong ones are left out."""

    def read_keyed(at: Cursor) -> tuple[tuple[str, T], ...]:
        found: list[tuple[str, T]] = []
        for written, value_at in pairs(at).items():
            key_node = Scalar(text=written, quoted=True, place=value_at.node.place)
            key = attempt(replace(value_at, node=key_node), read_key, None)
            value = attempt(value_at, read, None)
            if key is not None and value is not None:
                found.append((key, value))
        return tuple(sorted(found, key=lambda pair: pair[0]))

    return read_keyed


def is_null(node: Node) -> bool:
    """Whether nothing was written."""
    return isinstance(node, Scalar) and node.kind == "null"


def describe(node: Node, *, show: bool = False) -> str:
    """What a node is, for a message. Its text only where asked for: it may be a misplaced credential."""
    if isinstance(node, Sequence):
        return "a list"
    if isinstance(node, Mapping):
        return "a mapping"
    if is_null(node):
        return "nothing"
    if not show:
        return "a scalar"
    return f"the string {shown(node.text)}" if node.quoted else shown(node.text)


def shown(text: str) -> str:
    """Text in quotes, cut to a length that fits a message."""
    return repr(text if len(text) <= _SHOWN_CHARS_MAX else text[:_SHOWN_CHARS_MAX] + "…")


@lru_cache(maxsize=1024)
def suggestion(name: str, options: frozenset[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no option is close."""
    if len(options) > _SUGGESTION_OPTIONS_MAX or len(name) > _SHOWN_CHARS_MAX:
        return ""
    close = difflib.get_close_matches(name, sorted(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def line_of(root: Node, path: str) -> int | None:
    """Line of the node at a path such as ``models[2].backends``, or of its nearest parent that exists."""
    node, line = root, None
    for name in _steps(path):
        found = _child(node, name)
        if found is None:
            break
        node, line = found, found.place.line
    return line


def _steps(path: str) -> Iterator[int | str]:
    for index, quoted, name in _STEP.findall(path):
        if index:
            yield int(index)
        else:
            yield name or json.loads(f'"{quoted}"')


def _child(node: Node, step: int | str) -> Node | None:
    if isinstance(step, int):
        return node.items[step] if isinstance(node, Sequence) and step < len(node.items) else None
    if isinstance(node, Mapping):
        return next((value for key, value in node.entries if isinstance(key, Scalar) and key.text == step), None)
    return None


def _join(path: str, name: str) -> str:
    if not _PLAIN_STEP.fullmatch(name):
        return f"{path}[{json.dumps(name)}]"
    return f"{path}.{name}" if path else name
