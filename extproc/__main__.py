"""``python -m extproc``: supervises the workers and answers for their metrics and readiness.

``--worker N`` is how it starts each of them.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from importlib import import_module

import click
import uvloop

from extproc.keys.key_file import KeyFileInvalid
from gateway.settings import STATUS_SOCKET, VERSION, ExtprocSettings, SettingsError, read
from gateway.telemetry import configure_logging, get_logger
from policies.load import PolicyRejected


async def supervise(settings: ExtprocSettings) -> None:
    """Run the workers and the status server until SIGTERM or SIGINT."""
    from extproc.supervise import Workers

    log = get_logger()
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    metrics_dir = settings.run_dir / "metrics"
    shutil.rmtree(metrics_dir, ignore_errors=True)
    metrics_dir.mkdir(parents=True)
    workers = Workers(settings, metrics_dir=metrics_dir, log=log)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(workers.run())
        # Imported while the workers start, which take as long.
        status_app = await asyncio.to_thread(import_module, "extproc.status_app")
        serving = tasks.create_task(
            status_app.serve_status(
                settings,
                socket=settings.run_dir / STATUS_SOCKET,
                metrics_dir=metrics_dir,
                workers=lambda: (workers.alive, settings.extproc_workers),
                version=VERSION,
                log=log,
            )
        )
        await stop.wait()
        log.info("stopping")
        await workers.stop()
        await running
        serving.cancel()


async def _work(settings: ExtprocSettings, worker: int) -> None:
    from extproc.worker import run

    await run(settings, worker=worker)


@click.command()
@click.option("--worker", type=int, default=None, hidden=True, help="Run one worker; the supervisor passes its number.")
def main(worker: int | None) -> None:
    """Run the ext_proc workers; a reason not to start is one clear message and exit code 2."""
    try:
        settings = read(ExtprocSettings)
        configure_logging(program="extproc", level=settings.log_level, log_format=settings.log_format)
        uvloop.run(supervise(settings) if worker is None else _work(settings, worker))
    except PolicyRejected as rejected:
        _cannot_start(f"the policy cannot be used:\n{rejected}")
    except (SettingsError, KeyFileInvalid) as error:
        _cannot_start(str(error))
    except ExceptionGroup as group:
        from extproc.supervise import WorkersCannotStart

        if group.subgroup(WorkersCannotStart) is None:
            raise
        _cannot_start("the workers cannot start; the reason is above")


def _cannot_start(reason: str) -> None:
    from extproc.supervise import CANNOT_START

    print(f"extproc: {reason}", file=sys.stderr)
    sys.exit(CANNOT_START)


if __name__ == "__main__":
    main()
