"""Puts the ledger together: what Envoy tells is written down, then settled and handed on."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from gateway.http import serve, tcp_listener, unix_listener
from gateway.settings import AUDIT_SOCKET, JOURNAL, USAGE_SOCKET, SettingsError, UsageSettings
from gateway.telemetry import Logger
from limits.heartbeat import beat
from limits.valkey import ValkeyLimits, open_limits
from usage.accounts import Accounts, open_entries
from usage.archive import Archive
from usage.audit_app import Sources, build_audit_app
from usage.audit_trail import follow_audit
from usage.delivery import Delivery
from usage.follow import JournalFollower, reopener
from usage.intake import Intake
from usage.journal_file import ROTATED_BYTES, JournalFile, Position
from usage.metrics import LedgerMetrics, build_app
from usage.operator_app import operator_routes
from usage.outlets import Outlets, open_outlets
from usage.policies import keep_policies
from usage.prune import prune_every
from usage.reconcile import Reconciliation
from usage.salvage import Opened, keep_copy, mark_damaged, open_spool
from usage.server import AccessLogServer
from usage.settler import Settler
from usage.signs_of_life import SignsOfLife
from usage.spool import JOURNAL_MARK, Entry
from usage.sweep import sweep_every
from usage.writer import Writer

SPOOL_FILE: Final = "usage.db"
LOCK_FILE: Final = "usage.lock"
SPOOL_WATCH_S: Final = 2.0
SIGNS: Final = 1.5
"""So many intervals of Envoy's signs of life pass before silence means something."""
PRUNE_S: Final = 60.0
STREAM_GRACE_S: Final = 0.5
"""For what Envoy has written already, when the program is told to stop."""
DRAIN_S: Final = 5.0
REOPEN_S: Final = 5.0
"""Before a damaged spool is taken over again, where there was no room."""


class UpSince:
    """When the limit store was last found up, in seconds of the monotonic clock; before that the start."""

    def __init__(self, metrics: LedgerMetrics) -> None:
        self._metrics = metrics
        self.at_s = time.monotonic()

    def change(self, is_up: bool) -> None:
        """Take what the connection tells."""
        self._metrics.limit_store_up.set(is_up)
        if is_up:
            self.at_s = time.monotonic()


