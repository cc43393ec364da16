"""Time in the limit stores: the calendar of the scripts, a clock that jumps, and waits that are really waited."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest

from limits.model import Admitted, Denied, Settlement
from limits.scripts import ADMIT
from tests.harness.limit_cases import OVERDUE_S, Case, a_case, a_demand, an_organization, limits_for
from tests.harness.valkey import Server

pytestmark = pytest.mark.integration

COMMON = ADMIT.source.partition(b"-- Admits one request")[0]
CALENDAR = b"""
local found = {}
for i = 2, #ARGV do
  local day, month, day_ends_s, month_ends_s = periods_at(tonumber(ARGV[i]))
  for _, value in ipairs({day, month, day_ends_s, month_ends_s}) do found[#found + 1] = value end
end
return found
"""
DAYS = [datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=number) for number in range(0, 366 * 230)]


def periods_of(moment: datetime) -> list[bytes | int]:
    next_day = moment.replace(hour=0, minute=0, second=0) + timedelta(days=1)
    next_month = (moment.replace(day=1, hour=0, minute=0, second=0) + timedelta(days=32)).replace(day=1)
    names = [f"DAILY:{moment:%Y-%m-%d}".encode(), f"MONTHLY:{moment:%Y-%m}".encode()]
    return [*names, int(next_day.timestamp()), int(next_month.timestamp())]


def test_calendar_of_the_scripts_is_the_civil_one(valkey: Server) -> None:
    chance = random.Random(1)
    years_ends = [day for day in DAYS if (day.month, day.day) in {(1, 1), (2, 28), (2, 29), (3, 1), (12, 31)}]
    days = [*years_ends, *chance.sample(DAYS, 5000)]
    moments = [day + timedelta(seconds=second) for day in days for second in (0, chance.randrange(86400), 86399)]
    for start in range(0, len(moments), 1000):
        some = moments[start : start + 1000]
        found = valkey.client.eval(COMMON + CALENDAR, 1, "k", "p", *(f"{moment.timestamp():.0f}" for moment in some))
        for at, moment in enumerate(some):
            assert found[4 * at : 4 * at + 4] == periods_of(moment), moment


# --- A clock that jumps.


@pytest.mark.parametrize("jump_s", [-5, -3600, -86400], ids=["seconds", "an hour", "a day"])
async def test_clock_that_goes_back_takes_nothing_and_stops_no_refill(case: Case, jump_s: int) -> None:
    org, limits = an_organization(), limits_for("org", requests_per_second=1, burst=3, tokens_per_minute=600)
    await case.store.admit(a_demand(org), limits)
    case.pass_time(org, jump_s)
    requests, tokens = await case.store.look(org, limits)
    assert (requests.remaining, tokens.remaining) == (2, 500)
    for _ in range(2):
        assert isinstance(await case.store.admit(a_demand(org, tokens_output=0), limits), Admitted)
    denial = await case.store.admit(a_demand(org), limits)
    assert isinstance(denial, Denied)
    assert denial.wait_ms is not None
    assert denial.wait_ms <= 1001
    case.pass_time(org, denial.wait_ms / 1000)
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)


async def test_clock_that_goes_back_under_denials_stops_no_refill(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", tokens_per_minute=600)
    await case.store.admit(a_demand(org, tokens_input=600, tokens_output=0), limits)
    case.pass_time(org, -3600)
    for _ in range(9):
        denial = await case.store.admit(a_demand(org), limits)
        assert isinstance(denial, Denied)
        case.pass_time(org, 1)
    case.pass_time(org, 1.1)
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)


async def test_clock_that_goes_back_makes_nothing_overdue(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", max_parallel=1)
    demand = a_demand(org)
    await case.store.admit(demand, limits)
    case.pass_time(org, -3600)
    assert await case.store.overdue(org, most=9) == ()
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    assert (await case.store.expire(org, demand.request_id)).outcome == "none"
    settlement = Settlement(request_id=demand.request_id, organization_id=org, tokens=1, micro_usd=1)
    assert (await case.store.settle(settlement)).outcome == "settled"


async def test_clock_that_goes_forward_fills_buckets_and_no_more(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", requests_per_second=1, burst=2, max_parallel=9)
    for _ in range(2):
        await case.store.admit(a_demand(org), limits)
    case.pass_time(org, OVERDUE_S * 100)
    requests, parallel = await case.store.look(org, limits)
    assert (requests.remaining, parallel.remaining) == (2, 9)
    assert len(await case.store.overdue(org, most=9)) == 2


# --- Really waited.


@pytest.mark.parametrize("per_s", [4, 30, 77])
async def test_whoever_really_waits_as_long_as_told_succeeds(valkey: Server, per_s: int) -> None:
    async with a_case(valkey) as case:
        org, limits = an_organization(), limits_for("org", requests_per_second=per_s, burst=1, tokens_per_minute=10**6)
        for _ in range(3):
            assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)
            denial = await case.store.admit(a_demand(org), limits)
            assert isinstance(denial, Denied)
            assert denial.wait_ms is not None
            await asyncio.sleep(denial.wait_ms / 1000)
            assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)
            await case.store.reset(org, ["org"])
