"""The ledger as commands reach it: by its socket in RUN_DIR, or through Envoy with an API key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import click
import httpx

from cli.preflight import run_path
from gateway import names
from gateway.settings import AUDIT_SOCKET, CommonSettings, read

TIMEOUT_S: Final = 10.0
KEY_VARIABLE: Final = "ROUTER_API_KEY"

url_option = click.option("--url", help="Ask through a router's public listener.  [default: the socket in RUN_DIR]")
key_option = click.option(
    "--key", envvar=KEY_VARIABLE, help=f"API key to ask with, where --url is given.  [env: {KEY_VARIABLE}]"
)


class LedgerAway(Exception):
    """Nobody answers; the text says where."""


class Ledger:
    """Asks questions. ``is_local``: by the socket, where everything may be asked."""

    def __init__(self, client: httpx.Client, place: str, *, is_local: bool) -> None:
        self._client = client
        self._place = place
        self.is_local = is_local

    def ask(self, path: str, *, timeout_s: float = TIMEOUT_S, **parameters: str | int | None) -> Any:
        """The JSON that answers a question; parameters without a value are left out.

        Raises:
            LedgerAway: there is no answer.
            click.ClickException: the answer is an error.
        """
        given = {name: value for name, value in parameters.items() if value is not None}
        try:
            response = self._client.get(path, params=given, timeout=timeout_s)
            body = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise LedgerAway(f"{self._place} does not answer: {error or type(error).__name__}") from error
        if response.is_success:
            return body
        said = body if isinstance(body, Mapping) else {}
        raise click.ClickException(f"{said.get('error', response.status_code)} ({said.get('code', 'no code')})")


@contextmanager
def ledger(url: str | None = None, key: str | None = None) -> Iterator[Ledger]:
    """The ledger while the block runs.

    Raises:
        click.UsageError: a URL without a key.
        LedgerAway: there is no socket.
    """
    if url is not None:
        if not key:
            raise click.UsageError(f"Give the key to ask with: --key KEY, or set {KEY_VARIABLE}.")
        headers = {names.HEADER_AUTHORIZATION: f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
            yield Ledger(client, url, is_local=False)
        return
    socket = run_path(read(CommonSettings).run_dir) / AUDIT_SOCKET
    if not socket.exists():
        raise LedgerAway(f"There is no ledger at {socket}: start the router, or set RUN_DIR")
    transport = httpx.HTTPTransport(uds=str(socket))
    headers = {names.HEADER_ADMIN: "true"}
    with httpx.Client(base_url="http://ledger", headers=headers, transport=transport) as client:
        yield Ledger(client, str(socket), is_local=True)


@contextmanager
def running_ledger(url: str | None = None, key: str | None = None) -> Iterator[Ledger]:
    """As :func:`ledger`, for commands that nobody else can answer.

    Raises:
        click.ClickException: nobody answers.
    """
    try:
        with ledger(url, key) as found:
            yield found
    except LedgerAway as away:
        raise click.ClickException(str(away)) from None