class Ledger:
    """Everything that a running ledger consists of; ``store`` is None where nothing is limited."""

    def __init__(  # noqa: PLR0917 - what it consists of
        self,
        settings: UsageSettings,
        opened: Opened,
        store: ValkeyLimits | None,
        up_since: UpSince,
        outlets: Outlets,
        http: httpx.AsyncClient,
        metrics: LedgerMetrics,
        log: Logger,
    ) -> None:
        self._settings = settings
        self._store = store
        self._up_since = up_since
        self._outlets = outlets
        self._metrics = metrics
        self._log = log
        spool = opened.spool
        self._spool = spool
        self.damaged = asyncio.Event()
        """Set once the spool is found not to be what was written to it."""
        self.archive = Archive(spool.path, damaged=self._found_damaged)
        self._asked = Archive(spool.path, damaged=self._found_damaged)
        self._operators = Archive(spool.path, damaged=self._found_damaged)
        self.writer = Writer(spool, written=self._written, metrics=metrics, log=log, damaged=self._found_damaged)
        self.settler: Settler | None = None
        self._signs: SignsOfLife | None = None
        if store is not None:
            self._signs = SignsOfLife(store)
            self.settler = Settler(
                store,
                spool,
                self.writer,
                store_is_up=store.connection.wait_up,
                metrics=metrics,
                log=log,
                clock_s=time.time,
            )
        self.delivery = Delivery(
            self.archive, self.writer, outlets.by_mark, metrics=metrics, log=log, clock_s=time.time
        )
        self.intake = Intake(
            self.writer,
            tried_s=self._tried_s,
            running=self._signs.take if self._signs is not None else lambda _: None,
            metrics=metrics,
            log=log,
            recovered=opened.damaged,
            settles=store is not None,
        )
        journal = JournalFile(
            settings.state_path / JOURNAL,
            Position.read(str(spool.mark(JOURNAL_MARK, ""))),
            rotated_bytes=ROTATED_BYTES,
        )
        self.follower = JournalFollower(
            journal,
            self.intake,
            self.writer,
            reopen=reopener(http, settings.envoy_admin_address),
            clock_s=time.time,
            metrics=metrics,
            log=log,
        )
        self.reconciliation = Reconciliation(
            spool,
            self.archive,
            self.writer,
            http,
            settings.envoy_admin_address,
            caught_up=lambda: self.follower.caught_up.is_set() and self.writer.writable,
            metrics=metrics,
            log=log,
            clock_s=time.time,
            monotonic_s=time.monotonic,
        )

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """What runs as long as the ledger does."""
        settings, log = self._settings, self._log
        running = [
            self.writer.run(),
            self.delivery.run(),
            self.follower.run(),
            self.reconciliation.run(),
            self._watch_spool(),
            keep_policies(settings, self.writer, log=log),
            prune_every(
                PRUNE_S,
                self._spool,
                self.writer,
                self._outlets.prune,
                kept_s=settings.usage_retention_days * 86400,
                clock_s=time.time,
                log=log,
            ),
        ]
        store = self._store
        if store is None or self.settler is None or self._signs is None:
            return running
        return [
            *running,
            self.settler.run(),
            self._signs.run(),
            beat(store.connection),
            follow_audit(store.connection, self.writer, metrics=self._metrics, log=log),
            sweep_every(
                settings.usage_sweep_interval_s,
                store,
                self.writer,
                may=self._may_sweep,
                settle=self.settler.look,
                metrics=self._metrics,
                log=log,
            ),
        ]

    def health(self) -> dict[str, Any]:
        """For whoever looks after it; ``warnings`` say what somebody should do something about."""
        late_s, warnings = self.delivery.oldest_s, []
        if not self.writer.writable:
            warnings.append("the spool cannot be written: requests wait in memory and in Envoy's journal")
        if late_s > self._settings.usage_late_warning_s:
            warnings.append(f"the oldest record that was not handed on is {late_s:.0f} s old")
        if self.delivery.waiting >= self._settings.usage_backlog_max:
            warnings.append(f"{self.delivery.waiting} requests wait to be handed on: the disk fills")
        if self.delivery.refused:
            warnings.append(f"{self.delivery.refused} records could not be handed on: the log says why")
        if self.reconciliation.unaccounted:
            warnings.append(f"{self.reconciliation.unaccounted} requests are unaccounted for")
        return {
            "spool": "writable" if self.writer.writable else "not_writable",
            "undelivered": self.delivery.waiting,
            "refused": self.delivery.refused,
            "oldest_undelivered_s": round(late_s, 3),
            "unaccounted": self.reconciliation.unaccounted,
            "warnings": warnings,
        }

    def audit_app(self) -> Starlette:
        """The server of those who ask; it reads by connections of its own, so that nobody waits for somebody's sums."""
        store = self._store

        async def count_open() -> int | None:
            return None if store is None else await open_entries(store)

        sources = Sources(
            archive=self._asked,
            opened=None if store is None else store.opened,
            organizations=None if store is None else store.organizations,
            health=self.health,
            log=self._log,
        )
        accounts = Accounts(
            archive=self._operators,
            reconciliation=self.reconciliation,
            oldest_s=lambda: self.delivery.oldest_s,
            malformed=self._metrics.malformed_so_far,
            count_open=count_open,
        )
        return build_audit_app(sources, operator_routes(self._operators, accounts, log=self._log))

    async def drain(self, within_s: float) -> None:
        """Finish what was told, as far as it can be done in time; the rest is in the spool or in the journal."""
        deadline = time.monotonic() + within_s
        if left := await self.writer.drain(within_s):
            self._log.error("stopped_before_written", requests=left)
        if self.settler is not None and not await self.settler.drain(max(0.0, deadline - time.monotonic())):
            self._log.warning("stopped_before_settled", meaning="it goes on after the next start")
        await self.writer.drain(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        """Close the files."""
        self.writer.close()
        self.archive.close()
        self._asked.close()
        self._operators.close()

    def _written(self, entries: Sequence[Entry]) -> None:
        for kind, count in Counter(entry.kind for entry in entries).items():
            self._metrics.recorded.labels(kind).inc(count)
        if self.settler is not None:
            self.settler.take(entries)
        self.delivery.wake()

    def _may_sweep(self) -> bool:
        """Whether what is overdue is so because nobody has heard of it, and not because nobody could have been told."""
        settings = self._settings
        silent_s = min(SIGNS * settings.sign_of_life_s, settings.limit_overdue_s)
        return self.follower.caught_up.is_set() and time.monotonic() > self._up_since.at_s + silent_s

    async def _watch_spool(self) -> None:
        """A file that was removed or replaced goes on taking what is written, and has it as long as it is open."""
        while not await asyncio.to_thread(self._spool.is_gone):  # noqa: ASYNC110 - a file tells of nothing
            await asyncio.sleep(SPOOL_WATCH_S)
        self._log.error("spool_gone", path=str(self._spool.path), meaning="it is written anew from what is still open")
        while not self.damaged.is_set():
            try:
                await self.writer.call(partial(keep_copy, self._spool))
                self.damaged.set()
            except OSError as error:
                self._log.warning("spool_not_kept", error=str(error), meaning=f"tried again in {REOPEN_S:.0f} s")
                await asyncio.sleep(REOPEN_S)

    def _found_damaged(self, error: sqlite3.Error) -> None:
        if not self.damaged.is_set():
            self.damaged.set()
            self._log.error("spool_damaged_at_work", error=str(error), meaning="it is opened anew and made whole")
            try:
                mark_damaged(self._spool.path)
            except OSError as cannot:
                self._log.error("spool_not_marked", error=str(cannot), meaning="the damage has to be found again")

    def _tried_s(self) -> int | None:
        """When what is written now may be told to the limit store."""
        return int(time.time()) if self._store is not None and self._store.connection.is_up else None


@asynccontextmanager
async def _store(settings: UsageSettings, up_since: UpSince, *, log: Logger) -> AsyncIterator[ValkeyLimits | None]:
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
        on_change=up_since.change,
    ) as store:
        yield store


