"""Builders of what the steps of a request work on; each states only what matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc.json_body import Document, parse
from extproc.keys.record import Caller, KeyRecord, digest
from extproc.policy import PolicyTable
from extproc.validate import Ask, Inference
from gateway.endpoints import POST_ENDPOINTS, Endpoint, Kind
from policies.candidates import PolicyIndex
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
    return PolicyTable(index=PolicyIndex(policy), prices=prices or {}, silent=names, loaded_at=1_700_000_000)


def an_ask(text: str, *, path: str | None = None) -> Ask:
    """What a body asks for whose model and stream are sound."""
    document: Document = parse(text)
    inference = Inference(request_id=REQUEST_ID, payload="hi", signature_hex=None, metadata={}) if path else None
    return Ask(
        model=ModelName(document.members["model"]),
        document=document,
        path=path,
        stream=document.members.get("stream") is True,
        inference=inference,
    )
