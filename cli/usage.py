"""``router usage``: sums of usage records, and whether the counts of requests agree. Straight from the ledger."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import click
from rich.markup import escape
from rich.table import Table

from cli.ledger import Ledger, running_ledger
from cli.limit_store import NAME, json_option
from cli.shown import MICRO_PER_USD, asked_moment_s, plain, print_table, usd
from usage.operator_app import RECONCILIATION_PATH, SUMS_PATH

SUMS_TIMEOUT_S: Final = 600.0
KNOWN_WITHIN_S: Final = 30.0
"""After its start the ledger watches Envoy for some seconds before it says that nothing is missing."""
POLL_S: Final = 0.5


@click.group()
def usage() -> None:
    """Sum up what was used, or see whether every request is accounted for."""


@usage.command(short_help="Compare Envoy's count, the ledger's and what was delivered.")
@json_option
def reconcile(as_json: bool) -> None:
    """Compare three counts: requests that Envoy has completed, that the ledger knows, and records delivered.

    Every difference is explained. Exits with 1 when a request is unaccounted for, or nobody can tell.
    """
    with running_ledger() as ledger:
        counts = _known(ledger)
    if as_json:
        click.echo(json.dumps(counts))
    else:
        _print_counts(counts)
    sys.exit(0 if counts["unaccounted"] == 0 else 1)


def _known(ledger: Ledger) -> Mapping[str, Any]:
    end_s = time.monotonic() + KNOWN_WITHIN_S
    while True:
        counts: Mapping[str, Any] = ledger.ask(RECONCILIATION_PATH)
        # Without Envoy's own count there is nothing to wait for.
        if counts["unaccounted"] is not None or counts["completed"] is None or time.monotonic() > end_s:
            return counts
        time.sleep(POLL_S)


def _print_counts(counts: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts["kinds"].items()))
    for name, value in (
        ("completed by this Envoy", counts["completed"]),
        ("of these known to the ledger", counts["known"]),
        ("running", counts["running"]),
        ("records written, ever", counts["records"]),
        ("records delivered, ever", counts["delivered"]),
        ("unaccounted", counts["unaccounted"]),
    ):
        table.add_row(name, "unknown" if value is None else f"{value:,}")
    print_table(table)
    click.echo(f"\nEver told of: {kinds or 'nothing'}.")
    for difference in counts["differences"]:
        number = f"{difference['requests']:,} " if difference["requests"] else ""
        click.echo(f"- {number}{difference['text'].rstrip('.')}.")
    if counts["unaccounted"] == 0:
        click.echo("Every request is accounted for.")


@usage.command(short_help="Sum up records by organisation and model.")
@click.option("--org", "organization_id", type=NAME, help="Only this organisation's.")
@click.option("--since", help="90s, 30m, 12h, 30d or 8w ago, or an ISO 8601 time.  [default: all that is kept]")
@json_option
def show(organization_id: str | None, since: str | None, as_json: bool) -> None:
    """Sum up usage records by organisation and model: requests, tokens, and what they cost to the micro-dollar."""
    since_s = None if since is None else asked_moment_s("--since", since, now_s=time.time())
    with running_ledger() as ledger:
        sums = ledger.ask(
            SUMS_PATH,
            timeout_s=SUMS_TIMEOUT_S,
            organization=organization_id,
            since=None if since_s is None else f"{since_s:.6f}",
        )["sums"]
    if as_json:
        click.echo(json.dumps([one | {"cost_usd": one["cost_micro_usd"] / MICRO_PER_USD} for one in sums]))
        return
    if not sums:
        click.echo("There is no usage record.")
        return
    table = Table(box=None, header_style="bold")
    for heading in ("ORG", "MODEL"):
        table.add_column(heading, overflow="fold")
    for heading in ("REQUESTS", "TOKENS IN", "TOKENS OUT", "COST"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in sums:
        table.add_row(*_cells(one))
    table.add_section()
    total = {name: sum(one[name] for one in sums) for name in _FIGURES}
    table.add_row(*_cells({"organization_id": "", "model": "all", **total}))
    print_table(table)


_FIGURES: Final = ("requests", "tokens_input", "tokens_output", "cost_micro_usd")


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    *numbers, cost = (one[name] for name in _FIGURES)
    who = (escape(plain(one[name])) for name in ("organization_id", "model"))
    return (*who, *(f"{number:,}" for number in numbers), usd(cost))
