"""What the budget service says of an organisation: ``GET /v1/budgets/{organization}/check``.

A busy organisation never waits for it: an answer is asked for again before it is too old, and while the service fails
the last good one serves for a minute. Source: contract, "Other services".
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Final
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from extproc.http_service import HttpService, service_client
from extproc.keys.store import ASK, Ask
from extproc.shared_calls import SharedCalls
from gateway.errors import StoreUnavailable
from gateway.settings import ExtprocSettings
from gateway.telemetry import Logger, get_logger

NAME: Final = "budget-service"
REFRESH_SHARE: Final = 0.5
"""The part of its time after which an answer that is used is asked for again."""
STALE_S: Final = 60.0
"""How old an answer may be that serves while the service fails."""
RETRY_S: Final = 1.0
"""Between two tries for one organisation while the service fails."""
ORGANIZATIONS_MAX: Final = 10_000
CALLS_MAX: Final = 256
_REFUSALS: Final = frozenset({402, 403, 429})
"""Statuses under which ``{"allowed": false}`` is an answer rather than a fault."""
_QUOTA_TYPE_MAX: Final = 64
_REASON_MAX: Final = 256

_Number = int | Annotated[float, Field(allow_inf_nan=False)]


class _Answer(BaseModel):
    """What the service answers; fields that are not named here are its own business."""

    model_config = ConfigDict(strict=True, extra="ignore")

    allowed: bool
    current_usage: _Number | None = None
    limit: _Number | None = None
    quota_type: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetAnswer:
    """The service's word; '' where it says nothing. The figures are in its own unit, which ``quota_type`` may name."""

    allowed: bool
    current_usage: int | float | None = None
    limit: int | float | None = None
    quota_type: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The last good answer and when it was asked for; since when, if at all, the service fails to give a newer one."""

    answer: BudgetAnswer | None
    asked_at_s: float
    retry_at_s: float = 0.0
    error: str = ""


class BudgetService:
    """Answers of the service, kept for ``ttl_s``, of ``size`` organisations at most. ``clock`` is monotonic seconds."""

    def __init__(
        self,
        service: HttpService,
        *,
        ttl_s: float,
        log: Logger,
        size: int = ORGANIZATIONS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._ttl_s = ttl_s
        self._log = log
        self._size = size
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._calls: SharedCalls[str, BudgetAnswer] = SharedCalls(service.name, most=CALLS_MAX)
        self._is_down = False

    def __len__(self) -> int:
        return len(self._kept)

    def peek(self, organization_id: str) -> BudgetAnswer | Ask:
        """What is known without waiting, or ASK. May begin to ask for a newer answer."""
        kept = self._kept.get(organization_id)
        if kept is None or kept.answer is None:
            return ASK
        self._kept.move_to_end(organization_id)
        now_s = self._clock()
        age_s = now_s - kept.asked_at_s
        if age_s >= self._ttl_s and (not kept.error or age_s >= STALE_S):
            return ASK
        if age_s >= self._ttl_s * REFRESH_SHARE and now_s >= kept.retry_at_s:
            self._refresh(organization_id)
        return kept.answer

    async def check(self, organization_id: str) -> BudgetAnswer:
        """The service's word on an organisation; all who ask meanwhile share one call.

        Raises:
            StoreUnavailable: the service gave no usable answer, and none is known that is recent enough.
        """
        found = self.peek(organization_id)
        if found is not ASK:
            return found
        kept = self._kept.get(organization_id)
        if kept is not None and self._clock() < kept.retry_at_s:
            raise StoreUnavailable(kept.error)
        try:
            return await self._calls.share(organization_id, lambda: self._look_up(organization_id))
        except StoreUnavailable:
            if kept is None or kept.answer is None or self._clock() - kept.asked_at_s >= STALE_S:
                raise
            return kept.answer

    async def close(self) -> None:
        """Cancel the calls under way; their callers get StoreUnavailable."""
        await self._calls.close()

    def _refresh(self, organization_id: str) -> None:
        try:
            self._calls.start(organization_id, lambda: self._look_up(organization_id))
        except StoreUnavailable:
            return  # too much is being asked already; what is kept serves on

    async def _look_up(self, organization_id: str) -> BudgetAnswer:
        asked_at_s = self._clock()
        try:
            status, body = await self._service.call("GET", _path(organization_id))
            answer = _read(status, body)
        except StoreUnavailable as error:
            self._failed(organization_id, str(error))
            raise
        self._keep(organization_id, _Kept(answer=answer, asked_at_s=asked_at_s))
        if self._is_down:
            self._is_down = False
            self._log.info("budget_service_up")
        return answer

    def _failed(self, organization_id: str, error: str) -> None:
        kept = self._kept.get(organization_id) or _Kept(answer=None, asked_at_s=0.0)
        self._keep(organization_id, replace(kept, retry_at_s=self._clock() + RETRY_S, error=error))
        if not self._is_down:
            self._is_down = True
            self._log.error("budget_service_down", error=error)

    def _keep(self, organization_id: str, kept: _Kept) -> None:
        self._kept[organization_id] = kept
        self._kept.move_to_end(organization_id)
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)


def _path(organization_id: str) -> str:
    written = quote(organization_id, safe="")
    if not written.strip("."):  # "." and ".." would be steps of a path
        written = written.replace(".", "%2E")
    return f"/v1/budgets/{written}/check"


def _read(status: int, body: bytes) -> BudgetAnswer:
    if status != httpx.codes.OK and status not in _REFUSALS:
        raise StoreUnavailable(f"{NAME}: status {status}")
    try:
        answer = _Answer.model_validate_json(body)
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, e["loc"][:1])) or "body" for e in error.errors()}))
        raise StoreUnavailable(f"{NAME}: malformed answer, status {status}: {fields}") from None
    if answer.allowed and status != httpx.codes.OK:
        raise StoreUnavailable(f"{NAME}: 'allowed' with status {status}")
    return BudgetAnswer(
        allowed=answer.allowed,
        current_usage=answer.current_usage,
        limit=answer.limit,
        quota_type=(answer.quota_type or "")[:_QUOTA_TYPE_MAX],
        reason=(answer.reason or "")[:_REASON_MAX],
    )


@asynccontextmanager
async def open_budget_service(settings: ExtprocSettings) -> AsyncIterator[BudgetService]:
    """The service at BUDGET_SERVICE_ENDPOINT, which may be down.

    Raises:
        ValueError: the address is not http or https.
    """
    async with service_client() as client:
        service = HttpService(
            client,
            name=NAME,
            variable="BUDGET_SERVICE_ENDPOINT",
            url=settings.budget_service_endpoint,
            timeout_s=settings.budget_service_timeout_s,
        )
        budgets = BudgetService(service, ttl_s=settings.budget_service_ttl_s, log=get_logger())
        try:
            yield budgets
        finally:
            await budgets.close()
