"""The policy as a worker uses it: a table swapped by one assignment, while a request keeps the one it began with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.settings import LAST_GOOD_FILE, CommonSettings
from gateway.telemetry import Logger
from policies.candidates import PolicyIndex
from policies.load import PolicyRejected, load, load_or_last_good
from policies.model import BackendId, Policy, Price
from policies.watch import watch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTable:
    """What decisions look up. ``silent`` backends report no usage; ``loaded_at`` is unix seconds."""

    index: PolicyIndex
    prices: Mapping[str, Price]
    silent: frozenset[BackendId]
    loaded_at: int


def table_of(policy: Policy, *, now_s: float) -> PolicyTable:
    """The table of a policy."""
    return PolicyTable(
        index=PolicyIndex(policy),
        prices={backend.id: backend.price for backend in policy.backends if backend.price is not None},
        silent=frozenset(backend.id for backend in policy.backends if not backend.reports_usage),
        loaded_at=int(now_s),
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
