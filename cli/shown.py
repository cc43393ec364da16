"""How amounts, times and tables look to a person; the spans of time that a person may write."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

import click
from rich.console import Console
from rich.table import Table

MICRO_PER_USD: Final = 1_000_000
WIDTH_MAX: Final = 200
_SPAN: Final = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SECOND_MS: Final = 1000


def span_s(text: str) -> int | None:
    """Seconds of ``90s``, ``30m``, ``12h``, ``30d`` or ``8w``; None where it is none of these."""
    match = _SPAN.fullmatch(text)
    return int(match[1]) * _UNIT_S[match[2]] if match else None


def moment_s(text: str) -> float | None:
    """Unix seconds of an ISO 8601 time, UTC unless it says otherwise; None where it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def asked_moment_s(option: str, text: str, *, now_s: float) -> float:
    """Unix seconds of what an option says: a time, or how long ago.

    Raises:
        click.UsageError: it is neither.
    """
    span = span_s(text)
    at = moment_s(text) if span is None else now_s - span
    if at is None:
        form = "90s, 30m, 12h, 30d or 8w, or an ISO 8601 time such as 2030-01-31T12:00:00Z"
        raise click.UsageError(f"{option} is {form}.")
    return at


def iso(at_s: float) -> str:
    """Unix seconds as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def second(at_s: float) -> str:
    """Unix seconds as date and time in UTC, for columns that say that it is UTC."""
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S}"


def duration(ms: int) -> str:
    """The two largest units of a duration, rounded up: ``250ms``, ``42s``, ``2m30s``, ``3h5m``, ``6d4h``."""
    if ms < _SECOND_MS:
        return f"{ms}ms"
    seconds = -(-ms // _SECOND_MS)
    for large, large_s, small, small_s in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        rounded_s = -(-seconds // small_s) * small_s
        if rounded_s >= large_s:
            rest = rounded_s % large_s // small_s
            return f"{rounded_s // large_s}{large}" + (f"{rest}{small}" if rest else "")
    return f"{seconds}s"


def usd(micro_usd: int) -> str:
    """Dollars, exact, with at least two decimals: ``$1,234.50``, ``$0.000013``, ``-$2.00``."""
    whole, micro = divmod(abs(micro_usd), MICRO_PER_USD)
    decimals = f"{micro:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if micro_usd < 0 else ''}${whole:,}.{decimals}"


def dollars(amount: float) -> str:
    """Dollars of a number that JSON had, as :func:`usd` shows them; exact also where they are no micro-dollars."""
    micro_usd = round(amount * MICRO_PER_USD)
    return usd(micro_usd) if micro_usd / MICRO_PER_USD == amount else f"${decimal(amount)}"


def decimal(number: float) -> str:
    """A number without an exponent: ``0.00008``."""
    return f"{Decimal(str(number)):f}"


def plain(text: str) -> str:
    """Text that cannot steer a terminal: what is not printable is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def console() -> Console:
    """As wide as the terminal; where there is none, wide enough that lines stay lines."""
    width = None if "COLUMNS" in os.environ or Console().is_terminal else WIDTH_MAX
    return Console(width=width, highlight=False)


def print_table(table: Table) -> None:
    """Print a table to the :func:`console`."""
    console().print(table)
