"""Which outlets the settings name: Kafka, or files."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.settings import SettingsError, UsageSettings
from gateway.telemetry import Logger
from usage.jsonl import JsonlOutlet
from usage.kafka import KafkaOutlet
from usage.outlet import Outlet
from usage.spool import ALLOWED_MARK, EVENTS_MARK, RECORDS_MARK

RECORDS_DIRECTORY: Final = "records"
_MARKS: Final = (RECORDS_MARK, ALLOWED_MARK, EVENTS_MARK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """An outlet for each stream by its mark; ``prune`` removes files of hours before a unix second."""

    by_mark: Mapping[str, Outlet]
    prune: Callable[[float], Awaitable[object]]


@asynccontextmanager
async def open_outlets(settings: UsageSettings, *, log: Logger) -> AsyncIterator[Outlets]:
    """The outlets, closed at the end.

    Raises:
        SettingsError: Kafka is not set up as librdkafka wants it.
    """
    async with AsyncExitStack() as stack:
        if not settings.kafka_brokers:
            files = JsonlOutlet(settings.state_path / RECORDS_DIRECTORY, clock_s=time.time, log=log)
            stack.push_async_callback(files.close)
            yield Outlets(by_mark=dict.fromkeys(_MARKS, files), prune=files.prune)
            return
        by_mark: dict[str, Outlet] = {}
        for mark in _MARKS:
            try:
                kafka = KafkaOutlet(
                    settings.kafka_brokers,
                    log=log,
                    clock_s=time.monotonic,
                    settings=kafka_settings(settings.kafka_config_file),
                )
            except ValueError as error:
                raise SettingsError(f"KAFKA_BROKERS, KAFKA_CONFIG_FILE: {error}") from error
            stack.push_async_callback(kafka.close)
            by_mark[mark] = kafka
        yield Outlets(by_mark=by_mark, prune=_nothing)


async def _nothing(_: float) -> None:
    """What Kafka keeps is Kafka's."""


def kafka_settings(path: Path | None) -> dict[str, str]:
    """``name=value`` lines of a file; empty lines and such that begin with # are left out.

    Raises:
        ValueError: a line has another form.
        SettingsError: the file cannot be read.
    """
    if path is None:
        return {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise SettingsError(f"KAFKA_CONFIG_FILE: {path}: {error.strerror}") from error
    found = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{path}:{number}: expected name=value, got {line!r}")
        found[name.strip()] = value.strip()
    return found
