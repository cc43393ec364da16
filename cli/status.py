"""``router status``: what readiness says of a running router."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, Final

import click
import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.endpoints import READYZ_PATH

TIMEOUT_S: Final = 5.0
_COLOURS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("up", "healthy", "ready"), "green"),
    **dict.fromkeys(("degraded", "not_configured", "unknown"), "yellow"),
    **dict.fromkeys(("down", "ejected", "unhealthy", "killed", "not_ready"), "red"),
}


def _coloured(status: str) -> str:
    return f"[{_COLOURS.get(status, 'white')}]{escape(status)}[/]"


def _table(body: Mapping[str, Any]) -> Table:
    table = Table("component", "status", "detail", title=f"{body['service']} {body['version']}", title_justify="left")
    for name, component in body["components"].items():
        detail = ", ".join(
            f"{key}={value}" for key, value in component.items() if key != "status" and value not in ("", [])
        )
        table.add_row(name, _coloured(component["status"]), escape(detail))
    for backend in body["backends"]["items"]:
        table.add_row(f"backend {backend['id']}", _coloured(backend["status"]), "")
    return table


@click.command()
@click.option("--url", default=None, help="The public listener.  [default: http://127.0.0.1:$HTTP_PORT]")
@click.option("--json", "as_json", is_flag=True, help="The answer as it came.")
@click.option("--http-port", envvar="HTTP_PORT", default=8080, hidden=True)
def status(url: str | None, as_json: bool, http_port: int) -> None:
    """Show whether the router can serve, and how each part of it is. Exits with 1 when it is not ready."""
    base = url or f"http://127.0.0.1:{http_port}"
    try:
        response = httpx.get(f"{base}{READYZ_PATH}", timeout=TIMEOUT_S, trust_env=False)
        body = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise click.ClickException(f"{base} does not answer: {error or type(error).__name__}") from error
    if as_json:
        click.echo(json.dumps(body))
    elif "components" in body:
        console = Console()
        console.print(_table(body))
        console.print(
            f"{_coloured(body['status'])}, {body['backends']['ready']} of {body['backends']['total']} backends ready"
        )
    else:
        raise click.ClickException(f"not ready: {body.get('error')}")
    sys.exit(0 if response.is_success else 1)
