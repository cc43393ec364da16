"""``python -m usage``: the ledger."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import uvloop
from prometheus_client import CollectorRegistry

from gateway.http import serve, tcp_listener
from gateway.redis_url import redis_url
from gateway.settings import USAGE_SOCKET, SettingsError, UsageSettings, read
from gateway.telemetry import Logger, configure_logging, get_logger
from limits.heartbeat import beat
from limits.valkey import ValkeyLimits, open_limits
from usage.access_log import decode
from usage.ledger import Ledger
from usage.metrics import LedgerMetrics, build_app
from usage.server import AccessLogServer
from usage.sweep import sweep_every

STREAM_GRACE_S: Final = 0.5
"""For what Envoy has written already, when the program is told to stop."""
DRAIN_S: Final = 5.0


@asynccontextmanager
async def _store(settings: UsageSettings, *, metrics: LedgerMetrics, log: Logger) -> AsyncIterator[ValkeyLimits | None]:
    """The limit store; None where there is none."""
    if not settings.redis_addr:
        log.info("nothing_to_settle", reason="REDIS_ADDR is not set, so nothing is limited")
        yield None
        return
    async with open_limits(
        settings.redis_addr,
        log=log,
        deadline_s=settings.limit_store_deadline_s,
        overdue_s=settings.limit_overdue_s,
        on_change=metrics.limit_store_up.set,
    ) as store:
        yield store


def _receiver(ledger: Ledger | None, *, metrics: LedgerMetrics, log: Logger) -> Callable[[bytes], None]:
    """What is done with each message of the access log."""

    def receive(data: bytes) -> None:
        batch = decode(data)
        metrics.log_entries.inc(len(batch.finished) + len(batch.malformed))
        metrics.malformed.inc(len(batch.malformed))
        for problem in batch.malformed:
            log.error("access_log_malformed", problem=problem)
        if ledger is not None:
            ledger.take(batch.finished)

    return receive


async def run(settings: UsageSettings) -> None:
    """Receive and settle until SIGTERM or SIGINT.

    Raises:
        SettingsError: the program cannot start.
    """
    log = get_logger()
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    registry = CollectorRegistry()
    metrics = LedgerMetrics(registry)
    listener = tcp_listener("0.0.0.0", settings.usage_metrics_port)
    socket = settings.run_dir / USAGE_SOCKET
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _store(settings, metrics=metrics, log=log) as store, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(serve(build_app(registry), listener))]
        ledger: Ledger | None = None
        if store is not None:
            ledger = Ledger(
                store.settle, store_is_up=store.connection.wait_up, metrics=metrics, log=log, clock_s=time.monotonic
            )
            sweeping = sweep_every(settings.usage_sweep_interval_s, store, metrics=metrics, log=log)
            running += [tasks.create_task(each) for each in (ledger.run(), sweeping, beat(store.connection))]
        server = AccessLogServer(socket, _receiver(ledger, metrics=metrics, log=log))
        await server.start()
        log.info("ledger_serving", socket=str(socket), metrics_port=settings.usage_metrics_port)
        await stop.wait()
        log.info("stopping")
        await server.stop(STREAM_GRACE_S)
        if ledger is not None and (left := await ledger.drain(DRAIN_S)):
            log.error("stopped_before_settled", entries=left)
        for task in running:
            task.cancel()


def main() -> None:
    """Run the program; a reason not to start is one clear line and exit code 1."""
    try:
        settings = read(UsageSettings)
        configure_logging(program="usage", level=settings.log_level, log_format=settings.log_format)
        _check_address(settings.redis_addr)
        uvloop.run(run(settings))
    except SettingsError as error:
        sys.exit(f"usage: {error}")


def _check_address(address: str) -> None:
    try:
        if address:
            redis_url(address)
    except ValueError as error:
        raise SettingsError(f"REDIS_ADDR: {error}") from error


if __name__ == "__main__":
    main()
