"""The step that asks whether a request may use what it asks for: one atomic call to the limit store.

The estimate is the input's tokens and the most that the model may answer with, at the dearest backend. What the store
does with it is in docs/limits.md; what holds while the store is down says the policy's ``on_store_error``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from extproc.access_log import of_limits
from extproc.budget_service import BudgetAnswer
from extproc.edit import Edit
from extproc.keys.record import Caller
from extproc.limit_answers import Headers, admitted_or_refused, rate_headers, refused_by, refused_by_service
from extproc.local_rates import LocalRates
from extproc.policy import Costs, PolicyTable
from extproc.route import Choice
from extproc.tokens import Output, TokenCounter, clamp, output_asked
from extproc.validate import Ask
from gateway import names
from gateway.endpoints import Endpoint
from gateway.errors import Reason, Refused, StoreUnavailable
from limits.about import About
from limits.model import (
    BUDGET_PERIODS,
    Admission,
    Admitted,
    Claim,
    Demand,
    Denied,
    Figure,
    LimitKind,
    StoredAnswer,
    charge_to,
)
from limits.store import LimitStore
from policies.limits import ASSUMED_OUTPUT_TOKENS, CallerLimits
from policies.price import micro_usd_of

MICRO_USD_MAX: Final = 10**15
"""More than any budget: where a request's cost is cut, so that the store's sums stay exact."""
IDEMPOTENCY_KEY_MAX: Final = 255
SLOT_TRIES_S: Final = (0.02, 0.05, 0.1)
"""Waits before a parallel limit denies: a client may be back before the access log has told of its request's end."""
WAITERS_MAX: Final = 256


class BudgetService(Protocol):
    """Another service's word on an organisation's budget."""

    async def check(self, organization_id: str, /) -> BudgetAnswer:
        """Its word. Raises StoreUnavailable."""
        ...


class LimitEvents(Protocol):
    """Counts what the limit store's state did to requests."""

    def admitted(self, seconds: float) -> None:
        """The store has answered, within so long."""

    def without_store(self, outcome: str) -> None:
        """The store is down: a request was ``allowed``, counted here (``local``, ``local_denied``) or ``denied``."""


class Places:
    """At most so many at a time; nobody waits for a place."""

    def __init__(self, most: int) -> None:
        self._free = most

    def acquire(self) -> bool:
        """Take a place; False when there is none."""
        if self._free <= 0:
            return False
        self._free -= 1
        return True

    def release(self) -> None:
        """Give the place back."""
        self._free += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limiter:
    """What limits are applied with; the same for every request of a worker. ``store`` None: nothing is limited."""

    store: LimitStore | None
    local: LocalRates
    tokens: TokenCounter
    events: LimitEvents
    clock_s: Callable[[], float]
    monotonic_s: Callable[[], float]
    waiting: Places
    ledger_is_here: Callable[[], bool]
    budgets: BudgetService | None = None


class Call(NamedTuple):
    """How a request came: ``trace`` is ``<trace id>-<span id>``, or '' where it is not traced."""

    request_id: str
    endpoint: Endpoint
    claim: Claim | None = None
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a request may use.

    ``edits`` tell the backend the most that each answer may have, where that is less than what the client said.
    ``metadata`` and ``figures`` are for the access log. ``claim`` is held until the answer is kept or the key let go.
    ``tokens_input`` None: nobody has counted.
    """

    edits: tuple[Edit, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    figures: Headers = ()
    claim: Claim | None = None
    tokens_input: int | None = None


def claim_of(endpoint: Endpoint, ask: Ask, body: bytes, idempotency_key: str | None) -> Claim | None:
    """What a request claims by its idempotency key: ``request_id`` of /v1/inference, the header elsewhere.

    Raises:
        Refused: INVALID_FIELD, the header is not 1 to 255 characters.
    """
    if ask.inference is not None:
        key = f"request_id {ask.inference.request_id.lower()}"
    elif idempotency_key is None:
        return None
    elif 0 < len(idempotency_key) <= IDEMPOTENCY_KEY_MAX:
        key = f"header {idempotency_key}"
    else:
        text = f"Idempotency-Key must have 1 to {IDEMPOTENCY_KEY_MAX} characters."
        raise Refused(Reason.INVALID_FIELD, text, param=names.HEADER_IDEMPOTENCY_KEY)
    fingerprint = hashlib.sha256(endpoint.path.encode() + b"\0" + body)
    return Claim(key=hashlib.sha256(key.encode()).hexdigest()[:32], fingerprint=fingerprint.hexdigest()[:32])


async def limit(
    limiter: Limiter,
    caller: Caller,
    ask: Ask,
    choice: Choice,
    table: PolicyTable,
    *,
    call: Call,
) -> Grant | StoredAnswer:
    """Count a request in every limit that holds for its caller; or the answer kept for its idempotency key.

    Raises:
        Refused: a limit is in the way, the idempotency key is taken, or limits cannot be checked and must be.
    """
    # Only the ledger knows which requests have ended.
    limits = table.limits.for_caller(caller.organization_id, caller.key_id, parallel=limiter.ledger_is_here())
    if limiter.budgets is not None:
        await _ask_budget_service(limiter.budgets, caller, limits)
    costs = table.costs(caller.organization_id, ask.model, choice.variant)
    if limiter.store is None:
        return Grant(metadata=((names.METADATA_PRICES, costs.written),))
    asked = output_asked(
        ask.kind, ask.document.members, model_max=costs.max_output_tokens, assumed=ASSUMED_OUTPUT_TOKENS
    )
    tokens_input = await limiter.tokens.count_input(ask)
    about = _about(ask, call, table, costs)
    demand = _demand(caller, call, about, costs=costs, asked=asked, tokens_input=tokens_input)
    try:
        admission = await _admit(limiter, limiter.store, demand, limits)
    except StoreUnavailable as error:
        _without_store(limiter, demand, limits, error)
        return _grant(limits, costs, ask, asked, demand=demand, admitted=int(limiter.clock_s() * 1000))
    admitted = admitted_or_refused(admission)
    if isinstance(admitted, StoredAnswer):
        return admitted
    return _grant(limits, costs, ask, asked, demand=demand, admitted=admitted)


def _about(ask: Ask, call: Call, table: PolicyTable, costs: Costs) -> str:
    """What a usage record needs if nobody tells of the request's end."""
    return About(
        model=ask.model,
        endpoint=call.endpoint.kind.value,
        policy=table.digest,
        prices=costs.written,
        client_request_id=ask.inference.request_id if ask.inference is not None else "",
        trace=call.trace,
    ).written()


