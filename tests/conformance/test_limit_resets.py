"""One suite for every limit store: a reset lets the next request pass, and sums stay true."""

from __future__ import annotations

import pytest

from limits.model import Admitted, Denied, Settlement
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget, OrganizationId
from tests.harness.limit_cases import Case, a_budget, a_demand, an_organization, limits_for, limits_of

pytestmark = pytest.mark.integration

each_subject = pytest.mark.parametrize("subject", ["org", "key/k1"])


def settlement(request_id: str, org: OrganizationId, *, tokens: int, micro_usd: int) -> Settlement:
    return Settlement(request_id=request_id, organization_id=org, tokens=tokens, micro_usd=micro_usd)


async def remaining(case: Case, org: OrganizationId, limits: CallerLimits) -> list[int]:
    return [each.remaining for each in await case.store.look(org, limits)]


@each_subject
async def test_next_request_passes_after_a_reset_and_sums_stay_true(case: Case, subject: str) -> None:
    org = an_organization()
    budgets = (Budget(period="DAILY", limit_micro_usd=1000, limit_tokens=100), a_budget("MONTHLY", "tokens", 150))
    limits = limits_for(subject, requests_per_second=1, burst=1, tokens_per_minute=100, max_parallel=1, budgets=budgets)
    first = a_demand(org)
    await case.store.admit(first, limits)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    credits = await case.store.reset(org, [subject])
    assert sorted((credit.period.split(":")[1], credit.tokens, credit.micro_usd) for credit in credits) == [
        ("DAILY", 100, 1000),
        ("MONTHLY", 100, 1000),
    ]
    assert [each.remaining for each in await case.store.look(org, limits)] == [1000, 100, 150, 1, 100, 1]
    second = a_demand(org)
    assert isinstance(await case.store.admit(second, limits), Admitted)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    for demand in (first, second):
        await case.store.settle(settlement(demand.request_id, org, tokens=60, micro_usd=600))
    for name, use in case.uses(org).items():
        assert (use["spent_tokens"], use["spent_micro_usd"]) == (120, 1200), name
        assert (use["reserved_tokens"], use["reserved_micro_usd"]) == (0, 0), name


async def test_what_was_open_at_a_reset_makes_no_room_when_it_is_settled(case: Case) -> None:
    org = an_organization()
    limits = limits_for("org", tokens_per_minute=100, budgets=(a_budget("DAILY", "tokens", 100),))
    first, second = a_demand(org), a_demand(org)
    await case.store.admit(first, limits)
    await case.store.reset(org, ["org"])
    await case.store.admit(second, limits)
    await case.store.settle(settlement(first.request_id, org, tokens=1, micro_usd=10))
    budget, bucket = await case.store.look(org, limits)
    assert budget.remaining == 0
    assert bucket.remaining < 50
    await case.store.settle(settlement(second.request_id, org, tokens=1, micro_usd=10))
    budget, bucket = await case.store.look(org, limits)
    assert (budget.remaining, bucket.remaining) == (99, 99)


async def test_what_was_open_at_a_reset_costs_nothing_when_it_used_more(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", budgets=(a_budget("DAILY", "tokens", 100),))
    demand = a_demand(org)
    await case.store.admit(demand, limits)
    await case.store.reset(org, ["org"])
    await case.store.settle(settlement(demand.request_id, org, tokens=1000, micro_usd=10))
    assert await remaining(case, org, limits) == [100]


async def test_second_reset_forgives_what_came_after_the_first(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", budgets=(a_budget("DAILY", "tokens", 1000),))
    await case.store.admit(a_demand(org), limits)
    await case.store.reset(org, ["org"])
    await case.store.admit(a_demand(org, tokens_output=10), limits)
    assert {credit.tokens for credit in await case.store.reset(org, ["org"])} == {20}
    assert {credit.tokens for credit in await case.store.reset(org, ["org"])} == {0}
    assert await remaining(case, org, limits) == [1000]


async def test_reset_of_a_key_leaves_its_organization_as_it_is(case: Case) -> None:
    org = an_organization()
    budget = (a_budget("DAILY", "tokens", 100),)
    limits = limits_of(
        SubjectLimits(subject="org", requests_per_second=1, burst=5, budgets=budget),
        SubjectLimits(subject="key/k1", requests_per_second=1, burst=5, budgets=budget),
    )
    await case.store.admit(a_demand(org), limits)
    await case.store.reset(org, ["key/k1"])
    assert (await remaining(case, org, limits))[:2] == [0, 100]


async def test_reset_of_who_has_used_nothing_credits_nothing(case: Case) -> None:
    assert await case.store.reset(an_organization(), ["org", "key/k1"]) == ()
