"""The seam between whoever limits, settles or shows, and the store that counts. One suite runs against each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from limits.model import Admission, Closing, Credit, Demand, Figure, Opened, Settlement, StoredAnswer
from policies.limits import CallerLimits
from policies.model import OrganizationId

BudgetUnit = Literal["micro_usd", "tokens"]


class LimitStore(Protocol):
    """Counts what organisations and keys use. Every method raises StoreUnavailable when there is no answer in time."""

    async def admit(self, demand: Demand, limits: CallerLimits, /) -> Admission:
        """Check every limit and count the request in all of them, or in none. The same request again counts once."""
        ...

    async def look(self, organization_id: OrganizationId, limits: CallerLimits, /) -> tuple[Figure, ...]:
        """Every figure as it is now; changes nothing."""
        ...

    async def settle(self, settlement: Settlement, /) -> Closing:
        """Close a request's entry with what it used. Again: changes nothing."""
        ...

    async def overdue(self, organization_id: OrganizationId, /, *, most: int) -> tuple[str, ...]:
        """Request ids of open entries whose deadline has passed, the oldest first."""
        ...

    async def opened(self, organization_id: OrganizationId, request_id: str, /) -> Opened | None:
        """What is kept of an open request; None where it is not open."""
        ...

    async def extend(self, organization_id: OrganizationId, request_id: str, /) -> bool:
        """The request still runs: put off when it is overdue. False where it is not open."""
        ...

    async def expire(self, organization_id: OrganizationId, request_id: str, /) -> Closing:
        """Close an overdue entry with what was reserved; a later settlement corrects it."""
        ...

    async def finish(
        self,
        organization_id: OrganizationId,
        request_id: str,
        claim_key: str,
        answer: StoredAnswer | Literal["too_large"] | None,
        /,
    ) -> bool:
        """Keep the answer that an idempotency key led to, or with None let the key go; False when it was not held."""
        ...

    async def reset(self, organization_id: OrganizationId, subjects: Sequence[str], /) -> tuple[Credit, ...]:
        """Forget what the subjects have used."""
        ...

    async def set_budget(
        self,
        organization_id: OrganizationId,
        subject: str,
        period: Literal["DAILY", "MONTHLY"],
        unit: BudgetUnit,
        limit: int | None,
        /,
    ) -> None:
        """Put a budget in the place of the policy's; None: the policy's again."""
        ...

    async def organizations(self) -> tuple[OrganizationId, ...]:
        """Organisations that have used the store."""
        ...