def _demand(caller: Caller, call: Call, about: str, *, costs: Costs, asked: Output, tokens_input: int) -> Demand:
    input_cost = tokens_input * costs.dearest.input_micro_usd_per_1k
    output_cost = asked.total * costs.dearest.output_micro_usd_per_1k
    return Demand(
        request_id=call.request_id,
        organization_id=caller.organization_id,
        key_id=caller.key_id,
        tokens_input=tokens_input,
        tokens_output=asked.total,
        micro_usd=min(MICRO_USD_MAX, micro_usd_of(input_cost + output_cost)),
        input_cost=input_cost,
        output_price=costs.dearest.output_micro_usd_per_1k,
        choices=asked.choices,
        claim=call.claim,
        about=about,
    )


_charge_to: Final = lru_cache(maxsize=4096)(charge_to)


def _grant(
    limits: CallerLimits, costs: Costs, ask: Ask, asked: Output, *, demand: Demand, admitted: Admitted | int
) -> Grant:
    """``admitted`` is a moment in unix ms where it is let through without the store; its key claims nothing then."""
    consulted: tuple[Figure, ...] = ()
    granted, has_budgets, claim, at_ms = asked.total, limits.has_budgets, None, admitted
    if isinstance(admitted, Admitted):
        granted, consulted, claim, at_ms = admitted.tokens_output, admitted.figures, demand.claim, admitted.at_ms
        has_budgets = any(figure.kind in BUDGET_PERIODS for figure in consulted)
    # Where some budget pays, the backend must not answer with more than was reserved.
    named = not asked.assumed or not (has_budgets and limits.clamp_output)
    return Grant(
        edits=() if named and granted == asked.total else clamp(ask, granted // asked.choices),
        metadata=((names.METADATA_PRICES, costs.written), (names.METADATA_CHARGE_TO, _charge_to(limits))),
        figures=(
            (names.METADATA_TOKENS_INPUT, str(demand.tokens_input)),
            (names.METADATA_TOKENS_OUTPUT, str(granted)),
            (names.METADATA_ADMITTED_MS, str(at_ms)),
            *rate_headers(consulted),
            *of_limits(consulted),
        ),
        claim=claim,
        tokens_input=demand.tokens_input,
    )


async def _admit(limiter: Limiter, store: LimitStore, demand: Demand, limits: CallerLimits) -> Admission:
    began_s = limiter.monotonic_s()
    admission = await store.admit(demand, limits)
    limiter.events.admitted(limiter.monotonic_s() - began_s)
    for wait_s in SLOT_TRIES_S:
        if not isinstance(admission, Denied) or admission.denier.kind is not LimitKind.PARALLEL:
            break
        if not limiter.waiting.acquire():
            break
        try:
            await asyncio.sleep(wait_s)
            admission = await store.admit(demand, limits)
        finally:
            limiter.waiting.release()
    return admission


def _without_store(limiter: Limiter, demand: Demand, limits: CallerLimits, error: StoreUnavailable) -> None:
    """What holds while the store is down.

    Raises:
        Refused: the policy wants a limit checked that cannot be, or this worker's own count denies.
    """
    limited = any(s.requests_per_second or s.tokens_per_minute or s.max_parallel for s in limits.subjects)
    if (limits.has_budgets and limits.budgets_on_store_error == "deny") or (
        limited and limits.rates_on_store_error == "deny"
    ):
        limiter.events.without_store("denied")
        raise Refused(Reason.LIMIT_STORE_DOWN) from error
    if not limited or limits.rates_on_store_error == "allow":
        limiter.events.without_store("allowed")
        return
    denied = limiter.local.take(
        demand.organization_id, limits, tokens=demand.tokens_input + demand.tokens_output, now_s=limiter.clock_s()
    )
    limiter.events.without_store("local" if denied is None else "local_denied")
    if denied is not None:
        raise refused_by(denied) from error


async def _ask_budget_service(budgets: BudgetService, caller: Caller, limits: CallerLimits) -> None:
    """Insist on the budget service's word.

    Raises:
        Refused: it does not allow the organisation more, or cannot be asked and the policy wants it asked.
    """
    try:
        answer = await budgets.check(caller.organization_id)
    except StoreUnavailable as error:
        if limits.budgets_on_store_error == "allow":
            return
        raise Refused(Reason.LIMIT_STORE_DOWN, "The budget cannot be checked at the moment; try again.") from error
    if not answer.allowed:
        raise refused_by_service(answer)
