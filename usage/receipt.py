"""Receipts: what happened to one request, and with which figures. Pure; docs/openapi.yaml has every field in words.

Everything is told as it was written down, but for the candidates: those are what the policy of then had for the key.
Never a key, a body or a backend's address.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import REFUSALS, Reason
from limits import about as abouts
from limits.context import context_of
from limits.figures import read as read_figures
from limits.model import MONEY_KINDS, Figure, Opened
from policies import price as prices
from policies.candidates import candidates, resolve
from policies.limits import ORGANIZATION_SUBJECT, key_subject
from policies.model import KeyId, ModelName, OrganizationId, Policy
from usage.archive import KeptAttempt, KeptEvent, KeptRequest
from usage.delivery import event_json
from usage.record import iso, price_version
from usage.settle import CUT
from usage.spool import EXPIRE

_FAILED_FROM: Final = 500
_NO_HOST: Final = "UH"
"""Flag of an attempt for which no endpoint of the backend was left, so that nothing was sent."""
_ROUTERS_OWN: Final = {
    (502, ""): REFUSALS[Reason.BACKEND_ERROR].code,
    (504, ""): REFUSALS[Reason.BACKEND_TIMEOUT].code,
    (503, _NO_HOST): REFUSALS[Reason.NO_BACKEND].code,
    (503, "UO"): REFUSALS[Reason.BACKEND_BUSY].code,
}
"""Codes of what Envoy answers in a backend's place, by status and flag of the last attempt ('': whichever it has)."""
_CODES: Final = {reason.value: refusal.code for reason, refusal in REFUSALS.items()}
_TOKENS: Final = ("tokens_input", "tokens_output", "tokens_input_cached", "tokens_output_reasoning")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """All that is known of a request that has ended. ``policy`` is None where it was not kept, or cannot be read."""

    request: KeptRequest
    attempts: Sequence[KeptAttempt]
    events: Sequence[KeptEvent]
    policy: Policy | None
    delivered_to: int
    """Place of the last request that was handed on."""
    refusal: str | None = None
    """Why its record could not be."""


