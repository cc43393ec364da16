"""The step that limits: what is asked of the store, what comes of its answers, what holds while it is down."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from extproc.budget_service import BudgetAnswer
from extproc.edit import edited, in_order
from extproc.keys.record import Caller
from extproc.limit import SLOT_TRIES_S, Call, Grant, Limiter, Places, claim_of, limit
from extproc.policy import PolicyTable
from extproc.route import Choice
from extproc.validate import Ask
from gateway import names
from gateway.endpoints import Kind
from gateway.errors import Reason, Refused, StoreUnavailable
from limits.about import About, read
from limits.model import Admission, Admitted, Claimed, Demand, Denied, Figure, LimitKind, StoredAnswer
from policies.limits import ASSUMED_OUTPUT_TOKENS, CallerLimits
from policies.model import Budget, KeyId, LimitPolicy, Limits, OrganizationId, Price, StoreErrors
from tests.unit.extproc.extproc_builders import ENDPOINTS, REQUEST_ID, a_caller, a_limiter, a_table, an_ask
from tests.unit.policies.policy_builders import a_model, a_policy, a_share

ANY_BACKEND = Choice(variant=None, reports_usage=True)
CHAT = '{"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}'
REQUESTS = Figure(LimitKind.REQUESTS, "org", 10, 9, 100)
SPENT = Figure(LimitKind.DAILY_MICRO_USD, "org", 1, 0, 0)
SLOTS = Figure(LimitKind.PARALLEL, "org", 1, 0, 0)
BUDGET = (Budget(period="DAILY", limit_micro_usd=1_000_000),)
TRACE = f"{'a' * 32}-{'b' * 16}"
PRICES = "a=5000,15000,,;b=9000,1000,,"
OUTAGE = StoreUnavailable("the store is down")


@dataclass
class FakeStore:
    """Gives the answers it was told, the last one for ever; remembers what was asked."""

    answers: Sequence[Admission | StoreUnavailable] = ()
    asked: list[tuple[Demand, CallerLimits]] = field(default_factory=list)

    async def admit(self, demand: Demand, limits: CallerLimits) -> Admission:
        self.asked.append((demand, limits))
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if isinstance(answer, StoreUnavailable):
            raise answer
        return answer


@dataclass
class Events:
    """Counts what became of requests."""

    seen: list[str] = field(default_factory=list)

    def admitted(self, seconds: float) -> None:
        self.seen.append("admitted")

    def without_store(self, outcome: str) -> None:
        self.seen.append(outcome)


def admitted(output: int = 100, *more: Figure) -> Admitted:
    return Admitted(at_ms=1_800_000_000_007, tokens_output=output, micro_usd=1, figures=(REQUESTS, *more))


def denied(figure: Figure, wait_ms: int | None) -> Denied:
    return Denied(at_ms=0, wait_ms=wait_ms, denier=figure, figures=(figure,))


def a_limited_table(organization: LimitPolicy | None = None, *, max_output_tokens: int | None = None) -> PolicyTable:
    model = replace(a_model(a_share("a"), a_share("b")), max_output_tokens=max_output_tokens)
    policy = replace(a_policy(model), limits=Limits(default=organization or LimitPolicy()))
    prices = {
        "a": Price(input_micro_usd_per_1k=5000, output_micro_usd_per_1k=15_000),
        "b": Price(input_micro_usd_per_1k=9000, output_micro_usd_per_1k=1000),
    }
    return a_table(policy, prices=prices)


async def limited(
    *answers: Admission | StoreUnavailable,
    body: str = CHAT,
    table: PolicyTable | None = None,
    key: str | None = None,
    caller: Caller | None = None,
    store: FakeStore | None = None,
    **changes: Any,
) -> Grant | StoredAnswer:
    """What the step says where the store answers so."""
    asked = an_ask(body)
    limiter: Limiter = a_limiter(store or FakeStore(answers), **changes)  # type: ignore[arg-type]
    claim = claim_of(ENDPOINTS[Kind.CHAT], asked, body.encode(), key)
    return await limit(
        limiter,
        caller or a_caller(),
        asked,
        ANY_BACKEND,
        table or a_limited_table(),
        call=Call(REQUEST_ID, ENDPOINTS[Kind.CHAT], claim, TRACE),
    )


async def demanded(body: str = CHAT, table: PolicyTable | None = None) -> Demand:
    """What is asked of the store for a body."""
    store = FakeStore([admitted()])
    await limited(body=body, table=table, store=store)
    return store.asked[0][0]


# --- What is asked.


async def test_the_worst_case_is_asked_for_at_the_dearest_backend() -> None:
    demand = await demanded()
    assert (demand.request_id, demand.organization_id, demand.key_id) == (REQUEST_ID, "acme", "alice")
    assert demand.tokens_output == 100
    assert demand.input_cost == demand.tokens_input * 9000
    assert demand.output_price == 15_000
    assert demand.micro_usd == -(-(demand.tokens_input * 9000 + 100 * 15_000) // 1000)


async def test_without_a_maximum_the_models_own_is_asked_for() -> None:
    body = '{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
    assert (await demanded(body, a_limited_table(max_output_tokens=777))).tokens_output == 777
    assert (await demanded(body)).tokens_output == ASSUMED_OUTPUT_TOKENS


async def test_every_answer_that_is_asked_for_counts() -> None:
    demand = await demanded(CHAT[:-1] + ', "n": 3}')
    assert (demand.choices, demand.tokens_output) == (3, 300)


async def test_without_a_store_nothing_is_limited() -> None:
    asked = an_ask(CHAT)
    call = Call(REQUEST_ID, ENDPOINTS[Kind.CHAT])
    grant = await limit(a_limiter(), a_caller(), asked, ANY_BACKEND, a_limited_table(), call=call)
    assert grant == Grant(metadata=((names.METADATA_PRICES, PRICES),))


# --- What comes of it.


async def test_grant_tells_the_ledger_and_the_client_the_figures() -> None:
    grant = await limited(admitted())
    assert isinstance(grant, Grant)
    assert grant.edits == ()
    assert dict(grant.metadata) == {
        names.METADATA_PRICES: PRICES,
        names.METADATA_CHARGE_TO: "org:DAILY org:MONTHLY",
    }
    figures = dict(grant.figures)
    assert figures[names.METADATA_TOKENS_OUTPUT] == "100"
    assert int(figures[names.METADATA_TOKENS_INPUT]) > 0
    assert figures[names.METADATA_ADMITTED_MS] == "1800000000007"
    assert figures["x-ratelimit-remaining-requests"] == "9"
    assert figures[names.METADATA_FIGURES] == "1 org 10 9 100"
    assert str(grant.tokens_input) == figures[names.METADATA_TOKENS_INPUT]


async def test_entry_keeps_what_a_usage_record_needs() -> None:
    policy = "d" * 64
    table = replace(a_limited_table(), digest=policy)
    kept = read((await demanded(table=table)).about)
    assert kept == About(model="m", endpoint="chat", policy=policy, prices=PRICES, trace=TRACE)


async def test_output_that_was_cut_is_told_to_the_backend() -> None:
    grant = await limited(admitted(42))
    assert isinstance(grant, Grant)
    assert edited(CHAT, in_order(grant.edits)) == CHAT.replace("100", "42")


async def test_cut_output_is_shared_by_the_answers() -> None:
    body = CHAT[:-1] + ', "n": 3}'
    grant = await limited(admitted(90), body=body)
    assert isinstance(grant, Grant)
    assert '"max_tokens": 30' in edited(body, in_order(grant.edits))


@pytest.mark.parametrize(
    ("clamp", "figures", "told"),
    [(True, (SPENT,), True), (True, (), False), (False, (SPENT,), False)],
    ids=["clamped", "no budget", "not clamped"],
)
async def test_where_a_budget_clamps_output_a_request_without_a_maximum_gets_one(
    clamp: bool, figures: tuple[Figure, ...], told: bool
) -> None:
    table = a_limited_table(LimitPolicy(clamp_output=clamp))
    body = '{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
    grant = await limited(admitted(ASSUMED_OUTPUT_TOKENS, *figures), body=body, table=table)
    assert isinstance(grant, Grant)
    assert (f'"max_completion_tokens":{ASSUMED_OUTPUT_TOKENS}' in edited(body, in_order(grant.edits))) == told


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (denied(REQUESTS, 10), Reason.REQUEST_RATE),
        (denied(SPENT, None), Reason.BUDGET_SPENT),
        (Claimed(state="running"), Reason.IN_PROGRESS),
        (Claimed(state="mismatch"), Reason.IDEMPOTENCY_MISMATCH),
    ],
    ids=["rate", "budget", "running", "mismatch"],
)
async def test_what_is_in_the_way_refuses(answer: Admission, reason: Reason) -> None:
    with pytest.raises(Refused) as refused:
        await limited(answer)
    assert refused.value.reason is reason
    denied_by = answer.figures if isinstance(answer, Denied) else ()
    assert getattr(refused.value, "figures", ()) == denied_by


async def test_kept_answer_comes_back() -> None:
    kept = StoredAnswer(status=200, headers=(), body=b"again")
    assert await limited(Claimed(state="done", answer=kept), key="k") is kept


# --- Parallel requests.


async def test_a_slot_that_frees_in_a_moment_is_waited_for() -> None:
    store = FakeStore([denied(SLOTS, 1000), admitted()])
    assert isinstance(await limited(store=store), Grant)
    assert len(store.asked) == 2
    assert store.asked[0] == store.asked[1]


async def test_a_slot_that_does_not_free_is_waited_for_only_so_often() -> None:
    store = FakeStore([denied(SLOTS, 1000)])
    with pytest.raises(Refused) as refused:
        await limited(store=store)
    assert refused.value.reason is Reason.PARALLEL_REQUESTS
    assert len(store.asked) == 1 + len(SLOT_TRIES_S)


async def test_only_so_many_wait_for_slots() -> None:
    store = FakeStore([denied(SLOTS, 1000)])
    with pytest.raises(Refused):
        await limited(store=store, waiting=Places(0))
    assert len(store.asked) == 1


# --- Idempotency keys.


def test_claim_is_of_the_key_and_its_fingerprint_of_path_and_body() -> None:
    chat, embedding = ENDPOINTS[Kind.CHAT], ENDPOINTS[Kind.EMBEDDING]
    one, again = (claim_of(chat, an_ask(CHAT), CHAT.encode(), "k") for _ in range(2))
    assert one == again
    assert one is not None
    other_body = claim_of(chat, an_ask(CHAT), CHAT.encode() + b" ", "k")
    other_path = claim_of(embedding, an_ask(CHAT), CHAT.encode(), "k")
    other_key = claim_of(chat, an_ask(CHAT), CHAT.encode(), "K")
    assert other_body is not None
    assert other_path is not None
    assert other_key is not None
    assert other_body.key == other_path.key == one.key != other_key.key
    assert len({one.fingerprint, other_body.fingerprint, other_path.fingerprint}) == 3


def test_request_id_of_an_inference_is_its_key_in_any_case() -> None:
    def of(ask: Ask) -> str:
        claim = claim_of(ENDPOINTS[Kind.INFERENCE], ask, b"{}", "header")
        assert claim is not None
        return claim.key

    ask = an_ask('{"model": "m", "prompt": "hi"}', path="/v1/completions")
    header = claim_of(ENDPOINTS[Kind.CHAT], an_ask(CHAT), b"{}", f"request_id {REQUEST_ID}")
    assert header is not None
    assert of(ask) != header.key


def test_no_key_no_claim() -> None:
    assert claim_of(ENDPOINTS[Kind.CHAT], an_ask(CHAT), b"{}", None) is None


@pytest.mark.parametrize("key", ["", "k" * 256], ids=len)
def test_key_of_a_wrong_length_is_refused(key: str) -> None:
    with pytest.raises(Refused) as refused:
        claim_of(ENDPOINTS[Kind.CHAT], an_ask(CHAT), b"{}", key)
    assert refused.value.param == "idempotency-key"


# --- While the store is down.

RATE = LimitPolicy(requests_per_second=1, burst=2)


async def outcome(policy: LimitPolicy, times: int = 1) -> list[str]:
    """What becomes of so many requests in an outage."""
    events, table = Events(), a_limited_table(policy)
    limiter_parts = {"events": events, "local": a_limiter().local}
    for _ in range(times):
        with contextlib.suppress(Refused):
            grant = await limited(OUTAGE, table=table, key="k", **limiter_parts)
            assert isinstance(grant, Grant)
            assert grant.claim is None
            assert dict(grant.figures).keys() == {
                names.METADATA_TOKENS_INPUT,
                names.METADATA_TOKENS_OUTPUT,
                names.METADATA_ADMITTED_MS,
            }
    return events.seen


async def test_rates_are_counted_by_each_worker_unless_the_policy_says_otherwise() -> None:
    assert await outcome(RATE, times=3) == ["local", "local", "local_denied"]


async def test_budgets_deny_unless_the_policy_says_otherwise() -> None:
    assert await outcome(LimitPolicy(budgets=BUDGET)) == ["denied"]


@pytest.mark.parametrize("policy", [LimitPolicy(budgets=BUDGET), RATE], ids=["deny", "local"])
async def test_refusal_in_an_outage_has_the_outage_as_its_cause(policy: LimitPolicy) -> None:
    """So the ledger learns that an entry may be open."""
    table, local = a_limited_table(policy), a_limiter().local
    for _ in range(2):
        local.take(
            OrganizationId("acme"), table.limits.for_caller(OrganizationId("acme"), KeyId("alice")), tokens=0, now_s=0
        )
    with pytest.raises(Refused) as refused:
        await limited(OUTAGE, table=table, local=local, clock_s=lambda: 0.0)
    assert isinstance(refused.value.__cause__, StoreUnavailable)


@pytest.mark.parametrize(
    ("errors", "seen"),
    [
        (StoreErrors(rates="deny"), "denied"),
        (StoreErrors(rates="allow"), "denied"),
        (StoreErrors(rates="allow", budgets="allow"), "allowed"),
        (StoreErrors(budgets="allow"), "local"),
    ],
    ids=["deny rates", "deny budgets", "allow both", "allow budgets"],
)
async def test_each_class_has_its_own_word(errors: StoreErrors, seen: str) -> None:
    policy = LimitPolicy(requests_per_second=1, budgets=BUDGET, on_store_error=errors)
    assert await outcome(policy) == [seen]


async def test_without_the_store_the_moment_of_the_admission_is_the_workers() -> None:
    grant = await limited(OUTAGE, clock_s=lambda: 1_800_000_000.0625)
    assert isinstance(grant, Grant)
    assert dict(grant.figures)[names.METADATA_ADMITTED_MS] == "1800000000062"


async def test_whoever_has_no_limits_is_let_through() -> None:
    assert await outcome(LimitPolicy(on_store_error=StoreErrors(rates="deny"))) == ["allowed"]


# --- The budget service.


@dataclass
class FakeBudgets:
    answer: BudgetAnswer | StoreUnavailable

    async def check(self, organization_id: str) -> BudgetAnswer:
        assert organization_id == "acme"
        if isinstance(self.answer, StoreUnavailable):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("quota_type", "reason"),
    [("TOKENS", Reason.QUOTA_SPENT), ("currency", Reason.BUDGET_SPENT), ("", Reason.BUDGET_SPENT)],
)
async def test_budget_service_has_the_last_word(quota_type: str, reason: Reason) -> None:
    store = FakeStore([admitted()])
    answer = BudgetAnswer(allowed=False, current_usage=12.5, limit=12, quota_type=quota_type)
    with pytest.raises(Refused, match=r"12\.5 of 12") as refused:
        await limited(store=store, budgets=FakeBudgets(answer))
    assert refused.value.reason is reason
    assert store.asked == []


async def test_budget_service_that_allows_is_no_obstacle() -> None:
    assert isinstance(await limited(admitted(), budgets=FakeBudgets(BudgetAnswer(allowed=True))), Grant)


async def test_budget_service_that_is_down_refuses_unless_the_policy_allows() -> None:
    with pytest.raises(Refused) as refused:
        await limited(admitted(), budgets=FakeBudgets(OUTAGE))
    assert refused.value.reason is Reason.LIMIT_STORE_DOWN
    table = a_limited_table(LimitPolicy(on_store_error=StoreErrors(budgets="allow")))
    assert isinstance(await limited(admitted(), table=table, budgets=FakeBudgets(OUTAGE)), Grant)
