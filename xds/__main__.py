"""``python -m xds``: the control plane."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import sys

import uvloop
from prometheus_client import CollectorRegistry
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from gateway.http import serve, tcp_listener
from gateway.settings import VERSION, XDS_SOCKET, SettingsError, XdsSettings, read
from gateway.telemetry import configure_logging, get_logger
from policies.load import PolicyRejected
from xds.admin import build_app
from xds.publish import Publisher
from xds.server import AddressInUse, AdsServer


def _plain(value: object) -> object:
    """A policy as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, frozenset):
        return sorted(_plain(item) for item in value)  # type: ignore[type-var]
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


async def run(settings: XdsSettings) -> None:
    """Serve ADS and the admin API until SIGTERM or SIGINT.

    Raises:
        PolicyRejected, SettingsError, AddressInUse: the program cannot start.
    """
    log = get_logger()
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    settings.state_path.mkdir(parents=True, exist_ok=True)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    server = AdsServer(registry=registry)
    publisher = Publisher(settings, server, log=log)
    publisher.start()
    addresses = [f"unix:{settings.run_dir / XDS_SOCKET}"]
    if settings.xds_grpc_address:
        addresses.append(settings.xds_grpc_address)
    app = build_app(
        version=VERSION,
        server=server,
        registry=registry,
        policy_status=lambda: publisher.status,
        effective_policy=lambda: _plain(publisher.policy) if publisher.policy else None,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start(addresses)
    listener = tcp_listener(settings.admin_host, settings.admin_port)
    log.info("admin_started", host=settings.admin_host, port=settings.admin_port)
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(serve(app, listener)),
            tasks.create_task(publisher.follow()),
        ]
        await stop.wait()
        log.info("stopping")
        await server.stop()
        for task in running:
            task.cancel()


def main() -> None:
    """Run the program; a reason not to start is one clear line and exit code 2."""
    try:
        settings = read(XdsSettings)
        configure_logging(program="xds", level=settings.log_level, log_format=settings.log_format)
        uvloop.run(run(settings))
    except PolicyRejected as rejected:
        sys.exit(f"xds: the policy cannot be used:\n{rejected}")
    except (SettingsError, AddressInUse) as error:
        sys.exit(f"xds: {error}")


if __name__ == "__main__":
    main()
