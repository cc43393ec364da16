"""What holds of every limit store, whatever happens in whatever order, against one model of it.

A cap is never exceeded while requests use no more than was reserved for them; nothing is ever less than nothing; and
once every request has ended nothing is reserved and nothing runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from limits.model import Admitted, Closing, Demand, Denied, Settlement, charge_to
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget
from tests.conformance.conftest import Servers
from tests.harness.limit_cases import OVERDUE_S, Case, a_case, a_demand, an_organization

pytestmark = pytest.mark.integration

T = TypeVar("T")
PRICE = 7  # micro-dollars for 1,000 tokens, so that costs are rounded
PARALLEL_MAX = 4


def cost(tokens: int) -> int:
    return -(-tokens * PRICE // 1000)


@dataclass(slots=True)
class Request:
    """What the model knows of a request that was admitted: tokens and micro-dollars are reserved or, later, spent."""

    demand: Demand
    granted: int
    tokens: int
    micro_usd: int
    day: int
    state: Literal["open", "expired", "closed", "forgotten"] = "open"
    overdue: bool = False
    forgiven: set[str] = field(default_factory=set)


class Interleavings(RuleBasedStateMachine):
    """Admissions, repetitions, settlements, expiries and resets of one organisation, in any order."""

    requests: Bundle[Request] = Bundle("requests")

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[Case]]) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.opened = opening()
        self.case: Case = self.run(self.opened.__aenter__())
        self.org = an_organization()
        self.all: list[Request] = []
        self.day = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    @initialize(clamp=st.booleans(), micro_usd=st.integers(5, 40), tokens=st.integers(500, 5000))
    def limit(self, clamp: bool, micro_usd: int, tokens: int) -> None:
        self.caps = {"day": micro_usd, "month": 3 * micro_usd, "key": tokens, "parallel": PARALLEL_MAX}
        budgets = (
            Budget(period="DAILY", limit_micro_usd=self.caps["day"]),
            Budget(period="MONTHLY", limit_micro_usd=self.caps["month"]),
        )
        key_budget = Budget(period="DAILY", limit_tokens=tokens)
        self.limits = CallerLimits(
            subjects=(
                SubjectLimits(subject="org", max_parallel=PARALLEL_MAX, budgets=budgets),
                SubjectLimits(subject="key/k1", budgets=(key_budget,)),
            ),
            clamp_output=clamp,
        )

    @rule(target=requests, tokens_input=st.integers(0, 600), each=st.integers(0, 700), choices=st.integers(1, 3))
    def admit(self, tokens_input: int, each: int, choices: int) -> Any:
        asked, left = each * choices, self.left()
        demand = a_demand(
            self.org,
            tokens_input=tokens_input,
            tokens_output=asked,
            micro_usd=cost(tokens_input + asked),
            input_cost=tokens_input * PRICE,
            output_price=PRICE,
            choices=choices,
        )
        admission = self.run(self.case.store.admit(demand, self.limits))
        if isinstance(admission, Denied):
            smallest = tokens_input + (min(asked, choices) if self.limits.clamp_output else asked)
            assert smallest > left["key"] or cost(smallest) > min(left["day"], left["month"]) or left["parallel"] <= 0
            return multiple()
        assert isinstance(admission, Admitted)
        granted, tokens = admission.tokens_output, tokens_input + admission.tokens_output
        assert granted == asked or (self.limits.clamp_output and 0 < granted < asked and granted % choices == 0)
        assert admission.micro_usd == cost(tokens)
        request = Request(demand, granted, tokens, cost(tokens), self.day)
        self.all.append(request)
        return request

    @rule(request=requests)
    def admit_again(self, request: Request) -> None:
        if request.state == "open":
            again = self.run(self.case.store.admit(request.demand, self.limits))
            assert isinstance(again, Admitted)
            assert (again.tokens_output, again.micro_usd) == (request.granted, request.micro_usd)

    @rule(request=requests, share=st.floats(0, 1))
    def settle(self, request: Request, share: float) -> None:
        if request.state == "forgotten":
            return
        tokens = int(share * (request.demand.tokens_input + request.granted))
        settlement = Settlement(
            request_id=request.demand.request_id,
            organization_id=self.org,
            tokens=tokens,
            micro_usd=cost(tokens),
            admitted_s=1,
            charge_to=charge_to(self.limits),
        )
        closing = self.run(self.case.store.settle(settlement))
        if request.state == "closed":
            assert closing == Closing(outcome="repeated", tokens=0, micro_usd=0)
            return
        before = (request.tokens, request.micro_usd) if request.state == "expired" else (0, 0)
        booked = tokens - before[0], cost(tokens) - before[1]
        assert closing == Closing(outcome="settled", tokens=booked[0], micro_usd=booked[1])
        request.state, request.tokens, request.micro_usd = "closed", tokens, cost(tokens)

    @rule(request=requests)
    def expire(self, request: Request) -> None:
        closing = self.run(self.case.store.expire(self.org, request.demand.request_id))
        if request.state == "open" and request.overdue:
            assert closing == Closing(outcome="expired", tokens=request.tokens, micro_usd=request.micro_usd)
            request.state = "expired"
        else:
            assert closing.outcome == ("repeated" if request.state == "closed" else "none")
            assert (closing.tokens, closing.micro_usd) == (0, 0)

    @rule()
    def wait(self) -> None:
        self.case.pass_time(self.org, OVERDUE_S + 1)
        for request in self.all:
            request.overdue = True
            if request.state == "closed":
                request.state = "forgotten"

    @rule()
    def end_day(self) -> None:
        self.case.end_period(self.org, "DAILY")
        self.day += 1

    @rule(subject=st.sampled_from(["org", "key/k1"]))
    def reset(self, subject: str) -> None:
        self.run(self.case.store.reset(self.org, [subject]))
        for request in self.all:
            today = request.day == self.day
            if subject == "org":
                request.forgiven |= {"month", "parallel"} | ({"day"} if today else set())
            elif today:
                request.forgiven.add("key")

    def left(self) -> dict[str, int]:
        """What there is to be of every limit."""
        used = dict.fromkeys(self.caps, 0)
        for request in self.all:
            today = request.day == self.day
            takes = {
                "day": request.micro_usd * today,
                "month": request.micro_usd,
                "key": request.tokens * today,
                "parallel": int(request.state == "open" and not request.overdue),
            }
            for name, amount in takes.items():
                used[name] += 0 if name in request.forgiven else amount
        return {name: cap - used[name] for name, cap in self.caps.items()}

    @invariant()
    def every_figure_is_what_the_model_says_and_no_cap_is_exceeded(self) -> None:
        if hasattr(self, "limits"):
            left = self.left()
            figures = self.run(self.case.store.look(self.org, self.limits))
            names = ("day", "month", "key", "parallel")
            assert [figure.remaining for figure in figures] == [left[name] for name in names]
            assert min(left.values()) >= 0

    @invariant()
    def sums_are_true_and_never_less_than_nothing(self) -> None:
        uses = self.case.uses(self.org)
        assert all(amount >= 0 for use in uses.values() for amount in use.values())
        months = [use for name, use in uses.items() if name.startswith("org:MONTHLY:")]
        opened = [request for request in self.all if request.state == "open"]
        closed = [request for request in self.all if request.state != "open"]
        for use in months:
            assert use["reserved_tokens"] == sum(request.tokens for request in opened)
            assert use["reserved_micro_usd"] == sum(request.micro_usd for request in opened)
            assert use["spent_tokens"] == sum(request.tokens for request in closed)
            assert use["spent_micro_usd"] == sum(request.micro_usd for request in closed)
        assert len(months) == bool(self.all)
        assert self.case.running(self.org) == {request.demand.request_id for request in opened}

    def teardown(self) -> None:
        for request in self.all:
            self.settle(request, 0.5)
        for use in self.case.uses(self.org).values():
            assert (use["reserved_tokens"], use["reserved_micro_usd"]) == (0, 0)
        assert self.case.running(self.org) == set()
        self.run(self.opened.__aexit__(None, None, None))
        self.runner.close()


@pytest.mark.parametrize(("store", "examples"), [("memory", 100), ("valkey", 40)], ids=["memory", "valkey"])
def test_no_interleaving_exceeds_a_cap_or_leaks_a_reservation(
    limit_servers: Servers, store: str, examples: int
) -> None:
    server = limit_servers(store)
    scale = max(1, settings().max_examples // 100)  # the fuzz profile has many more
    run_state_machine_as_test(
        lambda: Interleavings(lambda: a_case(server)),  # type: ignore[arg-type]
        settings=settings(
            max_examples=examples * scale,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
