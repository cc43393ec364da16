"""``router audit explain``: what happened to a request, each figure worked out again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import quote

import click
from rich.markup import escape
from rich.table import Table

from cli.derive import Check, checks
from cli.ledger import Ledger, key_option, running_ledger, url_option
from cli.limit_store import json_option
from cli.shown import plain, print_table, usd
from gateway.endpoints import AUDIT_PATH
from policies.load import PolicyRejected
from policies.model import Policy
from usage.operator_app import POLICIES_PATH
from usage.policies import read_policy

_VERDICTS: Final = {"agrees": "[green]agrees[/]", "differs": "[red]differs[/]", "unknown": "[yellow]not checked[/]"}


@click.command(short_help="Show what happened to a request, and work it out again.")
@click.argument("request_id", metavar="ID")
@url_option
@key_option
@json_option
def explain(request_id: str, url: str | None, key: str | None, as_json: bool) -> None:
    """Show what happened to the request with this x-request-id, or the client's own id of /v1/inference.

    Candidates, decision and price are worked out again from the policy of then and the usage; exits with 1 when a
    figure is not what was written down. Through --url the policy is not told, and what follows from it not checked.
    """
    with running_ledger(url, key) as found:
        receipt = found.ask(f"{AUDIT_PATH}/{quote(request_id, safe='')}")
        policy, why_not = _policy_of(found, receipt)
    made = checks(receipt, policy, why_not=why_not)
    differs = any(check.verdict == "differs" for check in made)
    if as_json:
        shown = {"agrees": not differs, "checks": [asdict(check) for check in made], "receipt": receipt}
        click.echo(json.dumps(shown))
    else:
        _print(receipt, made)
    sys.exit(1 if differs else 0)


def _policy_of(found: Ledger, receipt: Mapping[str, Any]) -> tuple[Policy | None, str]:
    """The policy that a request was decided by, or why there is none."""
    digest = receipt["policy_version"]
    if digest is None:
        return None, "no policy was asked"
    if not found.is_local:
        return None, "the policy is told by the ledger's socket alone"
    try:
        return read_policy(json.dumps(found.ask(f"{POLICIES_PATH}/{digest}"))).policy, ""
    except PolicyRejected:
        return None, "this version does not accept the policy of then"
    except click.ClickException as error:
        return None, error.message


def _print(receipt: Mapping[str, Any], made: Sequence[Check]) -> None:
    print_table(_grid(_head(receipt)))
    for title, table in (
        ("Candidates", _rows(receipt["candidates"] or (), ("backend_id", "weight", "standing"))),
        ("Attempts", _rows(receipt["attempts"], ("backend_id", "outcome", "status", "flags", "duration_ms"))),
        (
            "Limits",
            _rows(
                map(_limit, receipt["limits"]),
                ("subject", "unit", "period", "window", "limit", "current_usage", "remaining"),
            ),
        ),
        ("Events", _rows(receipt["events"], ("created_at", "action", "actor", "event_id"))),
    ):
        if table.row_count:
            click.echo(f"\n{title}")
            print_table(table)
    click.echo("\nWorked out again")
    table = Table(box=None, header_style="bold")
    table.add_column("FIGURE", overflow="fold")
    # What is compared is shown whole, over several lines where there is no room.
    table.add_column("WRITTEN DOWN", overflow="fold")
    table.add_column("WORKED OUT", overflow="fold")
    table.add_column("", no_wrap=True)
    for check in made:
        table.add_row(check.figure, _cell(check.told), _cell(check.derived), _VERDICTS[check.verdict])
    print_table(table)


def _head(receipt: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    decision, usage, price = receipt["decision"], receipt["usage"], receipt["price"]
    yield "request", receipt["request_id"]
    yield "client's id", receipt["client_request_id"]
    yield "organisation", _joined(("", receipt["organization_id"]), ("key ", receipt["api_key_id"]))
    yield "asked", _joined(("", receipt["endpoint"]), ("model ", receipt["model"]))
    yield "time", f"{receipt['timestamps']['started']} to {receipt['timestamps']['ended'] or '?'}"
    yield "state", _joined(("", receipt["state"]), ("status ", receipt["status"]))
    yield "decision", _joined(("", decision["what"]), ("", decision["reason"]), ("", decision["limit_state"]))
    yield "policy", receipt["policy_version"]
    yield "metadata", _joined(*((f"{name}=", value) for name, value in (receipt["metadata"] or {}).items()))
    if usage is not None:
        yield (
            "usage",
            (
                f"{usage['tokens_input']:,} in ({usage['tokens_input_cached']:,} cached),"
                f" {usage['tokens_output']:,} out ({usage['tokens_output_reasoning']:,} reasoning),"
                f" counted by: {usage['source'] or 'nobody, nothing was used'}"
            ),
        )
        yield "cost", usd(receipt["cost_micro_usd"]) + (f", prices {price['price_version']}" if price else "")
    yield "settlement", receipt["settlement"]["state"]
    yield "delivery", receipt["delivery"]["state"]
    yield "trace", receipt["trace_id"]


def _joined(*parts: tuple[str, Any]) -> str | None:
    """What is known of these, each after its word; None where nothing is."""
    return ", ".join(f"{word}{value}" for word, value in parts if value is not None) or None


def _limit(limit: Mapping[str, Any]) -> Mapping[str, Any]:
    """A limit, with its figures as a person reads them."""
    exact = limit.get("micro_usd")
    names = ("limit", "current_usage", "remaining")
    return {**limit, **{name: f"{limit[name]:,}" if exact is None else usd(exact[name]) for name in names}}


def _grid(pairs: Iterable[tuple[str, Any]]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None:
            table.add_row(name, _cell(value))
    return table


def _rows(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in names:
        table.add_column(name.upper().replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


def _cell(value: Any) -> str:
    """Plain text: what a client sent may hold what steers a terminal, or looks like the table's own markup."""
    if value is None or value == []:
        return "-"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return escape(plain(text))
