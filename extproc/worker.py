"""One worker process: opens the key stores, loads the policy, serves exchanges, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from extproc.keys.open import open_keys
from extproc.metrics import RequestCounts
from extproc.open_limiter import open_limiter
from extproc.pipeline import Deciders
from extproc.policy import FollowedPolicy
from extproc.server import ExtProcServer
from gateway.settings import ExtprocSettings
from gateway.telemetry import Logger, get_logger

HEALTH_CHECK_NOTICE_S = 1.5
"""Longer than Envoy's health check interval: after it no new exchange comes here."""


def _stop_event() -> asyncio.Event:
    """Set by SIGTERM, or when the supervisor is gone: it holds the other end of standard input."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the supervisor decides

    def on_input() -> None:
        if not os.read(sys.stdin.fileno(), 1024):
            loop.remove_reader(sys.stdin.fileno())
            stop.set()

    loop.add_reader(sys.stdin.fileno(), on_input)
    return stop


@asynccontextmanager
async def open_deciders(settings: ExtprocSettings, policy: FollowedPolicy, *, log: Logger) -> AsyncIterator[Deciders]:
    """What a worker decides with, opened and closed together.

    Raises:
        KeyFileInvalid, ValueError: a setting cannot be used.
    """
    models = {entry.model for entry in policy.table().index.policy.models}
    async with open_keys(settings, log=log) as keys, open_limiter(settings, models=models, log=log) as limits:
        yield Deciders(
            keys=keys.store,
            policy=policy.table,
            outcomes=RequestCounts(),
            log=log,
            clock_s=time.time,
            limiter=limits.limiter,
            audit=limits.audit,
            body_max_bytes=settings.body_max_bytes,
            payload_max_bytes=settings.inference_payload_max_bytes,
            kept_answer_max_bytes=settings.idempotency_answer_max_bytes,
        )


async def run(settings: ExtprocSettings, *, worker: int) -> None:
    """Serve until told to stop.

    Raises:
        PolicyRejected, KeyFileInvalid: the worker cannot start.
    """
    log = get_logger().bind(worker=worker)
    stop = _stop_event()
    policy = FollowedPolicy(settings, log=log)
    async with open_deciders(settings, policy, log=log) as deciders:
        socket = settings.run_dir / settings.worker_socket(worker)
        server = ExtProcServer(
            deciders,
            socket=socket,
            buffer_bytes=settings.buffer_bytes,
            traced=bool(settings.otel_exporter_otlp_endpoint),
            log=log,
        )
        following = asyncio.create_task(policy.follow())
        await server.start()
        # A request leaves no cycles behind: look rarely, and never again at what lives for ever.
        gc.set_threshold(50_000, 50, 1000)
        gc.collect()
        gc.freeze()
        log.info("worker_serving", socket=str(socket), pid=os.getpid())
        await stop.wait()
        log.info("worker_draining")
        await server.drain(notice_s=HEALTH_CHECK_NOTICE_S, grace_s=settings.drain_timeout_s)
        following.cancel()
