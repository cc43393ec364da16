"""``python -m usage``: the ledger."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from gateway.redis_url import redis_url
from gateway.settings import SettingsError, UsageSettings, read
from gateway.telemetry import configure_logging, get_logger
from usage.ledger import run


async def serve(settings: UsageSettings) -> None:
    """Receive, write down, settle and hand on until SIGTERM or SIGINT.

    Raises:
        SettingsError: the program cannot start.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run(settings, stop, log=get_logger())


def main() -> None:
    """Run the program; a reason not to start is one clear line and exit code 1."""
    try:
        settings = read(UsageSettings)
        configure_logging(program="usage", level=settings.log_level, log_format=settings.log_format)
        _check_address(settings.redis_addr)
        uvloop.run(serve(settings))
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
