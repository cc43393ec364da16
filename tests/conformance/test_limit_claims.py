"""One suite for every limit store: an idempotency key is held by one request, and its answer is kept."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from limits.model import Admitted, Claim, Claimed, Demand, Denied, Settlement, StoredAnswer
from policies.model import OrganizationId
from tests.harness.limit_cases import CLAIM_KEPT_S, OVERDUE_S, Case, a_budget, a_demand, an_organization, limits_for

pytestmark = pytest.mark.integration

LIMITS = limits_for(
    "org", requests_per_second=50, burst=50, max_parallel=10, budgets=(a_budget("DAILY", "tokens", 1000),)
)
ANSWER = StoredAnswer(status=200, headers=(("content-type", "text/plain"), ("x-ä", "ö")), body=b"\x00\r\n\xff body")


def used(demand: Demand) -> Settlement:
    return Settlement(request_id=demand.request_id, organization_id=demand.organization_id, tokens=40, micro_usd=400)


def claiming(org: OrganizationId, *, fingerprint: str = "f1", **changes: Any) -> Demand:
    return a_demand(org, claim=Claim(key="c1", fingerprint=fingerprint), **changes)


async def test_key_is_held_while_its_request_runs_and_what_meets_it_changes_nothing(case: Case) -> None:
    org = an_organization()
    assert isinstance(await case.store.admit(claiming(org), LIMITS), Admitted)
    before = case.kept(org)
    assert await case.store.admit(claiming(org), LIMITS) == Claimed(state="running")
    assert await case.store.admit(claiming(org, fingerprint="f2"), LIMITS) == Claimed(state="mismatch")
    assert case.kept(org) == before
    assert isinstance(await case.store.admit(claiming(an_organization()), LIMITS), Admitted)


async def test_same_request_again_meets_its_own_key(case: Case) -> None:
    org = an_organization()
    demand = claiming(org)
    await case.store.admit(demand, LIMITS)
    assert isinstance(await case.store.admit(demand, LIMITS), Admitted)


@pytest.mark.parametrize("settled", ["before", "after", "never"])
async def test_answer_is_repeated_as_long_as_it_is_kept_and_nothing_is_charged(case: Case, settled: str) -> None:
    org = an_organization()
    demand = claiming(org)
    await case.store.admit(demand, LIMITS)
    if settled == "before":
        assert await case.store.finish(org, demand.request_id, "c1", ANSWER)
        await case.store.settle(used(demand))
    else:
        assert await case.store.finish(org, demand.request_id, "c1", ANSWER)
        if settled == "after":
            await case.store.settle(used(demand))
    before = case.kept(org)
    assert await case.store.admit(claiming(org), LIMITS) == Claimed(state="done", answer=ANSWER)
    assert await case.store.admit(demand, LIMITS) == Claimed(state="done", answer=ANSWER)
    assert await case.store.admit(claiming(org, fingerprint="f2"), LIMITS) == Claimed(state="mismatch")
    assert case.kept(org) == before
    case.pass_time(org, CLAIM_KEPT_S + 1)
    assert isinstance(await case.store.admit(claiming(org), LIMITS), Admitted)


async def test_answer_that_was_too_large_is_remembered_as_that(case: Case) -> None:
    org = an_organization()
    demand = claiming(org)
    await case.store.admit(demand, LIMITS)
    assert await case.store.finish(org, demand.request_id, "c1", "too_large")
    await case.store.settle(used(demand))
    assert await case.store.admit(claiming(org), LIMITS) == Claimed(state="too_large")
    case.pass_time(org, CLAIM_KEPT_S + 1)
    assert isinstance(await case.store.admit(claiming(org), LIMITS), Admitted)


@pytest.mark.parametrize("freed", ["let go", "settled", "expired", "overdue"])
async def test_key_whose_request_ends_without_an_answer_is_free(
    case: Case, freed: Literal["let go", "settled", "expired", "overdue"]
) -> None:
    org = an_organization()
    demand = claiming(org)
    await case.store.admit(demand, LIMITS)
    if freed == "let go":
        assert await case.store.finish(org, demand.request_id, "c1", None)
    elif freed == "settled":
        await case.store.settle(used(demand))
    else:
        case.pass_time(org, OVERDUE_S + 1)
        if freed == "expired":
            await case.store.expire(org, demand.request_id)
    assert isinstance(await case.store.admit(claiming(org, fingerprint="f2"), LIMITS), Admitted)


async def test_only_the_request_that_holds_a_key_can_finish_it_and_only_once(case: Case) -> None:
    org = an_organization()
    demand = claiming(org)
    assert not await case.store.finish(org, demand.request_id, "c1", ANSWER)
    await case.store.admit(demand, LIMITS)
    assert not await case.store.finish(org, "somebody", "c1", ANSWER)
    assert not await case.store.finish(org, "somebody", "c1", None)
    assert await case.store.finish(org, demand.request_id, "c1", ANSWER)
    for answer in (ANSWER, "too_large", None):
        assert not await case.store.finish(org, demand.request_id, "c1", answer)
    assert await case.store.admit(claiming(org), LIMITS) == Claimed(state="done", answer=ANSWER)


async def test_settlement_leaves_the_key_of_another_request_alone(case: Case) -> None:
    org = an_organization()
    first, second = claiming(org), claiming(org)
    await case.store.admit(first, LIMITS)
    await case.store.finish(org, first.request_id, "c1", None)
    await case.store.admit(second, LIMITS)
    await case.store.settle(used(first))
    assert await case.store.admit(claiming(org), LIMITS) == Claimed(state="running")


async def test_denied_request_holds_no_key(case: Case) -> None:
    org = an_organization()
    none = limits_for("org", budgets=(a_budget("DAILY", "tokens", 1),))
    assert isinstance(await case.store.admit(claiming(org), none), Denied)
    assert isinstance(await case.store.admit(claiming(org, fingerprint="f2"), LIMITS), Admitted)
