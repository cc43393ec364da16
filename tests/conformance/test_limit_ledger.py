"""One suite for every limit store: entries are opened once and closed once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.errors import StoreUnavailable
from limits.model import Admitted, Closing, Demand, Denied, Opened, Settlement, charge_to
from policies.limits import SubjectLimits
from policies.model import Budget, OrganizationId
from tests.harness.limit_cases import (
    OVERDUE_S,
    Case,
    a_budget,
    a_case,
    a_demand,
    an_organization,
    limits_for,
    limits_of,
)
from tests.harness.valkey import Server

pytestmark = pytest.mark.integration

LIMITS = limits_of(
    SubjectLimits(
        subject="org",
        requests_per_second=50,
        burst=50,
        tokens_per_minute=100_000,
        max_parallel=10,
        budgets=(Budget(period="DAILY", limit_micro_usd=10_000, limit_tokens=1000),),
    ),
    SubjectLimits(subject="key/k1", max_parallel=10, budgets=(a_budget("MONTHLY", "tokens", 1000),)),
)
NOTHING = {"spent_tokens": 0, "spent_micro_usd": 0, "reserved_tokens": 0, "reserved_micro_usd": 0}


def sums(case: Case, org: OrganizationId) -> dict[str, int]:
    """What every period of the organisation and of its key holds: the same in each."""
    periods = [{name: use[name] for name in NOTHING} for use in case.uses(org).values()]
    assert all(period == periods[0] for period in periods)
    return periods[0] if periods else dict(NOTHING)


def used(demand: Demand, *, tokens: int = 40, micro_usd: int = 400, **fields: Any) -> Settlement:
    return Settlement(
        request_id=demand.request_id,
        organization_id=demand.organization_id,
        tokens=tokens,
        micro_usd=micro_usd,
        **fields,
    )


async def test_entry_is_open_until_it_is_settled_and_then_nothing_is_left_of_it(case: Case) -> None:
    org = an_organization()
    demand = a_demand(org)
    await case.store.admit(demand, LIMITS)
    assert case.running(org) == {demand.request_id}
    assert sums(case, org) == NOTHING | {"reserved_tokens": 100, "reserved_micro_usd": 1000}
    assert await case.store.settle(used(demand)) == Closing(outcome="settled", tokens=40, micro_usd=400)
    assert case.running(org) == set()
    assert sums(case, org) == NOTHING | {"spent_tokens": 40, "spent_micro_usd": 400}


async def test_same_request_again_counts_once_and_is_answered_the_same(case: Case) -> None:
    org = an_organization()
    demand = a_demand(org)
    first = await case.store.admit(demand, LIMITS)
    assert isinstance(first, Admitted)
    before = case.kept(org)
    await asyncio.sleep(0.002)
    again = await case.store.admit(demand, LIMITS)
    assert isinstance(again, Admitted)
    assert (again.at_ms, again.tokens_output, again.micro_usd) == (first.at_ms, first.tokens_output, first.micro_usd)
    assert [each[:3] for each in again.figures] == [each[:3] for each in first.figures]
    assert all(0 <= b.remaining - a.remaining < 50 for a, b in zip(first.figures, again.figures, strict=True))
    assert case.kept(org) == before


async def test_same_request_again_is_granted_what_it_was_granted_though_nothing_is_left(case: Case) -> None:
    org = an_organization()
    limits = limits_of(SubjectLimits(subject="org", budgets=(a_budget("DAILY", "tokens", 60),)), clamp_output=True)
    demand = a_demand(org)
    for _ in range(2):
        admission = await case.store.admit(demand, limits)
        assert isinstance(admission, Admitted)
        assert (admission.tokens_output, admission.micro_usd, admission.figures[0].remaining) == (50, 600, 0)


@pytest.mark.parametrize("closed", ["settled", "expired"])
async def test_request_whose_entry_is_closed_is_not_admitted_again(case: Case, closed: str) -> None:
    org = an_organization()
    demand = a_demand(org)
    await case.store.admit(demand, LIMITS)
    if closed == "settled":
        await case.store.settle(used(demand))
    else:
        case.pass_time(org, OVERDUE_S + 1)
        await case.store.expire(org, demand.request_id)
    before = case.kept(org)
    with pytest.raises(StoreUnavailable):
        await case.store.admit(demand, LIMITS)
    assert case.kept(org) == before


async def test_second_settlement_changes_nothing(case: Case) -> None:
    org = an_organization()
    demand = a_demand(org)
    await case.store.admit(demand, LIMITS)
    await case.store.settle(used(demand))
    before = case.kept(org)
    assert await case.store.settle(used(demand)) == Closing(outcome="repeated", tokens=0, micro_usd=0)
    assert await case.store.settle(used(demand, tokens=9)) == Closing(outcome="repeated", tokens=0, micro_usd=0)
    assert await case.store.expire(org, demand.request_id) == Closing(outcome="repeated", tokens=0, micro_usd=0)
    assert case.kept(org) == before


async def test_only_what_is_overdue_expires_with_what_was_reserved(case: Case) -> None:
    org = an_organization()
    demand = a_demand(org)
    await case.store.admit(demand, LIMITS)
    assert await case.store.expire(org, demand.request_id) == Closing(outcome="none", tokens=0, micro_usd=0)
    assert await case.store.overdue(org, most=10) == ()
    case.pass_time(org, OVERDUE_S + 1)
    assert await case.store.overdue(org, most=10) == (demand.request_id,)
    expected = Closing(outcome="expired", tokens=100, micro_usd=1000)
    assert await case.store.expire(org, demand.request_id) == expected
    assert await case.store.expire(org, demand.request_id) == Closing(outcome="none", tokens=0, micro_usd=0)
    assert await case.store.overdue(org, most=10) == ()
    assert case.running(org) == set()
    assert sums(case, org) == NOTHING | {"spent_tokens": 100, "spent_micro_usd": 1000}


async def test_oldest_overdue_entries_come_first_and_no_more_than_asked_for(case: Case) -> None:
    org = an_organization()
    demands = [a_demand(org) for _ in range(5)]
    for demand in demands:
        await case.store.admit(demand, LIMITS)
        case.pass_time(org, 2)
    case.pass_time(org, OVERDUE_S - 3)
    ids = tuple(demand.request_id for demand in demands)
    assert await case.store.overdue(org, most=3) == ids[:3]
    assert await case.store.overdue(org, most=10) == ids[:4]


@pytest.mark.parametrize(("tokens", "micro_usd"), [(40, 400), (100, 1000), (170, 1700)], ids=["less", "same", "more"])
async def test_late_settlement_corrects_an_expired_entry_once(case: Case, tokens: int, micro_usd: int) -> None:
    org = an_organization()
    demand = a_demand(org)
    await case.store.admit(demand, LIMITS)
    case.pass_time(org, OVERDUE_S + 1)
    await case.store.expire(org, demand.request_id)
    late = used(demand, tokens=tokens, micro_usd=micro_usd)
    correction = Closing(outcome="settled", tokens=tokens - 100, micro_usd=micro_usd - 1000)
    assert await case.store.settle(late) == correction
    assert (await case.store.settle(late)).outcome == "repeated"
    assert sums(case, org) == NOTHING | {"spent_tokens": tokens, "spent_micro_usd": micro_usd}


async def test_settlement_that_is_overdue_but_not_expired_counts_as_any(case: Case) -> None:
    org = an_organization()
    demand = a_demand(org)
    await case.store.admit(demand, LIMITS)
    case.pass_time(org, OVERDUE_S + 1)
    assert (await case.store.settle(used(demand))).outcome == "settled"
    assert (await case.store.expire(org, demand.request_id)).outcome == "repeated"
    assert sums(case, org) == NOTHING | {"spent_tokens": 40, "spent_micro_usd": 400}


async def test_unknown_entry_does_not_expire(case: Case) -> None:
    org = an_organization()
    assert (await case.store.expire(org, "nobody")).outcome == "none"
    assert case.uses(org) == {}


# --- Requests that were let through without the store.


async def test_request_without_entry_is_charged_once_to_the_periods_of_its_admission(case: Case) -> None:
    org = an_organization()
    limits = limits_for("key/a b%c:d", budgets=(a_budget("DAILY", "tokens", 1),))
    admitted = datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)
    demand = a_demand(org)
    late = used(demand, admitted_s=int(admitted.timestamp()), charge_to=charge_to(limits))
    assert await case.store.settle(late) == Closing(outcome="charged", tokens=40, micro_usd=400)
    assert (await case.store.settle(late)).outcome == "repeated"
    assert set(case.uses(org)) == {
        "org:DAILY:2024-02-29",
        "org:MONTHLY:2024-02",
        "key/a b%c:d:DAILY:2024-02-29",
    }
    assert sums(case, org) == NOTHING | {"spent_tokens": 40, "spent_micro_usd": 400}


async def test_request_without_entry_and_without_charge_leaves_no_sum(case: Case) -> None:
    org = an_organization()
    assert (await case.store.settle(used(a_demand(org)))).outcome == "charged"
    assert case.uses(org) == {}


async def test_organizations_are_those_that_were_admitted(case: Case) -> None:
    admitted, denied = an_organization(), an_organization()
    await case.store.admit(a_demand(admitted), LIMITS)
    await case.store.look(denied, LIMITS)
    assert admitted in await case.store.organizations()
    assert denied not in await case.store.organizations()


@pytest.mark.parametrize("name", ["a b", "a:b", "{a}", "ä%", "*", "a\nb", "key/x", "{}"])
async def test_names_with_odd_characters_are_names_like_any(case: Case, name: str) -> None:
    org = OrganizationId(f"{an_organization()}{name}")
    limits = limits_for(
        f"key/{name}", tokens_per_minute=6000, max_parallel=5, budgets=(a_budget("DAILY", "tokens", 150),)
    )
    demand = a_demand(org)
    assert isinstance(await case.store.admit(demand, limits), Admitted)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    await case.store.settle(used(demand))
    assert case.running(org) == set()
    assert sums(case, org) == NOTHING | {"spent_tokens": 40, "spent_micro_usd": 400}
    (credit, _) = sorted(await case.store.reset(org, [f"key/{name}", "org"]), key=lambda credit: len(credit.period))[:2]
    assert credit.tokens == 40
    assert org in await case.store.organizations()


# --- A server that has lost some keys.


async def test_sums_that_were_lost_never_become_less_than_nothing(valkey: Server) -> None:
    async with a_case(valkey) as case:
        org = an_organization()
        first, second = a_demand(org), a_demand(org)
        for demand in (first, second):
            await case.store.admit(demand, LIMITS)
        case.pass_time(org, OVERDUE_S + 1)
        await case.store.expire(org, second.request_id)
        valkey.client.delete(*valkey.client.scan_iter("router:*:spend:*"))
        await case.store.settle(used(second))
        assert sums(case, org) == NOTHING
        await case.store.settle(used(first))
        assert sums(case, org) == NOTHING | {"spent_tokens": 40, "spent_micro_usd": 400}
        assert case.running(org) == set()


async def test_every_key_but_what_is_open_goes_with_time(valkey: Server) -> None:
    async with a_case(valkey) as case:
        org = an_organization()
        closed, opened, late = a_demand(org), a_demand(org), a_demand(org)
        for demand in (closed, late):
            await case.store.admit(demand, LIMITS)
        case.pass_time(org, OVERDUE_S + 1)
        await case.store.expire(org, late.request_id)
        await case.store.settle(used(closed))
        await case.store.reset(org, ["org"])
        await case.store.admit(opened, LIMITS)
        await case.store.settle(used(a_demand(org), admitted_s=1, charge_to=charge_to(LIMITS)))
        for _ in range(102):
            case.pass_time(org, 86_400)
        start = f"router:{{{org}}}:".encode()
        expected = {b"open", f"entry:{opened.request_id}".encode(), b"parallel:org", b"parallel:key/k1"}
        assert {key.removeprefix(start) for key in valkey.client.scan_iter(start + b"*")} == expected


# --- Requests that are still open.


async def test_what_is_kept_of_an_open_request_is_what_was_reserved_for_it(case: Case) -> None:
    org = an_organization()
    demand = replace(a_demand(org), about='["m","é"]')
    admission = await case.store.admit(demand, LIMITS)
    assert isinstance(admission, Admitted)
    opened = await case.store.opened(org, demand.request_id)
    assert opened == Opened(
        request_id=demand.request_id,
        organization_id=org,
        key_id=demand.key_id,
        admitted_ms=admission.at_ms,
        tokens_input=demand.tokens_input,
        tokens_output=admission.tokens_output,
        micro_usd=admission.micro_usd,
        about=demand.about,
    )


@pytest.mark.parametrize("closed", ["never opened", "settled", "expired"])
async def test_a_request_that_is_not_open_is_neither_shown_nor_put_off(case: Case, closed: str) -> None:
    org = an_organization()
    demand = a_demand(org)
    if closed != "never opened":
        await case.store.admit(demand, LIMITS)
    if closed == "settled":
        await case.store.settle(used(demand))
    if closed == "expired":
        case.pass_time(org, OVERDUE_S + 1)
        await case.store.expire(org, demand.request_id)
    before = case.kept(org)
    assert await case.store.opened(org, demand.request_id) is None
    assert await case.store.extend(org, demand.request_id) is False
    assert case.kept(org) == before


async def test_a_request_that_is_heard_of_is_not_overdue(case: Case) -> None:
    org = an_organization()
    heard, silent = a_demand(org), a_demand(org)
    await case.store.admit(heard, LIMITS)
    await case.store.admit(silent, LIMITS)
    case.pass_time(org, OVERDUE_S - 1)
    assert await case.store.extend(org, heard.request_id) is True
    case.pass_time(org, 2)
    assert await case.store.overdue(org, most=9) == (silent.request_id,)
    assert (await case.store.expire(org, heard.request_id)).outcome == "none"
    case.pass_time(org, OVERDUE_S)
    assert set(await case.store.overdue(org, most=9)) == {heard.request_id, silent.request_id}
    assert (await case.store.settle(used(heard))).outcome == "settled"


async def test_a_request_that_is_heard_of_keeps_its_slot(case: Case) -> None:
    org = an_organization()
    limits = limits_for("org", max_parallel=1)
    running = a_demand(org)
    await case.store.admit(running, limits)
    case.pass_time(org, OVERDUE_S - 1)
    await case.store.extend(org, running.request_id)
    case.pass_time(org, 2)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