async def run(settings: UsageSettings, stop: asyncio.Event, *, log: Logger) -> None:
    """Serve until told to stop, with a spool that is made whole as often as it is found damaged.

    Raises:
        SettingsError: the program cannot start.
    """
    with _alone(settings.state_path / LOCK_FILE):
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        opened: Opened | None
        try:
            opened = await _open(settings, log)
        except (OSError, sqlite3.OperationalError) as error:
            raise SettingsError(f"STATE_DIR: {settings.state_path / SPOOL_FILE}: {error}") from error
        while opened is not None and not await _serve(settings, opened, stop, log=log):
            opened = await _opened_again(settings, stop, log)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of two ledgers each would take the other's requests for its own; the lock ends with the process.

    Raises:
        SettingsError: there is another one, or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise SettingsError(f"STATE_DIR: {path.parent}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(f"STATE_DIR: another ledger uses {path.parent}") from error
        yield


async def _open(settings: UsageSettings, log: Logger) -> Opened:
    opening = partial(open_spool, settings.state_path / SPOOL_FILE, journal=settings.state_path / JOURNAL, log=log)
    return await asyncio.to_thread(opening)


async def _opened_again(settings: UsageSettings, stop: asyncio.Event, log: Logger) -> Opened | None:
    """The spool made whole, as soon as there is room for that; None: told to stop before."""
    while not stop.is_set():
        try:
            return await _open(settings, log)
        except (OSError, sqlite3.Error) as error:
            log.warning("spool_not_opened", error=str(error), meaning=f"tried again in {REOPEN_S:.0f} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REOPEN_S):
                    await stop.wait()
    return None


async def _serve(settings: UsageSettings, opened: Opened, stop: asyncio.Event, *, log: Logger) -> bool:
    """Serve until told to stop; False: until the spool was found damaged.

    Raises:
        SettingsError: the program cannot start.
    """
    registry = CollectorRegistry()
    metrics = LedgerMetrics(registry)
    metrics.spool_recovered.inc(int(opened.damaged))
    async with AsyncExitStack() as stack:
        stack.callback(opened.spool.close)
        outlets = await stack.enter_async_context(open_outlets(settings, log=log))
        up_since = UpSince(metrics)
        store = await stack.enter_async_context(_store(settings, up_since, log=log))
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        ledger = Ledger(settings, opened, store, up_since, outlets, http, metrics, log)
        stack.callback(ledger.close)
        listeners = tcp_listener("0.0.0.0", settings.usage_metrics_port), unix_listener(settings.run_dir / AUDIT_SOCKET)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(each) for each in ledger.tasks()]
                running.append(tasks.create_task(serve(build_app(registry, ledger.health), listeners[0])))
                running.append(tasks.create_task(serve(ledger.audit_app(), listeners[1])))
                server = AccessLogServer(settings.run_dir / USAGE_SOCKET, ledger.intake.receive)
                await server.start()
                log.info("ledger_serving", spool=str(opened.spool.path), metrics_port=settings.usage_metrics_port)
                await _first_of(stop, ledger.damaged)
                log.info("stopping")
                if ledger.damaged.is_set():  # what is written from now on would be lost
                    await server.stop(0)
                else:
                    await server.stop(STREAM_GRACE_S)
                    await ledger.drain(DRAIN_S)
                for task in running:
                    task.cancel()
        except* sqlite3.Error:
            if not ledger.damaged.is_set():
                raise
        return not ledger.damaged.is_set()


async def _first_of(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
