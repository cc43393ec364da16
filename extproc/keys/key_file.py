"""The key file's text, parsed and checked: YAML, or JSON, which is YAML too.

.. code-block:: yaml

    keys:
      - id: key-3f9a1c20
        organization_id: acme
        digest: <hex SHA-256 of the whole key>
        scopes: [inference]
        status: active          # or revoked
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from extproc.keys.record import KeyRecord, RecordInvalid, fields_of, record_from
from policies.model import Place, Problem

HEADER = "# API keys, stored as SHA-256 digests. `router keys` rewrites this file: comments do not stay.\n"

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there


class KeyFileInvalid(Exception):
    """A key file that cannot be used; ``problems`` point at lines."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


def parse_key_file(text: str, *, file: str) -> tuple[KeyRecord, ...]:
    """Records of a key file, in its order. ``file`` is only for messages.

    Raises:
        KeyFileInvalid: lists every problem found.
    """
    node, data = _read(text, file)
    if not isinstance(data, dict) or set(data) != {"keys"} or not isinstance(data["keys"], list):
        raise KeyFileInvalid([_problem(file, node, "", "must have exactly one field, 'keys', a list of key records")])
    problems = [_problem(file, key, "", f"field '{key.value}' appears twice") for key in _repeated(node)]
    records: list[KeyRecord] = []
    seen: set[str] = set()
    items = next(value for key, value in node.value if key.value == "keys")
    for index, (item_node, item) in enumerate(zip(items.value, data["keys"], strict=True)):
        path = f"keys[{index}]"
        try:
            record = record_from(item)
        except RecordInvalid as error:
            problems += [_problem(file, _at(item_node, loc), _join(path, loc), what) for loc, what in error.problems]
            continue
        for name, value in (("id", record.id), ("digest", record.digest)):
            if f"{name} {value}" in seen:
                problems.append(_problem(file, _at(item_node, (name,)), f"{path}.{name}", "is used by an earlier key"))
            seen.add(f"{name} {value}")
        records.append(record)
    if problems:
        raise KeyFileInvalid(sorted(problems, key=lambda problem: problem.place.line))
    return tuple(records)


def format_key_file(records: Sequence[KeyRecord]) -> str:
    """Text of a key file with these records."""
    body = yaml.safe_dump({"keys": [fields_of(record) for record in records]}, sort_keys=False, width=120)
    return HEADER + body


def _read(text: str, file: str) -> tuple[Any, Any]:
    """The file's tree with line numbers, and its value."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise KeyFileInvalid([_problem(file, None, "", "is empty; a file without keys says 'keys: []'")])
            return node, loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file=file, line=mark.line + 1 if mark else 1)
        raise KeyFileInvalid([Problem(place=place, text=f"is not YAML: {error.problem}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise KeyFileInvalid([_problem(file, None, "", f"is not YAML: {type(error).__name__}")]) from None


def _repeated(node: Any) -> Iterator[Any]:
    """Key nodes that repeat an earlier one of their mapping, of which YAML would silently keep the last."""
    pending, visited = [node], set()
    while pending:
        current = pending.pop()
        if id(current) in visited or isinstance(current, yaml.ScalarNode):
            continue
        visited.add(id(current))
        if isinstance(current, yaml.MappingNode):
            names: set[object] = set()
            for key, value in current.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in names:
                        yield key
                    names.add(key.value)
                pending.append(value)
        else:
            pending.extend(current.value)


def _at(node: Any, loc: tuple[str | int, ...]) -> Any:
    """The deepest node that a path leads to."""
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            found = [value for key, value in node.value if key.value == step]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            found = node.value[step : step + 1]
        else:
            found = []
        if not found:
            break
        node = found[-1]
    return node


def _join(path: str, loc: tuple[str | int, ...]) -> str:
    return path + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)


def _problem(file: str, node: Any, path: str, text: str) -> Problem:
    line = 1 if node is None else node.start_mark.line + 1
    return Problem(place=Place(file=file, line=line, path=path), text=text)
