"""Works out again what a receipt says: the candidates and the decision from the policy, the price from the usage.

Of what the ledger has stored only the facts are taken: who asked for which model, which backends were tried, how many
tokens there were. Everything that follows from them is worked out here, and held against what was stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cli.shown import dollars, usd
from policies.candidates import candidates_among, is_override, resolve, variant_of
from policies.model import KeyId, ModelName, OrganizationId, Policy, Price
from policies.price import FREE, cost_micro_usd, dearest, written
from usage.record import MICRO, price_version, record_id

ROUTED: Final = frozenset({"PRIMARY", "FAILOVER", "OVERRIDE"})
_TOKENS: Final = ("tokens_input", "tokens_output", "tokens_input_cached", "tokens_output_reasoning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One figure. ``unknown``: there is nothing to work it out from, and ``derived`` says why."""

    figure: str
    told: str
    derived: str
    verdict: Literal["agrees", "differs", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What a policy has for a caller and a model."""

    candidates: tuple[tuple[str, int, str], ...]
    is_override: bool
    prices: Mapping[str, Price]


def checks(receipt: Mapping[str, Any], policy: Policy | None, *, why_not: str) -> tuple[Check, ...]:
    """Every figure that can be worked out; ``why_not`` there is no policy."""
    choice = _choice(receipt, policy) if policy is not None else None
    found = [*_of_delivery(receipt)]
    if policy is None:
        found += [_unknown(figure, why_not) for figure in ("policy", "candidates", "backends tried", "decision")]
    else:
        found += [_check("policy", receipt["policy_version"], policy.digest), *_of_decision(receipt, choice)]
    return (*found, *_of_price(receipt, choice, why_not), *_of_settlement(receipt))


def _choice(receipt: Mapping[str, Any], policy: Policy) -> _Choice | None:
    if not receipt["model"] or not receipt["organization_id"]:
        return None
    entry = resolve(policy, OrganizationId(receipt["organization_id"]), ModelName(receipt["model"]))
    if entry is None:
        return None
    subset = variant_of(entry, KeyId(receipt["api_key_id"]))
    priced = {backend.id: backend.price or FREE for backend in policy.backends}
    return _Choice(
        candidates=tuple((c.backend_id, c.weight, c.standing) for c in candidates_among(policy, entry, subset)),
        is_override=is_override(policy, entry, subset),
        prices={
            weighted.backend_id: priced[weighted.backend_id]
            for weighted in entry.backends
            if subset is None or weighted.backend_id in subset
        },
    )


def _of_decision(receipt: Mapping[str, Any], choice: _Choice | None) -> Iterator[Check]:
    told = receipt["candidates"]
    stored = None if told is None else ((c["backend_id"], c["weight"], c["standing"]) for c in told)
    yield _check("candidates", _shown(stored), _shown(choice.candidates if choice else None))
    tried = [attempt["backend_id"] for attempt in receipt["attempts"]]
    if not tried:
        return
    known = {backend_id for backend_id, _, _ in choice.candidates} if choice else set()
    # Envoy may have a new policy some milliseconds before the worker that decides, or after it.
    yield _check("backends tried", ", ".join(tried), ", ".join(b if b in known else f"not {b}" for b in tried))
    what = receipt["decision"]["what"]
    if what in ROUTED:
        first = "OVERRIDE" if choice and choice.is_override else "PRIMARY"
        yield _check("decision", what, "FAILOVER" if len(tried) > 1 else first)


def _of_price(receipt: Mapping[str, Any], choice: _Choice | None, why_not: str) -> Iterator[Check]:
    told, usage = receipt["price"], receipt["usage"]
    stored = None if told is None else _price_of(told)
    used = stored
    backend = told["backend_id"] if told is not None else None
    if backend is not None:
        yield _check("backend charged", backend, ([a["backend_id"] for a in receipt["attempts"]] or ["none"])[-1])
    if choice is not None:
        # Where no candidate answered, nothing costs more than the dearest of them.
        used = choice.prices.get(backend or "") or dearest(choice.prices.values())
        if told is not None:
            yield _check("price version", told["price_version"], price_version(written(choice.prices)))
            yield _check("price of 1,000 tokens", _price_shown(stored), _price_shown(used))
    elif told is not None:
        yield _unknown("price version", why_not)
        yield _unknown("price of 1,000 tokens", why_not)
    cost = cost_micro_usd(used, **{name: usage[name] for name in _TOKENS}) if usage else 0
    yield _check("cost in micro-dollars", receipt["cost_micro_usd"], cost)
    in_dollars = receipt["cost_micro_usd"] / MICRO
    yield _check("cost in dollars", dollars(receipt["cost_usd"]), dollars(in_dollars))


def _of_settlement(receipt: Mapping[str, Any]) -> Iterator[Check]:
    settlement, usage = receipt["settlement"], receipt["usage"]
    if settlement["state"] in {"WAITING", "SETTLED"} and usage:
        tokens = usage["tokens_input"] + usage["tokens_output"]
        yield _check("tokens settled", settlement["tokens"], tokens)
        yield _check("micro-dollars settled", settlement["micro_usd"], receipt["cost_micro_usd"])


def _of_delivery(receipt: Mapping[str, Any]) -> Iterator[Check]:
    told = receipt["delivery"]["record_id"]
    if told is not None:
        yield _check("record id", told, record_id(receipt["request_id"]))


def _check(figure: str, told: object, derived: object) -> Check:
    verdict: Literal["agrees", "differs"] = "agrees" if told == derived else "differs"
    return Check(figure=figure, told=str(told), derived=str(derived), verdict=verdict)


def _unknown(figure: str, why: str) -> Check:
    return Check(figure=figure, told="", derived=why, verdict="unknown")


def _shown(candidates: Iterable[tuple[str, int, str]] | None) -> str:
    if candidates is None:
        return "none: no such model"
    marks = {"normal": "", "degraded": " degraded"}
    return ", ".join(f"{backend} {weight}{marks[standing]}" for backend, weight, standing in candidates) or "none"


def _price_of(told: Mapping[str, Any]) -> Price:
    return Price(
        input_micro_usd_per_1k=told["input_micro_usd_per_1k"],
        output_micro_usd_per_1k=told["output_micro_usd_per_1k"],
        cached_input_micro_usd_per_1k=told["cached_input_micro_usd_per_1k"],
        reasoning_micro_usd_per_1k=told["reasoning_micro_usd_per_1k"],
    )


def _price_shown(price: Price | None) -> str:
    if price is None:
        return "none"
    special = {"cached": price.cached_input_micro_usd_per_1k, "reasoning": price.reasoning_micro_usd_per_1k}
    parts = [f"input {usd(price.input_micro_usd_per_1k)}", f"output {usd(price.output_micro_usd_per_1k)}"]
    return ", ".join([*parts, *(f"{name} {usd(value)}" for name, value in special.items() if value is not None)])
