"""What the store knows of an organisation beside its figures: for those who look, not for those who admit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import hiredis

from gateway.errors import StoreUnavailable
from limits import scripts
from limits.model import LimitKind
from limits.resp import pack
from limits.store import BudgetUnit
from limits.valkey import ValkeyLimits
from policies.model import OrganizationId

BUDGETS: Final[Mapping[LimitKind, tuple[Literal["DAILY", "MONTHLY"], BudgetUnit]]] = {
    LimitKind.DAILY_MICRO_USD: ("DAILY", "micro_usd"),
    LimitKind.DAILY_TOKENS: ("DAILY", "tokens"),
    LimitKind.MONTHLY_MICRO_USD: ("MONTHLY", "micro_usd"),
    LimitKind.MONTHLY_TOKENS: ("MONTHLY", "tokens"),
}
_KINDS: Final = {f"{period}:{unit}": kind for kind, (period, unit) in BUDGETS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """``at_ms`` is the store's unix time. ``budgets`` are those in the place of the policy's, by subject and kind."""

    at_ms: int
    has_used: bool
    open_requests: int
    budgets: Mapping[tuple[str, LimitKind], int]


async def read_standing(store: ValkeyLimits, organization_id: OrganizationId) -> Standing:
    """One round trip.

    Raises:
        StoreUnavailable: there is no answer in time.
    """
    start, call = scripts.prefix(organization_id), store.connection.call
    time = call(pack(b"TIME"))
    has_used = call(pack(b"SISMEMBER", scripts.ORGANIZATIONS, organization_id.encode()))
    open_requests = call(pack(b"ZCARD", start + b"open"))
    budgets = call(pack(b"HGETALL", start + b"budgets"))
    seconds, micro_s = _checked(await time)
    return Standing(
        at_ms=int(seconds) * 1000 + int(micro_s) // 1000,
        has_used=bool(_checked(await has_used)),
        open_requests=_checked(await open_requests),
        budgets=_budgets(_checked(await budgets)),
    )


def _checked(reply: Any) -> Any:
    if isinstance(reply, hiredis.ReplyError):
        raise StoreUnavailable(str(reply))
    return reply


def _budgets(fields: list[bytes]) -> dict[tuple[str, LimitKind], int]:
    """Budgets by what :meth:`ValkeyLimits.set_budget` calls them: ``<subject>:<period>:<unit>``."""
    found: dict[tuple[str, LimitKind], int] = {}
    for at in range(0, len(fields), 2):
        subject, period, unit = fields[at].decode().rsplit(":", 2)
        found[subject, _KINDS[f"{period}:{unit}"]] = int(fields[at + 1])
    return found