def receipt_of(kept: Kept) -> Json:
    """The receipt of a request that has been written down."""
    request, told = kept.request, kept.request.told
    record = json.loads(request.record) if request.record is not None else {}
    ended = "duration_ms" in told
    ended_us = request.started_us + 1000 * told.get("duration_ms", 0)
    trace_id, _, span_id = told.get("trace", "").partition("-")
    return {
        "request_id": request.request_id,
        "client_request_id": request.client_request_id or None,
        "state": "ENDED" if request.revision else "ESTIMATED",
        "organization_id": request.organization_id,
        "api_key_id": told["api_key_id"],
        "endpoint": told["endpoint"] or None,
        "model": told["model"] or None,
        "status": told.get("status") or None,
        "timestamps": {"started": iso(request.started_us), "ended": iso(ended_us) if ended else None},
        "decision": _decision(kept, record),
        "policy_version": told["policy"] or None,
        "candidates": candidates_of(kept.policy, request.organization_id, told["model"], told["api_key_id"]),
        "attempts": _attempts(kept),
        "limits": _limits(told.get("figures", ""), at_ms=told.get("admitted_ms") or request.started_us // 1000),
        "metadata": record.get("metadata"),
        "usage": _usage(record),
        "price": _price(told["prices"], _charged(kept)) if record and told["prices"] else None,
        "cost_micro_usd": record.get("cost_micro_usd", 0),
        "cost_usd": record.get("cost_usd", 0.0),
        "settlement": _settlement(request),
        "delivery": _delivery(kept, record),
        "trace_id": trace_id or request.request_id,
        "span_id": span_id or request.request_id.replace("-", "")[16:],
        "events": [event_json(event) for event in kept.events],
    }


def running_receipt(opened: Opened, policy: Policy | None) -> Json:
    """The receipt of a request that still runs, or whose end nobody has told of yet: what was reserved for it."""
    about = abouts.read(opened.about)
    trace_id, _, span_id = about.trace.partition("-")
    return _nothing_known(opened.request_id) | {
        "client_request_id": about.client_request_id or None,
        "state": "RUNNING",
        "organization_id": opened.organization_id,
        "api_key_id": opened.key_id,
        "endpoint": about.endpoint or None,
        "model": about.model or None,
        "timestamps": {"started": iso(opened.admitted_ms * 1000), "ended": None},
        "decision": {"what": "ADMITTED", "reason": None, "limit_state": "WITHIN_LIMIT"},
        "policy_version": about.policy or None,
        "candidates": candidates_of(policy, opened.organization_id, about.model, opened.key_id),
        "price": _price(about.prices, "") if about.prices else None,
        "settlement": {
            "state": "RESERVED",
            "tokens": opened.tokens_input + opened.tokens_output,
            "micro_usd": opened.micro_usd,
        },
        "trace_id": trace_id or opened.request_id,
        "span_id": span_id or opened.request_id.replace("-", "")[16:],
    }


def refused_receipt(request_id: str, events: Sequence[KeptEvent]) -> Json:
    """The receipt of a request of which nothing is known but its audit events: nobody was authenticated."""
    first = events[0]
    said = json.loads(first.metadata)
    return _nothing_known(request_id) | {
        "organization_id": first.organization_id or None,
        "api_key_id": first.actor or None,
        "endpoint": said.get("endpoint"),
        "model": said.get("model"),
        "status": said.get("status"),
        "timestamps": {"started": iso(first.created_us), "ended": None},
        "decision": {"what": "DENIED", "reason": _CODES.get(said.get("reason")), "limit_state": "WITHIN_LIMIT"},
        "trace_id": said.get("trace_id") or request_id,
        "events": [event_json(event) for event in events],
    }


def _nothing_known(request_id: str) -> Json:
    unknown = ("client_request_id", "organization_id", "api_key_id", "endpoint", "model", "status", "policy_version")
    return {
        "request_id": request_id,
        "state": "ENDED",
        **dict.fromkeys((*unknown, "candidates", "metadata", "usage", "price")),
        "attempts": [],
        "limits": [],
        "cost_micro_usd": 0,
        "cost_usd": 0.0,
        "settlement": {"state": "NONE", "tokens": None, "micro_usd": None},
        "delivery": {"state": "NONE", "record_id": None, "revision": None},
        "trace_id": request_id,
        "span_id": request_id.replace("-", "")[16:],
        "events": [],
    }


def candidates_of(policy: Policy | None, organization_id: str, model: str, key_id: str) -> list[Json] | None:
    """Backends that a policy has for a key; None where there is no telling."""
    entry = resolve(policy, OrganizationId(organization_id), ModelName(model)) if policy and model else None
    if policy is None or entry is None:
        return None
    return [
        {"backend_id": one.backend_id, "weight": one.weight, "standing": one.standing}
        for one in candidates(policy, entry, KeyId(key_id))
    ]


def _decision(kept: Kept, record: Mapping[str, Any]) -> Json:
    request, what, reason = kept.request, "DENIED", kept.request.told.get("reason") or None
    if request.kind in {"repeated", "listed"}:
        what, reason = request.kind.upper(), None  # what was told as its reason is no error
    elif request.kind == "forwarded" and reason is None:
        # Nobody has told of the end of an estimated one, and so not of where it went.
        went = request.revision and not _went_nowhere(kept)
        what, reason = record["decision_reason"] if went else "ADMITTED", _routers_own(kept)
    return {"what": what, "reason": reason, "limit_state": record.get("limit_state", "WITHIN_LIMIT")}


def _routers_own(kept: Kept) -> str | None:
    """Code of the error that was answered in a backend's place; None where a backend has answered."""
    status = kept.request.told.get("status", 0)
    flags = kept.attempts[-1].flags if kept.attempts else ()
    return next((code for flag in ("", *flags) if (code := _ROUTERS_OWN.get((status, flag)))), None)


def _went_nowhere(kept: Kept) -> bool:
    """Whether no backend had an endpoint left, so that none was sent anything."""
    is_unavailable = _routers_own(kept) == _ROUTERS_OWN[503, _NO_HOST]
    return is_unavailable and all(_NO_HOST in one.flags for one in kept.attempts)


def _charged(kept: Kept) -> str:
    """The backend whose price was charged; '' where none was asked."""
    return "" if _went_nowhere(kept) else kept.request.told.get("backend", "")


def _attempts(kept: Kept) -> list[Json]:
    """The attempts that failed in their order; then the one that has answered, of which only the backend is known."""
    told = kept.request.told
    if kept.request.kind in {"repeated", "listed"} or _went_nowhere(kept):
        return []
    found = [
        _attempt(one.backend, one.status, one.flags) | {"started": iso(one.started_us), "duration_ms": one.duration_ms}
        for one in kept.attempts
        if one.backend  # Envoy tells of one without an endpoint twice, once before it has a backend
    ]
    backend = told.get("backend", "")
    if backend and len(found) < max(1, told["attempts"]):
        found.append(_attempt(backend, told["status"], told["flags"]))
    return found


def _attempt(backend: str, status: int, flags: Sequence[str]) -> Json:
    # Without a status the client had left before there was one.
    cut = not status or not CUT.isdisjoint(flags)
    return {
        "backend_id": backend,
        "outcome": "FAILED" if status >= _FAILED_FROM else "CUT" if cut else "ANSWERED",
        "status": status or None,
        "flags": list(flags),
        "started": None,
        "duration_ms": None,
    }


def _limits(figures: str, *, at_ms: int) -> list[Json]:
    return [_limit(figure, at_ms) for figure in read_figures(figures)]


def _limit(figure: Figure, at_ms: int) -> Json:
    said: Json = context_of(figure, at_ms=at_ms).as_json()
    if figure.subject != ORGANIZATION_SUBJECT:
        said["api_key_id"] = figure.subject.removeprefix(key_subject(""))
    if figure.kind in MONEY_KINDS:
        said["micro_usd"] = {
            "limit": figure.limit,
            "current_usage": figure.limit - figure.remaining,
            "remaining": figure.remaining,
        }
    return said


def _usage(record: Mapping[str, Any]) -> Json | None:
    if not record:
        return None
    return {name: record.get(name, 0) for name in _TOKENS} | {"source": record.get("usage_source")}


def _price(line: str, backend: str) -> Json:
    """What a token of the backend cost; of one that was no candidate then, or of none, the dearest of them."""
    of = prices.read(line)
    used = of.get(backend) or prices.dearest(of.values())
    return {
        "price_version": price_version(line),
        "backend_id": backend if backend in of else None,
        "input_micro_usd_per_1k": used.input_micro_usd_per_1k,
        "output_micro_usd_per_1k": used.output_micro_usd_per_1k,
        "cached_input_micro_usd_per_1k": used.cached_input_micro_usd_per_1k,
        "reasoning_micro_usd_per_1k": used.reasoning_micro_usd_per_1k,
    }


def _settlement(request: KeptRequest) -> Json:
    if request.settlement is None:
        return {"state": "NONE", "tokens": None, "micro_usd": None}
    state = "SETTLED" if request.settled else "WAITING"
    if request.settlement == EXPIRE:  # with what had been reserved
        record = json.loads(request.record or "{}")
        tokens = record.get("tokens_input", 0) + record.get("tokens_output", 0)
        return {"state": state, "tokens": tokens, "micro_usd": record.get("cost_micro_usd", 0)}
    tokens, micro_usd, *_ = json.loads(request.settlement)
    return {"state": state, "tokens": tokens, "micro_usd": micro_usd}


def _delivery(kept: Kept, record: Mapping[str, Any]) -> Json:
    if not record:
        return {"state": "NONE", "record_id": None, "revision": None}
    state = "DELIVERED" if kept.request.seq <= kept.delivered_to else "WAITING"
    return {
        "state": state if kept.refusal is None else "REFUSED",
        "record_id": record["record_id"],
        "revision": record["revision"],
    }
