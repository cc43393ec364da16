"""Audit events as a person reads them: a table where there is room for one, else two lines each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.shown import console, decimal, dollars, plain, second, usd
from gateway.audit import AuditEvent

TABLE_FROM: Final = 140
"""Columns of a terminal in which a table has room for request ids and details beside each other."""
DETAILS_CHARS_MAX: Final = 160
"""A figure of every limit would be a page; JSON has all of it."""
DIGEST_CHARS: Final = 12
_DIGEST: Final = re.compile(r"[0-9a-f]{40,}")
_INDENT: Final = "  "
_HEAD: Final = ("TIME (UTC)", "ACTION", "ORG", "ACTOR")
_MICRO: Final = "micro_usd"
_AMOUNTS: Final = frozenset({"limit", "current_usage", "remaining"})
"""Of a limit whose unit is dollars."""


def print_events(events: Sequence[AuditEvent]) -> None:
    """Print them, as the terminal has room."""
    to = console()
    if to.width >= TABLE_FROM:
        to.print(_table(events))
    else:
        _print_lines(events, to)


def _table(events: Sequence[AuditEvent]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in _HEAD:
        table.add_column(heading, overflow="fold")
    table.add_column("REQUEST", no_wrap=True)
    table.add_column("DETAILS", overflow="fold")
    for event in events:
        cells = (*_who(event), plain(event.request_id) or "-", details(event) or "-")
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _print_lines(events: Sequence[AuditEvent], to: Console) -> None:
    rows = [_who(event) for event in events]
    widths = [max(map(cell_len, column)) for column in zip(_HEAD, *rows, strict=True)]
    to.print(Text(_aligned(_HEAD, widths), style="bold"))
    for row, event in zip(rows, events, strict=True):
        to.print(Text(_aligned(row, widths)))
        more = "  ".join(filter(None, (plain(event.request_id), details(event))))
        if more:
            for line in Text(more).wrap(to, to.width - len(_INDENT), overflow="fold"):
                to.print(Text(_INDENT + line.plain.rstrip()))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def _who(event: AuditEvent) -> tuple[str, ...]:
    # Plain text: what a client sent may hold what steers a terminal.
    who = (plain(text) or "-" for text in (event.organization_id, event.actor))
    return (second(event.created_at), event.action.value, *who)


def details(event: AuditEvent) -> str:
    """What is said of an event, in short: without what is not known, or said beside it."""
    said = {name: value for name, value in event.metadata.items() if value is not None}
    if said.get("trace_id") == event.request_id:
        del said["trace_id"]
    text = " ".join(_named(name, value, "=") for name, value in said.items())
    return plain(text if len(text) <= DETAILS_CHARS_MAX else text[:DETAILS_CHARS_MAX] + "…")


def _named(name: str, value: Any, sign: str, *, is_money: bool = False) -> str:
    if type(value) is int and name.endswith(_MICRO):
        return f"{name.removesuffix(_MICRO).rstrip('_') or 'usd'}{sign}{usd(value)}"
    if type(value) in {int, float} and (is_money or name.endswith("usd")):
        return f"{name}{sign}{dollars(value)}"
    return f"{name}{sign}{_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value[:DIGEST_CHARS] if _DIGEST.fullmatch(value) else value
    if isinstance(value, float):
        return decimal(value)
    if isinstance(value, Mapping):
        amounts = _AMOUNTS if value.get("unit") == "usd" else ()
        return f"{{{','.join(_named(name, each, ':', is_money=name in amounts) for name, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_short, value))}]"
    return json.dumps(value)
