"""Builders of what the steps of a request work on; each states only what matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc.json_body import Document, parse
from extproc.keys.record import Caller, KeyRecord, digest
from extproc.limit import Limiter, Places
from extproc.local_rates import LocalRates
from extproc.policy import PolicyTable
from extproc.tokens import TokenCounter
from extproc.validate import Ask, Inference
from gateway.endpoints import POST_ENDPOINTS, Endpoint, Kind
from limits.store import LimitStore
from policies.candidates import PolicyIndex
from policies.limits import LimitIndex
from policies.model import BackendId, KeyId, ModelName, OrganizationId, Policy, Price

ENDPOINTS: Mapping[Kind, Endpoint] = {endpoint.kind: endpoint for endpoint in POST_ENDPOINTS}
REQUEST_ID = "123e4567-e89b-12d3-a456-426614174000"


def a_record(key: str = "rk-alice", **changes: Any) -> KeyRecord:
    fields: dict[str, Any] = {"id": KeyId("alice"), "organization_id": OrganizationId("acme"), "digest": digest(key)}
    return KeyRecord(**(fields | changes))


def a_caller(**changes: Any) -> Caller:
    return a_record(**changes).caller


def a_table(policy: Policy, *, prices: Mapping[str, Price] | None = None, silent: tuple[str, ...] = ()) -> PolicyTable:
    names = frozenset(map(BackendId, silent))
    return PolicyTable(
        index=PolicyIndex(policy),
        limits=LimitIndex(policy.limits),
        prices=prices or {},
        silent=names,
        loaded_at=1_700_000_000,
    )


class NoEvents:
    """Counts nothing."""

    def admitted(self, seconds: float) -> None:
        """Nothing."""

    def without_store(self, outcome: str) -> None:
        """Nothing."""


def a_limiter(store: LimitStore | None = None, **changes: Any) -> Limiter:
    """A limiter of one worker; without a store nothing is limited."""
    fields: dict[str, Any] = {
        "local": LocalRates(workers=1),
        "tokens": TokenCounter(),
        "events": NoEvents(),
        "clock_s": lambda: 1_700_000_000.0,
        "monotonic_s": lambda: 0.0,
        "waiting": Places(8),
        "ledger_is_here": lambda: True,
    }
    return Limiter(store=store, **(fields | changes))


def an_ask(text: str, *, path: str | None = None) -> Ask:
    """What a body asks for whose model and stream are sound."""
    document: Document = parse(text)
    inference = Inference(request_id=REQUEST_ID, payload="hi", signature_hex=None, metadata={}) if path else None
    return Ask(
        kind=Kind.CHAT if "messages" in document.members else Kind.COMPLETION,
        model=ModelName(document.members["model"]),
        document=document,
        path=path,
        stream=document.members.get("stream") is True,
        inference=inference,
    )
