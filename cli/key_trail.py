"""What the audit trail is told of API keys that ``router keys`` makes and revokes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from cli.embedded import embedded_valkey
from cli.limit_store import an_event, on_store
from cli.shown import iso
from extproc.keys.record import KeyRecord
from gateway.audit import AuditAction
from gateway.settings import StoreSettings, read
from limits.audit_stream import append
from limits.valkey import ValkeyLimits


def tell(
    action: AuditAction, record: KeyRecord, *, actor: str | None, redis: str | None, stores: Sequence[str]
) -> None:
    """Write an event of a key; where there is no limit store, there is no trail either, which is said.

    Raises:
        click.ClickException: the limit store cannot be used.
    """
    settings = read(StoreSettings)
    if not (redis or settings.redis_addr or embedded_valkey(settings.run_dir)):
        click.echo("Without REDIS_ADDR there is no audit trail that could tell of this.", err=True)
        return
    event = an_event(action, record.organization_id, actor=actor, metadata={**_said(record), "stores": list(stores)})

    async def write(store: ValkeyLimits) -> None:
        await append(store.connection, event, events_max=settings.audit_events_max)

    on_store(redis, write)


def _said(record: KeyRecord) -> dict[str, Any]:
    """What a key may do; never the key, its digest or its secret."""
    return {
        "api_key_id": record.id,
        "principal_id": record.principal_id,
        "scopes": sorted(record.scopes),
        "allowed_models": None if record.allowed_models is None else sorted(record.allowed_models),
        "expires_at": None if record.expires_at is None else iso(record.expires_at),
        "signing": record.signing_secret is not None,
        "require_signature": record.require_signature,
    }
