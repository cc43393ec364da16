"""``router keys``: create, list and revoke API keys, in the key file and in Redis."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.markup import escape
from rich.table import Table

from cli.key_stores import active, add_everywhere, check_is_new, registers, revoke_everywhere
from cli.key_trail import tell
from cli.limit_store import actor_option
from cli.shown import iso, moment_s, print_table, span_s
from extproc.keys.record import KeyRecord, RecordInvalid, digest, fields_of, record_from
from extproc.keys.register import RegisterError
from gateway.audit import AuditAction
from policies.model import KeyId, OrganizationId

KEY_PREFIX: Final = "rk-"
SIGNING_PREFIX: Final = "rs-"
SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key just made. ``key`` and ``signing_secret`` are shown once: the first is stored nowhere."""

    key: str
    record: KeyRecord


def new_key(fields: dict[str, Any], *, signing: bool) -> NewKey:
    """A key of 256 random bits with these record fields.

    Raises:
        click.UsageError: a field cannot be stored.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    secret = SIGNING_PREFIX + secrets.token_urlsafe(SECRET_BYTES) if signing else None
    try:
        return NewKey(key=key, record=record_from({**fields, "digest": digest(key), "signing_secret": secret}))
    except RecordInvalid as error:
        raise click.UsageError(str(error)) from None


def expiry(expires_in: str | None, expires_at: str | None, *, now: float) -> float | None:
    """Unix seconds at which a key ends, from ``30d`` or an ISO 8601 time (UTC unless it says otherwise).

    Raises:
        click.UsageError: both are given, one cannot be read, or the time has passed.
    """
    if expires_in and expires_at:
        raise click.UsageError("Give --expires-in or --expires-at, not both.")
    if expires_in:
        span = span_s(expires_in)
        if span is None:
            raise click.UsageError("--expires-in is a number and a unit: 90s, 30m, 12h, 30d or 8w.")
        return float(int(now) + span)
    if not expires_at:
        return None
    at = moment_s(expires_at)
    if at is None:
        raise click.UsageError("--expires-at is an ISO 8601 time, such as 2030-01-31T12:00:00Z.")
    if at <= now:
        raise click.UsageError("--expires-at has passed already.")
    return at


def shown(record: KeyRecord, *, store: str, now: float) -> dict[str, Any]:
    """A record as ``list`` shows it: no secret, and no more of the digest than tells two apart."""
    hidden = {"digest", "signing_secret", "expires_at"}
    ended = record.status == "active" and record.expires_at is not None and record.expires_at <= now
    return {
        **{name: value for name, value in fields_of(record).items() if name not in hidden},
        "status": "expired" if ended else record.status,
        "expires_at": _iso(record.expires_at),
        "signing": record.signing_secret is not None,
        "digest_prefix": record.digest[:8],
        "store": store,
    }


def _iso(at: float | None) -> str | None:
    return None if at is None else iso(at)


def _stores(command: Any) -> Any:
    """The options that name the registers."""
    file = click.option(
        "--file",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="KEY_FILE",
        help="Key file.  [env: KEY_FILE]",
    )
    redis = click.option(
        "--redis",
        envvar="REDIS_ADDR",
        help="host:port, redis://…, rediss://… or unix:///path.  [env: REDIS_ADDR; default: Valkey of `router up`]",
    )
    return file(redis(command))


@click.group()
def keys() -> None:
    """Create, list and revoke API keys."""


@keys.command()
@click.option("--org", "organization_id", required=True, help="Organisation that the key acts for.")
@click.option("--id", "key_id", help="Id that policies, limits and records name the key by.  [default: made up]")
@click.option("--principal", default="", help="Person or program that holds the key.")
@click.option("--scope", "scopes", multiple=True, default=("inference",), show_default=True, help="May be repeated.")
@click.option("--model", "models", multiple=True, help="Model it may use; may be repeated.  [default: every model]")
@click.option("--expires-in", help="90s, 30m, 12h, 30d or 8w from now.")
@click.option("--expires-at", help="ISO 8601 time.")
@click.option("--signing", is_flag=True, help="Give the key a signing secret; signatures are checked where sent.")
@click.option("--require-signature", is_flag=True, help="As --signing, and refuse requests without a signature.")
@actor_option
@_stores
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def create(  # noqa: PLR0917 - one parameter an option
    organization_id: str,
    key_id: str | None,
    principal: str,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    expires_in: str | None,
    expires_at: str | None,
    signing: bool,
    require_signature: bool,
    actor: str | None,
    file: Path | None,
    redis: str | None,
    as_json: bool,
) -> None:
    """Make a key of 256 random bits. It is shown once; only its SHA-256 digest is stored.

    A signing secret is stored as it is, because signatures are computed with it. The audit trail is told first: where
    it cannot be, no key is made.
    """
    stores = registers(file, redis)
    fields = {
        "id": KeyId(key_id or f"key-{secrets.token_hex(8)}"),
        "organization_id": OrganizationId(organization_id),
        "principal_id": principal,
        "scopes": list(scopes),
        "allowed_models": list(models) or None,
        "expires_at": expiry(expires_in, expires_at, now=time.time()),
        "require_signature": require_signature,
    }
    made = new_key(fields, signing=signing or require_signature)
    names = [store.name for store in stores]
    try:
        check_is_new(made.record.id, stores)
        tell(AuditAction.KEY_CREATED, made.record, actor=actor, redis=redis, stores=names)
        add_everywhere(made.record, stores)
    except RegisterError as error:
        raise click.ClickException(str(error)) from None
    (_print_json if as_json else _print_created)(made, names)


def _print_json(made: NewKey, stores: list[str]) -> None:
    hidden = {"digest", "expires_at"}
    fields = {name: value for name, value in fields_of(made.record).items() if name not in hidden}
    expires_at = _iso(made.record.expires_at)
    click.echo(json.dumps({"key": made.key, **fields, "expires_at": expires_at, "stores": stores}))


def _print_created(made: NewKey, stores: list[str]) -> None:
    record = made.record
    until = f", until {_iso(record.expires_at)}" if record.expires_at is not None else ""
    click.echo(f"Key {record.id} of {record.organization_id} is stored in {' and '.join(stores)}{until}.", err=True)
    click.echo("Keep what follows now: it cannot be shown again.", err=True)
    click.echo(made.key)
    if record.signing_secret is not None:
        click.echo("Signing secret (its characters are the key of HMAC-SHA256):", err=True)
        click.echo(record.signing_secret)


@keys.command("list")
@click.option("--org", "organization_id", help="Only this organisation's keys.")
@_stores
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(organization_id: str | None, file: Path | None, redis: str | None, as_json: bool) -> None:
    """List keys, one line for each store that has one."""
    now = time.time()
    try:
        rows = [
            shown(record, store=store.name, now=now)
            for store in registers(file, redis)
            for record in store.records()
            if organization_id in {None, record.organization_id}
        ]
    except RegisterError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table(box=None, header_style="bold")
    for heading in ("ID", "ORG", "PRINCIPAL", "SCOPES", "MODELS", "STATUS", "EXPIRES", "SIGNATURE", "DIGEST", "STORE"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    print_table(table)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    signature = "required" if row["require_signature"] else "checked" if row["signing"] else "-"
    scopes, models = (" ".join(row.get(name) or ()) for name in ("scopes", "allowed_models"))
    models = models if "allowed_models" in row else "every"
    cells = (row["id"], row["organization_id"], row.get("principal_id", "-"), scopes or "-", models, row["status"])
    more = (row["expires_at"] or "never", signature, row["digest_prefix"], row["store"])
    # Plain text: an id or principal may hold what looks like the table's own markup.
    return tuple(escape(cell) for cell in (*cells, *more))


@keys.command()
@click.argument("key_id")
@actor_option
@_stores
def revoke(key_id: str, actor: str | None, file: Path | None, redis: str | None) -> None:
    """Revoke a key in every store named, for good. Running workers take notice at once.

    The audit trail is told afterwards: a key that has to go does not wait for it.
    """
    stores = registers(file, redis)
    record = active(KeyId(key_id), stores)
    done = revoke_everywhere(KeyId(key_id), stores)
    problems = list(done.errors)
    if done.stores and record is not None:
        try:
            tell(AuditAction.KEY_REVOKED, record, actor=actor, redis=redis, stores=done.stores)
        except click.ClickException as error:
            problems.append(f"The audit trail lacks that it was revoked: {error.message}")
    where = " and ".join(done.stores)
    if problems:
        raise click.ClickException("\n".join([*problems, *([f"Revoked in {where}."] if where else [])]))
    if not where:
        raise click.ClickException(f"There is no key {key_id}.")
    click.echo(f"Key {key_id} is revoked in {where}.")
