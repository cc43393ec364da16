"""What a worker limits with, opened together and closed together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from extproc.budget_service import BudgetService, open_budget_service
from extproc.limit import WAITERS_MAX, Limiter, Places
from extproc.local_rates import LocalRates
from extproc.metrics import LimitMetrics
from extproc.tokens import TokenCounter
from gateway.audit import AuditEvent, AuditTrail
from gateway.settings import ExtprocSettings
from gateway.telemetry import Logger
from limits.audit_stream import open_audit_stream
from limits.heartbeat import LedgerWatch
from limits.valkey import ValkeyLimits, open_limits


class LogOnly:
    """Audit where there is no store: the log has every refusal already."""

    def record(self, event: AuditEvent) -> None:
        """Nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A worker's limiter and audit trail."""

    limiter: Limiter
    audit: AuditTrail


@asynccontextmanager
async def open_limiter(settings: ExtprocSettings, *, models: Iterable[str], log: Logger) -> AsyncIterator[Opened]:
    """The limiter that the settings name. A store or service that is down does not fail the start.

    ``models`` are those whose requests are to be counted without delay.

    Raises:
        ValueError: an address has no known form.
    """
    metrics = LimitMetrics()
    local = LocalRates(workers=settings.extproc_workers)
    async with AsyncExitStack() as stack:
        store: ValkeyLimits | None = None
        ledger: LedgerWatch | None = None
        audit: AuditTrail = LogOnly()
        if settings.redis_addr:

            def changed(is_up: bool) -> None:
                metrics.store_changed(is_up)
                if is_up:
                    local.clear()

            store = await stack.enter_async_context(
                open_limits(
                    settings.redis_addr,
                    log=log,
                    deadline_s=settings.limit_store_deadline_s,
                    overdue_s=settings.limit_overdue_s,
                    claim_kept_s=settings.idempotency_window_s,
                    on_change=changed,
                )
            )
            audit = await stack.enter_async_context(
                open_audit_stream(
                    store.connection, events_max=settings.audit_events_max, log=log, on_drop=metrics.audit_dropped
                )
            )
            ledger = LedgerWatch(store.connection, log=log, on_change=metrics.ledger_changed)
            stack.callback(asyncio.create_task(ledger.run()).cancel)
        else:
            log.warning("limit_store_none", meaning="nothing is limited, and no answer is kept for repetition")
        budgets: BudgetService | None = None
        if settings.budget_service_endpoint:
            budgets = await stack.enter_async_context(open_budget_service(settings))
        tokens = TokenCounter()
        if store is not None:
            await asyncio.to_thread(tokens.warm_up, models)
        limiter = Limiter(
            store=store,
            local=local,
            tokens=tokens,
            events=metrics,
            clock_s=time.time,
            monotonic_s=time.monotonic,
            waiting=Places(WAITERS_MAX),
            ledger_is_here=lambda: ledger is None or ledger.is_here,
            budgets=budgets,
        )
        yield Opened(limiter=limiter, audit=audit)
