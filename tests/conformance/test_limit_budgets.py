"""One suite for every limit store: budgets, what they cut, and what is set in their place."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest

from limits.model import Admission, Admitted, Denied, Figure, LimitKind, Settlement
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget, OrganizationId
from tests.harness.limit_cases import (
    Case,
    a_budget,
    a_demand,
    an_organization,
    limits_for,
    limits_of,
)

pytestmark = pytest.mark.integration

Period = Literal["DAILY", "MONTHLY"]
Unit = Literal["micro_usd", "tokens"]
KINDS: dict[tuple[Period, Unit], LimitKind] = {
    ("DAILY", "micro_usd"): LimitKind.DAILY_MICRO_USD,
    ("DAILY", "tokens"): LimitKind.DAILY_TOKENS,
    ("MONTHLY", "micro_usd"): LimitKind.MONTHLY_MICRO_USD,
    ("MONTHLY", "tokens"): LimitKind.MONTHLY_TOKENS,
}
PER_REQUEST = {"micro_usd": 1000, "tokens": 100}
each_budget = pytest.mark.parametrize(("period", "unit"), KINDS, ids=["-".join(kind) for kind in KINDS])
each_subject = pytest.mark.parametrize("subject", ["org", "key/k1"])


def budget_for(subject: str, period: Period, unit: Unit, limit: int) -> CallerLimits:
    return limits_for(subject, budgets=(a_budget(period, unit, limit),))


def only_figure(admission: Admission) -> Figure:
    assert isinstance(admission, Admitted | Denied)
    (found,) = admission.figures
    return found


def settlement(request_id: str, org: OrganizationId, *, tokens: int, micro_usd: int) -> Settlement:
    return Settlement(request_id=request_id, organization_id=org, tokens=tokens, micro_usd=micro_usd)


async def remaining(case: Case, org: OrganizationId, limits: CallerLimits) -> list[int]:
    return [each.remaining for each in await case.store.look(org, limits)]


@each_budget
@each_subject
async def test_budget_pays_for_so_many_requests_and_waiting_does_not_help(
    case: Case, subject: str, period: Period, unit: Unit
) -> None:
    org, limits = an_organization(), budget_for(subject, period, unit, 3 * PER_REQUEST[unit] + 1)
    for left in (2, 1, 0):
        admission = await case.store.admit(a_demand(org), limits)
        assert isinstance(admission, Admitted)
        found = only_figure(admission)
        assert found[:3] == (KINDS[period, unit], subject, 3 * PER_REQUEST[unit] + 1)
        assert found.remaining == left * PER_REQUEST[unit] + 1
    denial = await case.store.admit(a_demand(org), limits)
    assert isinstance(denial, Denied)
    assert denial.wait_ms is None
    assert denial.denier == only_figure(denial)
    assert denial.denier.remaining == 1


@each_budget
async def test_period_ends_when_the_figure_says_so(case: Case, period: Period, unit: Unit) -> None:
    org, limits = an_organization(), budget_for("org", period, unit, 10**6)
    admission = await case.store.admit(a_demand(org), limits)
    assert isinstance(admission, Admitted)
    ends_ms = admission.at_ms + only_figure(admission).reset_ms
    (name,) = [name for name in case.uses(org) if f":{period}:" in name]
    began = datetime.strptime((name.rpartition(":")[2] + "-01")[:10], "%Y-%m-%d").replace(tzinfo=UTC)
    last_day = began.day if period == "DAILY" else monthrange(began.year, began.month)[1]
    assert datetime.fromtimestamp(ends_ms / 1000, UTC) == began.replace(day=last_day) + timedelta(days=1)


@each_budget
@each_subject
async def test_settlement_gives_back_what_was_not_used(case: Case, subject: str, period: Period, unit: Unit) -> None:
    org, limits = an_organization(), budget_for(subject, period, unit, PER_REQUEST[unit])
    first, second = a_demand(org), a_demand(org, tokens_output=20, micro_usd=300)
    await case.store.admit(first, limits)
    assert isinstance(await case.store.admit(second, limits), Denied)
    await case.store.settle(settlement(first.request_id, org, tokens=70, micro_usd=700))
    assert isinstance(await case.store.admit(second, limits), Admitted)
    assert await remaining(case, org, limits) == [0]


async def test_budget_is_spent_to_the_last_micro_dollar(case: Case) -> None:
    org, limits = an_organization(), budget_for("org", "DAILY", "micro_usd", 1001)
    assert isinstance(await case.store.admit(a_demand(org, micro_usd=1000), limits), Admitted)
    assert isinstance(await case.store.admit(a_demand(org, micro_usd=2), limits), Denied)
    assert isinstance(await case.store.admit(a_demand(org, micro_usd=1), limits), Admitted)


async def test_large_sums_stay_exact(case: Case) -> None:
    org, limits = an_organization(), budget_for("org", "MONTHLY", "micro_usd", 10**15)
    for micro_usd in (999_999_999_999, 3, 999_999_999_998):
        demand = a_demand(org, micro_usd=micro_usd)
        await case.store.admit(demand, limits)
        await case.store.settle(settlement(demand.request_id, org, tokens=1, micro_usd=micro_usd - 1))
    assert await remaining(case, org, limits) == [10**15 - 1_999_999_999_997]


async def test_what_is_overspent_denies_all_but_what_is_free(case: Case) -> None:
    org, limits = an_organization(), budget_for("org", "DAILY", "micro_usd", 1000)
    demand = a_demand(org)
    await case.store.admit(demand, limits)
    await case.store.settle(settlement(demand.request_id, org, tokens=500, micro_usd=5000))
    assert await remaining(case, org, limits) == [-4000]
    assert isinstance(await case.store.admit(a_demand(org, micro_usd=1), limits), Denied)
    assert isinstance(await case.store.admit(a_demand(org, micro_usd=0), limits), Admitted)


async def test_budget_outweighs_a_rate_and_the_first_budget_tells(case: Case) -> None:
    org = an_organization()
    spent = Budget(period="DAILY", limit_micro_usd=1000, limit_tokens=100)
    limits = limits_of(SubjectLimits(subject="org", requests_per_second=1, burst=1, max_parallel=1, budgets=(spent,)))
    await case.store.admit(a_demand(org), limits)
    denial = await case.store.admit(a_demand(org), limits)
    assert isinstance(denial, Denied)
    assert (denial.wait_ms, denial.denier.kind) == (None, LimitKind.DAILY_MICRO_USD)


@each_budget
async def test_denial_by_a_budget_changes_nothing(case: Case, period: Period, unit: Unit) -> None:
    org = an_organization()
    limits = limits_of(
        SubjectLimits(subject="org", requests_per_second=9, burst=9, tokens_per_minute=9999, max_parallel=9),
        SubjectLimits(subject="key/k1", budgets=(a_budget(period, unit, PER_REQUEST[unit]),)),
    )
    await case.store.admit(a_demand(org), limits)
    before = case.kept(org)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    assert case.kept(org) == before


# --- A request belongs to the period of its admission.


@each_budget
@each_subject
async def test_next_period_begins_whole_and_late_settlements_go_to_the_one_before(
    case: Case, subject: str, period: Period, unit: Unit
) -> None:
    org, limits = an_organization(), budget_for(subject, period, unit, PER_REQUEST[unit])
    demand = a_demand(org)
    await case.store.admit(demand, limits)
    (before,) = [name for name in case.uses(org) if name.startswith(f"{subject}:{period}:")]
    case.end_period(org, period)
    assert await remaining(case, org, limits) == [PER_REQUEST[unit]]
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)
    await case.store.settle(settlement(demand.request_id, org, tokens=7, micro_usd=77))
    assert await remaining(case, org, limits) == [0]
    uses = {name: use for name, use in case.uses(org).items() if name.startswith(f"{subject}:{period}:")}
    assert len(uses) == 2
    (old,) = [use for use in uses.values() if use["spent_tokens"]]
    assert (old["spent_tokens"], old["spent_micro_usd"], old["reserved_tokens"], old["reserved_micro_usd"]) == (
        7,
        77,
        0,
        0,
    )
    assert before in uses


# --- The output is cut to what the budgets pay for.


CUT: list[Any] = [
    pytest.param(a_budget("DAILY", "tokens", 60), 1, (50, 600), id="tokens"),
    pytest.param(a_budget("DAILY", "micro_usd", 655), 1, (55, 650), id="money, rounded down"),
    pytest.param(a_budget("MONTHLY", "micro_usd", 110), 1, (1, 110), id="one token"),
    pytest.param(a_budget("DAILY", "tokens", 60), 3, (48, 580), id="answers get the same"),
    pytest.param(Budget(period="DAILY", limit_tokens=99, limit_micro_usd=400), 1, (30, 400), id="the tighter of two"),
    pytest.param(a_budget("DAILY", "tokens", 1000), 1, (90, 1000), id="enough for all"),
]


@pytest.mark.parametrize(("budget", "choices", "expected"), CUT)
@each_subject
async def test_output_is_cut_to_what_the_budget_pays_for(
    case: Case, subject: str, budget: Budget, choices: int, expected: tuple[int, int]
) -> None:
    org = an_organization()
    limits = limits_for(subject, budgets=(budget,))
    cutting = CallerLimits(subjects=limits.subjects, clamp_output=True)
    admission = await case.store.admit(a_demand(org, choices=choices), cutting)
    assert isinstance(admission, Admitted)
    assert (admission.tokens_output, admission.micro_usd) == expected
    if expected != (90, 1000):
        assert isinstance(await case.store.admit(a_demand(org, choices=choices), limits), Denied)


@pytest.mark.parametrize(
    "budget", [a_budget("DAILY", "tokens", 10), a_budget("DAILY", "micro_usd", 109), a_budget("DAILY", "tokens", 5)]
)
async def test_where_nothing_is_left_to_cut_to_the_whole_request_is_denied(case: Case, budget: Budget) -> None:
    org = an_organization()
    limits = limits_of(SubjectLimits(subject="org", budgets=(budget,)), clamp_output=True)
    denial = await case.store.admit(a_demand(org), limits)
    assert isinstance(denial, Denied)
    assert only_figure(denial).remaining == only_figure(denial).limit


async def test_request_without_output_is_not_cut(case: Case) -> None:
    org = an_organization()
    limits = limits_of(SubjectLimits(subject="org", budgets=(a_budget("DAILY", "tokens", 10),)), clamp_output=True)
    admission = await case.store.admit(a_demand(org, tokens_output=0), limits)
    assert isinstance(admission, Admitted)
    assert (admission.tokens_output, admission.micro_usd) == (0, 1000)


# --- Budgets set in the place of the policy's.


@each_budget
@each_subject
async def test_budget_set_takes_the_place_of_the_policys_until_it_is_taken_back(
    case: Case, subject: str, period: Period, unit: Unit
) -> None:
    org, limits = an_organization(), budget_for(subject, period, unit, PER_REQUEST[unit])
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    await case.store.set_budget(org, subject, period, unit, 2 * PER_REQUEST[unit])
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    await case.store.set_budget(org, subject, period, unit, 0)
    assert await remaining(case, org, limits) == [-2 * PER_REQUEST[unit]]
    await case.store.set_budget(org, subject, period, unit, None)
    assert await remaining(case, org, limits) == [-PER_REQUEST[unit]]


@each_budget
@each_subject
async def test_budget_is_set_where_the_policy_has_none(case: Case, subject: str, period: Period, unit: Unit) -> None:
    org = an_organization()
    admission = await case.store.admit(a_demand(org), limits_of())
    assert isinstance(admission, Admitted)
    assert admission.figures == ()
    await case.store.set_budget(org, subject, period, unit, 2 * PER_REQUEST[unit])
    # An organisation's use is counted all the time, a key's from the time when it has a budget.
    expected = [Admitted, Denied] if subject == "org" else [Admitted, Admitted, Denied]
    assert [type(await case.store.admit(a_demand(org), limits_of())) for _ in expected] == expected
    await case.store.set_budget(org, subject, period, unit, None)
    assert isinstance(await case.store.admit(a_demand(org), limits_of()), Admitted)
