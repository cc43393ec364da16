"""Requests that have ended as entries of the spool. Pure but for the clock it is given."""

from __future__ import annotations

from typing import Any

from limits import about as abouts
from limits.model import Opened
from policies.model import OrganizationId
from usage.finished import Finished, Malformed
from usage.json_text import json_text
from usage.record import BILLED, MICRO, iso, kind_of, price_version, record_id, record_of
from usage.settle import settlement_of, used
from usage.spool import EXPIRE, Entry


def entry_of(finished: Finished, *, tried_s: int | None = None) -> Entry | None:
    """What is written down of a request; None where nobody was known. ``tried_s`` as :class:`usage.spool.Entry` has it.

    Raises:
        Malformed: it cannot be used.
    """
    kind = kind_of(finished)
    if kind == "anonymous":
        return None
    use = used(finished)
    settlement = settlement_of(finished, use)
    try:
        record = json_text(record_of(finished, use)) if kind in BILLED else None
    except ValueError as error:
        raise Malformed(f"no record can be made of it: {error}") from error
    return Entry(
        request_id=finished.request_id,
        revision=1,
        client_request_id=finished.client_request_id,
        organization_id=finished.organization_id,
        kind=kind,
        started_us=finished.started_us,
        record=record,
        told=json_text(_told(finished)),
        settlement=settlement,
        tried_s=tried_s,
        ended_us=finished.ended_us,
    )


def _told(finished: Finished) -> dict[str, Any]:
    """What a receipt needs besides the record."""
    return {
        "api_key_id": finished.key_id,
        "model": finished.model,
        "endpoint": finished.endpoint,
        "path": finished.path,
        "status": finished.status,
        "reason": finished.reason,
        "flags": finished.flags,
        "backend": finished.backend,
        "attempts": finished.attempts,
        "duration_ms": finished.duration_ms,
        "admitted_ms": finished.admitted_ms,
        "body_bytes": finished.body_bytes,
        "events": finished.events,
        "tokens_input": finished.tokens_input,
        "tokens_output": finished.tokens_output,
        "prices": finished.prices,
        "charge_to": finished.charge_to,
        "policy": finished.policy,
        "figures": finished.figures,
        "trace": finished.trace,
    }


def estimate_of(opened: Opened) -> Entry:
    """What is written down of a request that nobody has told the end of: it used what was reserved for it.

    Should its end be told of later after all, that entry takes the place of this one.
    """
    about = abouts.read(opened.about)
    trace_id, _, span_id = about.trace.partition("-")
    started_us = opened.admitted_ms * 1000
    record = {
        "record_id": record_id(opened.request_id),
        "revision": 0,
        "request_id": opened.request_id,
        **({"client_request_id": about.client_request_id} if about.client_request_id else {}),
        "organization_id": opened.organization_id,
        "api_key_id": opened.key_id,
        "endpoint": about.endpoint,
        "model": about.model,
        "backend_id": "",
        "tokens_input": opened.tokens_input,
        "tokens_output": opened.tokens_output,
        "usage_source": "estimated",
        "cost_micro_usd": opened.micro_usd,
        "cost_usd": opened.micro_usd / MICRO,
        **({"price_version": price_version(about.prices)} if about.prices else {}),
        **({"policy_version": about.policy} if about.policy else {}),
        "limit_state": "WITHIN_LIMIT",
        "decision_reason": "PRIMARY",
        "latency_ms": 0,
        "timestamp": iso(started_us),
        "admitted_at": iso(started_us),
        "trace_id": trace_id or opened.request_id,
        "span_id": span_id or opened.request_id.replace("-", "")[16:],
    }
    told = {
        "api_key_id": opened.key_id,
        "model": about.model,
        "endpoint": about.endpoint,
        "tokens_input": opened.tokens_input,
        "tokens_output": opened.tokens_output,
        "prices": about.prices,
        "policy": about.policy,
        "trace": about.trace,
    }
    return Entry(
        request_id=opened.request_id,
        revision=0,
        client_request_id=about.client_request_id,
        organization_id=OrganizationId(opened.organization_id),
        kind="forwarded",
        started_us=started_us,
        record=json_text(record),
        told=json_text(told),
        settlement=EXPIRE,
    )
