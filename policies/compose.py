"""YAML text to marked nodes, bounded in depth and in what aliases expand to.

PyYAML's events are read, not its values, so that scalars keep their text and duplicate keys survive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import yaml

from policies.model import Place, Problem
from policies.nodes import Mapping, Node, Scalar, Sequence

DEPTH_MAX: Final = 50
ALIASED_NODES_MAX: Final = 100_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STRING_TAGS = (None, "!", "tag:yaml.org,2002:str")


class _Unreadable(Exception):
    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def compose(text: str, *, file: str) -> Node | Problem:
    """Root node of a file's one document, an empty scalar where there is none; or why it cannot be read."""
    try:
        return _Composer(yaml.parse(text, Loader=_LOADER), file).document()
    except _Unreadable as error:
        line, what = error.line, str(error)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = f"YAML: {error.problem or error.context}"
        if error.context and "alias" in error.context:
            what += '; a bare * must be quoted: "*"'
    except (yaml.YAMLError, UnicodeError) as error:
        line, what = _line_of_unprintable(text), f"YAML: {str(error).splitlines()[0]}"
    return Problem(place=Place(file=file, line=line), text=what)


def _line_of_unprintable(text: str) -> int:
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    return text.count("\n", 0, found.start()) + 1 if found else 1


class _Composer:
    """One pass over the events of a text."""

    __slots__ = ("_aliased", "_anchors", "_events", "_file", "_sizes")

    def __init__(self, events: Iterator[Any], file: str) -> None:
        self._events = events
        self._file = file
        self._anchors: dict[str, Node] = {}
        self._sizes: dict[str, int] = {}
        self._aliased = 0

    def document(self) -> Node:
        """The one document."""
        root: Node | None = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise _Unreadable(_line(event), "holds more than one YAML document")
                root, _ = self._node(next(self._events), depth=0)
        return root or Scalar(text="", place=Place(file=self._file, line=1))

    def _node(self, event: Any, depth: int) -> tuple[Node, int]:
        """Node that begins with an event, and how many nodes it is with aliases expanded."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if depth > DEPTH_MAX:
            raise _Unreadable(_line(event), f"is nested deeper than {DEPTH_MAX} levels")
        place = Place(file=self._file, line=_line(event))
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            quoted = bool(event.style) or event.tag is not None
            if event.tag not in _STRING_TAGS:
                raise _Unreadable(place.line, f"tag {event.tag} is not read")
            node, size = Scalar(text=event.value, quoted=quoted, place=place), 1
        else:
            if event.tag not in {None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}:
                raise _Unreadable(place.line, f"tag {event.tag} is not read")
            items, size = self._items(depth)
            if isinstance(event, yaml.SequenceStartEvent):
                node = Sequence(items=items, place=place)
            else:
                node = Mapping(entries=tuple(zip(items[::2], items[1::2], strict=True)), place=place)
        if event.anchor is not None:
            self._anchors[event.anchor], self._sizes[event.anchor] = node, size
        return node, size

    def _items(self, depth: int) -> tuple[tuple[Node, ...], int]:
        """Nodes until the end of the collection; of a mapping, keys and values by turns."""
        items: list[Node] = []
        size = 1
        for event in self._events:
            if isinstance(event, yaml.CollectionEndEvent):
                break
            node, node_size = self._node(event, depth + 1)
            items.append(node)
            size += node_size
        return tuple(items), size

    def _alias(self, event: Any) -> tuple[Node, int]:
        node = self._anchors.get(event.anchor)
        if node is None:
            raise _Unreadable(_line(event), f"alias *{event.anchor} has no anchor before it")
        size = self._sizes[event.anchor]
        self._aliased += size
        if self._aliased > ALIASED_NODES_MAX:
            raise _Unreadable(_line(event), f"aliases expand to more than {ALIASED_NODES_MAX} nodes")
        return node, size


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
