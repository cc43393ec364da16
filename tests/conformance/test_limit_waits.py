"""What a denial tells of waiting is true, from whatever state the buckets are in."""

from __future__ import annotations

from random import Random

import pytest

from limits.model import Admitted, Denied, Settlement
from policies.limits import CallerLimits, SubjectLimits
from policies.model import OrganizationId
from tests.harness.limit_cases import Case, a_demand, an_organization, limits_of

STATES = 200
TRIES = 400
"""A bucket that has not run dry by then holds more than this test takes."""


def some_limits(random: Random) -> CallerLimits:
    """Rates of an organisation and of a key, some of them missing, between one in a minute and a thousand a second."""

    def subject(name: str) -> SubjectLimits:
        per_s = random.choice([None, 1, 3, 7, 100, 1000])
        return SubjectLimits(
            subject=name,
            requests_per_second=per_s,
            burst=None if per_s is None else random.randint(1, 40),
            tokens_per_minute=random.choice([None, 1, 59, 60, 1000, 77_777]),
        )

    organization, key = subject("org"), subject("key/k1")
    if organization.requests_per_second is None and organization.tokens_per_minute is None:
        return limits_of(SubjectLimits(subject="org", requests_per_second=5, burst=5), key)
    return limits_of(organization, key)


async def until_denied(case: Case, org: OrganizationId, limits: CallerLimits, random: Random) -> Denied | None:
    """Requests of all sizes, some settled for less or for more, with pauses between them, until one is denied."""
    for _ in range(TRIES):
        demand = a_demand(org, tokens_input=random.randint(0, 50), tokens_output=random.choice([0, 1, 30, 500, 90_000]))
        admission = await case.store.admit(demand, limits)
        if isinstance(admission, Denied):
            case.pass_time(org, (admission.wait_ms or 0) / 1000)
            assert isinstance(await case.store.admit(demand, limits), Admitted), (limits, admission)
            return admission
        if random.random() < 0.3:
            used = random.randint(0, 2 * (demand.tokens_input + demand.tokens_output))
            ended = Settlement(request_id=demand.request_id, organization_id=org, tokens=used, micro_usd=0)
            await case.store.settle(ended)
        if random.random() < 0.1:
            case.pass_time(org, random.choice([0.001, 0.0333, 0.5]))
    return None


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_waits_as_long_as_told_succeeds_from_any_state(case: Case, seed: int) -> None:
    random = Random(seed)
    denials = 0
    for _ in range(STATES // 4):
        denial = None
        while denial is None:
            denial = await until_denied(case, an_organization(), some_limits(random), random)
        assert denial.wait_ms is not None
        denials += 1
    assert denials == STATES // 4
