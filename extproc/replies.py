"""What ext_proc answers by itself: refusals and the list of models."""

from __future__ import annotations

import json
from urllib.parse import unquote

from extproc.exchange import Reply
from extproc.keys.record import Caller
from extproc.policy import PolicyTable
from gateway import names
from gateway.errors import Reason, Refused, openai_body, router_body
from limits.model import StoredAnswer


def refusal(refused: Refused, *, openai: bool, trace_id: str) -> Reply:
    """A refusal in the endpoint's error format."""
    said, wait_ms = refused.refusal, refused.retry_after_ms
    wait_s = None if wait_ms is None else max(1, -(-wait_ms // 1000))
    if openai:
        body = openai_body(message=refused.text, kind=said.openai_type, code=said.openai_code, param=refused.param)
    else:
        body = router_body(
            code=said.code,
            text=refused.text,
            trace_id=trace_id,
            param=refused.param,
            limit=refused.limit,
            retry_after_s=wait_s,
        )
    headers = refused.headers
    if said.status == 401:  # noqa: PLR2004 - RFC 9110, 15.5.2
        headers += (("www-authenticate", "Bearer"),)
    if wait_ms is not None:
        headers += ((names.HEADER_RETRY_AFTER, str(wait_s)), (names.HEADER_RETRY_AFTER_MS, str(wait_ms)))
    if said.status == 402:  # noqa: PLR2004 - the OpenAI client would not retry it anyway; others might
        headers += ((names.HEADER_SHOULD_RETRY, "false"),)
    return Reply(status=said.status, body=body, headers=headers)


def repetition(answer: StoredAnswer) -> Reply:
    """The answer kept for an idempotency key, once more."""
    headers = (*answer.headers, (names.HEADER_IDEMPOTENT_REPLAY, "true"))
    return Reply(status=answer.status, body=answer.body, headers=headers)


def _listed(model: str, table: PolicyTable) -> dict[str, object]:
    return {"id": model, "object": "model", "created": table.loaded_at, "owned_by": "api-router"}


def model_list(wanted: str, caller: Caller, table: PolicyTable) -> Reply:
    """All models that a key may use, or the one named ``wanted`` (as it stands in the path).

    Raises:
        Refused: MODEL_UNKNOWN.
    """
    usable = []
    for model in table.index.models_for(caller.organization_id):
        resolved = table.index.lookup(caller.organization_id, model)
        if resolved is not None and resolved.admits(caller.key_id) and caller.may_use(model):
            usable.append(model)
    if not wanted:
        return Reply(
            status=200, body=json.dumps({"object": "list", "data": [_listed(m, table) for m in usable]}).encode()
        )
    name = unquote(wanted)
    if name not in usable:
        raise Refused(Reason.MODEL_UNKNOWN, f"The model {json.dumps(name[:256])} does not exist.", param="model")
    return Reply(status=200, body=json.dumps(_listed(name, table)).encode())
