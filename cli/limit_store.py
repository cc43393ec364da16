"""The limit store and the limits in force, as the commands that show and change them find them."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import click
import structlog

from cli.embedded import embedded_valkey
from gateway.audit import AuditAction, AuditEvent
from gateway.errors import StoreUnavailable
from gateway.redis_url import redis_url
from gateway.settings import LAST_GOOD_FILE, StoreSettings, read
from gateway.telemetry import Logger
from limits.valkey import ValkeyLimits, open_limits
from policies import scalars
from policies.limits import CallerLimits, LimitIndex
from policies.load import load_or_last_good
from policies.model import KeyId, OrganizationId, Place
from policies.nodes import Cursor, Read, Scalar, Wrong

T = TypeVar("T")

DEADLINE_S: Final = 2.0
"""For one call, and for the connection: an operator may be further away than a worker."""


class Written(click.ParamType[Any]):
    """A value that is read as the policy files' values of its kind are."""

    def __init__(self, name: str, reader: Read[Any], *, quoted: bool = False) -> None:
        self.name = name
        self._reader = reader
        self._quoted = quoted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value; a usage error says what is wrong with it."""
        node = Scalar(text=str(value), quoted=self._quoted, place=Place(file="", line=1))
        try:
            return self._reader(Cursor(node=node, path="", problems=[]))
        except Wrong as wrong:
            self.fail(str(wrong), param, ctx)


NAME: Final = Written("name", scalars.name, quoted=True)

organization_argument = click.argument("organization_id", metavar="ORG", type=NAME)
key_option = click.option("--key", "key_id", type=NAME, help="Id of an API key of the organisation.")
actor_option = click.option("--actor", help="Who the audit trail says it was.  [default: your user name]")
redis_option = click.option(
    "--redis",
    help="host:port, redis://…, rediss://… or unix:///path.  [env: REDIS_ADDR; default: Valkey of `router up`]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def store_address(redis: str | None, settings: StoreSettings) -> str:
    """Where the limit store is.

    Raises:
        click.UsageError: nothing names it, or the address has the wrong form.
    """
    address = redis or settings.redis_addr or embedded_valkey(settings.run_dir)
    if not address:
        raise click.UsageError("Name the limit store: --redis ADDR, or set REDIS_ADDR.")
    try:
        redis_url(address)
    except ValueError as error:
        raise click.UsageError(f"{'--redis' if redis else 'REDIS_ADDR'}: {error}") from None
    return address


def on_store(redis: str | None, act: Callable[[ValkeyLimits], Awaitable[T]]) -> T:
    """Do something with the limit store.

    Raises:
        click.ClickException: there is none, or it does not answer.
    """
    address = store_address(redis, read(StoreSettings))

    async def acting() -> T:
        async with open_limits(address, log=_silent(), deadline_s=DEADLINE_S) as store:
            return await act(store)

    try:
        return asyncio.run(acting())
    except StoreUnavailable as error:
        raise click.ClickException(f"The limit store at {_place(address)} cannot be used: {error}") from None


def limits_in_force() -> LimitIndex:
    """Limits of the policy directory or, with a word about it, of the last good copy.

    Raises:
        PolicyRejected: there is neither.
    """
    settings = read(StoreSettings)
    start = load_or_last_good(settings.policy_dir, settings.backend_endpoints, settings.state_path / LAST_GOOD_FILE)
    if start.problems:
        click.echo("The policy directory has mistakes; these are the limits of the last good policy.", err=True)
    return LimitIndex(start.loaded.policy.limits)


def limits_of(index: LimitIndex, organization_id: OrganizationId, key_id: KeyId | None) -> CallerLimits:
    """Limits of an organisation and, where it is given, of a key."""
    if key_id is not None:
        return index.for_caller(organization_id, key_id)
    return CallerLimits(subjects=(index.for_organization(organization_id),))


def an_event(
    action: AuditAction, organization_id: OrganizationId, *, actor: str | None, metadata: Mapping[str, Any]
) -> AuditEvent:
    """Event of something that an operator does now."""
    return AuditEvent(
        event_id=str(uuid.uuid4()),
        request_id="",
        organization_id=organization_id,
        actor=actor or _user(),
        action=action,
        metadata=metadata,
        created_at=time.time(),
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a user who has no name
        return f"uid {os.getuid()}"


def _place(address: str) -> str:
    """An address without the password that it may hold."""
    parts = urlsplit(redis_url(address))
    return parts.path if parts.scheme == "unix" else parts.netloc.rpartition("@")[2]


def _silent() -> Logger:
    """What there is to say of the store, the command says itself."""
    nothing_is_critical = structlog.make_filtering_bound_logger(logging.CRITICAL)
    return cast(Logger, structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=nothing_is_critical))
