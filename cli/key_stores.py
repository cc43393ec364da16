"""The registers that ``router keys`` was told of, and what is done in all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from cli.embedded import embedded_valkey
from extproc.keys.record import KeyRecord
from extproc.keys.register import FileRegister, KeyExists, KeyRegister, RedisRegister, RegisterError
from policies.model import KeyId


def registers(file: Path | None, redis: str | None) -> tuple[KeyRegister, ...]:
    """The registers that the options or the environment name.

    Raises:
        click.UsageError: none is named, or an address has the wrong form.
    """
    if not file and not redis:
        redis = embedded_valkey(Path(os.environ.get("RUN_DIR", ".run")))
    try:
        found: list[KeyRegister] = [RedisRegister(redis)] if redis else []
    except ValueError as error:
        raise click.UsageError(f"--redis: {error}") from None
    if file:
        found.append(FileRegister(file))
    if not found:
        raise click.UsageError("Name a store: --file PATH or --redis ADDR, or set KEY_FILE or REDIS_ADDR.")
    return tuple(found)


def check_is_new(key_id: KeyId, stores: Sequence[KeyRegister]) -> None:
    """Raise RegisterError where a register has a key of this id, or cannot be read."""
    for store in stores:
        if any(key_id == other.id for other in store.records()):
            raise KeyExists(f"{store.name} already has a key {key_id}")


def add_everywhere(record: KeyRecord, stores: Sequence[KeyRegister]) -> None:
    """Store a key in every register, or in none that stays usable.

    Raises:
        RegisterError: a register refused it; where it had been stored it is revoked.
    """
    done: list[KeyRegister] = []
    for store in stores:
        try:
            store.add(record)
        except RegisterError as error:
            for earlier in done:
                with suppress(RegisterError):  # nobody has seen the key: what stays of it opens nothing
                    earlier.revoke(record.id)
            raise RegisterError(f"{error}\nThe key was not created.") from error
        done.append(store)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """Names of the registers that had a key, and what those say that failed."""

    stores: tuple[str, ...]
    errors: tuple[str, ...]


def revoke_everywhere(key_id: KeyId, stores: Sequence[KeyRegister]) -> Revoked:
    """Revoke a key wherever it is; a register that fails keeps the others from nothing."""
    had: list[str] = []
    errors: list[str] = []
    for store in stores:
        try:
            if store.revoke(key_id):
                had.append(store.name)
        except RegisterError as error:
            errors.append(str(error))
    return Revoked(stores=tuple(had), errors=tuple(errors))


def active(key_id: KeyId, stores: Sequence[KeyRegister]) -> KeyRecord | None:
    """The record of a key that is not revoked in some register that can be read."""
    for store in stores:
        with suppress(RegisterError):
            for record in store.records():
                if record.id == key_id and record.status == "active":
                    return record
    return None
