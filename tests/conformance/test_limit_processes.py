"""Two processes ask one store for the same at once: exactly as many are let through as there is for."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import redis

from gateway.telemetry import get_logger
from limits.model import Admitted, Demand, Settlement
from limits.valkey import open_limits
from policies.limits import CallerLimits
from policies.model import OrganizationId
from tests.harness.limit_cases import DEADLINE_S, a_budget, a_demand, limits_for
from tests.harness.valkey import Server

pytestmark = pytest.mark.integration

ENOUGH_FOR = 37
EACH = 250
COST, TOKENS = 1550, 110
ORG = OrganizationId("crowded")
BUDGETS = {
    "micro-dollars": limits_for("org", budgets=(a_budget("DAILY", "micro_usd", (ENOUGH_FOR + 1) * COST - 1),)),
    "tokens of a key": limits_for("key/k1", budgets=(a_budget("MONTHLY", "tokens", (ENOUGH_FOR + 1) * TOKENS - 1),)),
    "parallel requests": limits_for("org", max_parallel=ENOUGH_FOR),
}
BUCKETS = {
    "requests": (limits_for("org", requests_per_second=1, burst=ENOUGH_FOR), 1.0),
    "tokens a minute": (limits_for("key/k1", tokens_per_minute=ENOUGH_FOR * TOKENS), ENOUGH_FOR * TOKENS / 60 / TOKENS),
}


def crowd(address: str, socket: str, name: str, limits: CallerLimits) -> list[tuple[str, int]]:
    """Ids and times of the requests that one process got through, of many that it made at once."""

    async def run() -> list[tuple[str, int]]:
        def demand(number: int) -> Demand:
            return a_demand(
                ORG, request_id=f"{name}-{number}", tokens_input=10, tokens_output=TOKENS - 10, micro_usd=COST
            )

        async with open_limits(address, log=get_logger(), deadline_s=DEADLINE_S) as store:
            client = redis.Redis(unix_socket_path=socket)
            client.rpush("ready", name)
            client.blpop(["go"])
            answers = await asyncio.gather(*(store.admit(demand(number), limits) for number in range(EACH)))
            return [(f"{name}-{n}", each.at_ms) for n, each in enumerate(answers) if isinstance(each, Admitted)]

    return asyncio.run(run())


def admitted_by_two(valkey: Server, limits: CallerLimits) -> list[tuple[str, int]]:
    valkey.client.flushall()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        running = [processes.submit(crowd, valkey.address, str(valkey.socket), name, limits) for name in "ab"]
        for _ in running:
            assert valkey.client.blpop(["ready"], 15)
        valkey.client.rpush("go", 1, 2)
        return list(itertools.chain.from_iterable(each.result(60) for each in running))


@pytest.mark.parametrize("limits", BUDGETS.values(), ids=BUDGETS)
async def test_exactly_as_many_pass_as_there_is_for_and_not_a_micro_dollar_more(
    valkey: Server, limits: CallerLimits
) -> None:
    admitted = await asyncio.to_thread(admitted_by_two, valkey, limits)
    assert len(admitted) == ENOUGH_FOR
    (month,) = valkey.client.scan_iter("router:{crowded}:spend:org:MONTHLY:*")
    assert valkey.use(month)["reserved_micro_usd"] == ENOUGH_FOR * COST
    assert valkey.use(month)["reserved_tokens"] == ENOUGH_FOR * TOKENS
    async with open_limits(valkey.address, log=get_logger(), deadline_s=DEADLINE_S) as store:
        for request_id, _ in admitted:
            settlement = Settlement(request_id=request_id, organization_id=ORG, tokens=TOKENS, micro_usd=COST)
            assert (await store.settle(settlement)).outcome == "settled"
    use = valkey.use(month)
    assert (use["spent_micro_usd"], use["reserved_micro_usd"]) == (ENOUGH_FOR * COST, 0)


@pytest.mark.parametrize(("limits", "more_per_s"), BUCKETS.values(), ids=BUCKETS)
async def test_bucket_gives_what_it_holds_and_what_runs_in_meanwhile(
    valkey: Server, limits: CallerLimits, more_per_s: float
) -> None:
    admitted = await asyncio.to_thread(admitted_by_two, valkey, limits)
    times_ms = [at_ms for _, at_ms in admitted]
    ran_in = more_per_s * (max(times_ms) - min(times_ms) + 1) / 1000
    assert ENOUGH_FOR <= len(admitted) <= ENOUGH_FOR + ran_in
