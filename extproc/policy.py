"""The policy as a worker uses it: a table swapped by one assignment, while a request keeps the one it began with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gateway.settings import LAST_GOOD_FILE, CommonSettings
from gateway.telemetry import Logger
from policies.candidates import PolicyIndex
from policies.limits import LimitIndex
from policies.load import PolicyRejected, load, load_or_last_good
from policies.model import BackendId, ModelName, OrganizationId, Policy, Price
from policies.price import FREE, dearest, written
from policies.watch import watch

COSTS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a model's answers may cost: ``prices`` of the candidates, ``dearest`` of each, all in a line for the ledger.

    ``max_output_tokens`` None: the policy does not say.
    """

    prices: Mapping[str, Price]
    dearest: Price
    written: str
    max_output_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTable:
    """What decisions look up. ``silent`` backends report no usage; ``loaded_at`` is unix seconds.

    ``digest`` is the policy's.
    """

    index: PolicyIndex
    limits: LimitIndex
    prices: Mapping[str, Price]
    silent: frozenset[BackendId]
    loaded_at: int
    digest: str = ""
    _costs: dict[tuple[OrganizationId, ModelName, frozenset[BackendId] | None], Costs] = field(default_factory=dict)

    def costs(self, organization_id: OrganizationId, model: ModelName, variant: frozenset[BackendId] | None) -> Costs:
        """Costs of a model that the organisation has, over the backends of a variant; worked out once."""
        key = (organization_id, model, variant)
        found = self._costs.get(key)
        if found is None:
            if len(self._costs) >= COSTS_MAX:
                self._costs.clear()
            found = self._costs[key] = self._work_out(*key)
        return found

    def _work_out(
        self, organization_id: OrganizationId, model: ModelName, variant: frozenset[BackendId] | None
    ) -> Costs:
        resolved = self.index.lookup(organization_id, model)
        backends = [w.backend_id for w in resolved.entry.backends] if resolved is not None else []
        among = [backend for backend in backends if variant is None or backend in variant]
        prices: dict[str, Price] = {backend: self.prices.get(backend, FREE) for backend in among}
        return Costs(
            prices=prices,
            dearest=dearest(prices.values()),
            written=written(prices),
            max_output_tokens=self.index.max_output_tokens(organization_id, model),
        )


def table_of(policy: Policy, *, now_s: float) -> PolicyTable:
    """The table of a policy."""
    return PolicyTable(
        index=PolicyIndex(policy),
        limits=LimitIndex(policy.limits),
        prices={backend.id: backend.price for backend in policy.backends if backend.price is not None},
        silent=frozenset(backend.id for backend in policy.backends if not backend.reports_usage),
        loaded_at=int(now_s),
        digest=policy.digest,
    )


class FollowedPolicy:
    """The policy directory's table; a rejected edit leaves the last good one in force."""

    def __init__(self, settings: CommonSettings, *, log: Logger) -> None:
        """Load the directory, or the control plane's last good copy of it.

        Raises:
            PolicyRejected: there is neither.
        """
        self._settings = settings
        self._log = log
        start = load_or_last_good(settings.policy_dir, settings.backend_endpoints, settings.state_path / LAST_GOOD_FILE)
        if start.problems:
            log.warning("policy_rejected", problems=[str(problem) for problem in start.problems], in_force="last_good")
        self._bundle = start.loaded.bundle
        self._table = table_of(start.loaded.policy, now_s=time.time())
        log.info("policy_in_force", digest=start.loaded.policy.digest)

    def table(self) -> PolicyTable:
        """The table in force."""
        return self._table

    async def follow(self) -> None:
        """Swap the table whenever the directory changes, until cancelled."""
        async for change in watch(self._settings.policy_dir, loaded=self._bundle):
            try:
                loaded = await asyncio.to_thread(load, change.usable(), self._settings.backend_endpoints)
            except PolicyRejected as rejected:
                self._log.warning("policy_rejected", problems=[str(problem) for problem in rejected.problems])
                continue
            self._table = table_of(loaded.policy, now_s=time.time())
            self._log.info("policy_in_force", digest=loaded.policy.digest)
