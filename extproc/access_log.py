"""What ext_proc tells the access log of a request, as dynamic metadata; ``gateway/names.py`` says what each name means.

What is the same for every request of a caller, model and policy is in one namespace, so that its bytes are made once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from extproc.exchange import Metadata
from extproc.keys.record import Caller
from extproc.validate import Ask
from gateway import names
from gateway.endpoints import Endpoint, Kind
from limits import figures
from limits.model import Figure

MODEL_MAX: Final = 256
"""Characters of a model's name, which a client may have made up."""
_CLOSED: Final = (names.METADATA_CLOSED, True)


def asked(caller: Caller | None, endpoint: Endpoint, policy: str) -> Metadata:
    """Who asks for what, and by which policy it is decided."""
    said = ((names.METADATA_ENDPOINT, endpoint.kind.value), (names.METADATA_POLICY, policy))
    if caller is None:
        return said
    return ((names.METADATA_ORGANIZATION, caller.organization_id), (names.METADATA_KEY, caller.key_id), *said)


def replied(reason: str, ask: Ask | None, *, closed: bool) -> Metadata:
    """What is said besides where ext_proc answers itself; ``closed``: no ledger entry can be open."""
    said: Metadata = ((names.METADATA_REASON, reason),)
    if ask is not None:
        model = ask.model[:MODEL_MAX].encode(errors="replace").decode()
        said = ((names.METADATA_MODEL, model), *said)
        # An answer that is given again has been watched and counted when it was first given.
        if ask.stream and ask.kind is not Kind.EMBEDDING and reason != names.REASON_REPEATED:
            said = (*said, (names.METADATA_STREAM, True))
    return (*said, _CLOSED) if closed else said


def of_request(ask: Ask | None, trace: str) -> tuple[tuple[str, str], ...]:
    """What no two requests share."""
    said: tuple[tuple[str, str], ...] = ((names.METADATA_TRACE, trace),) if trace else ()
    inference = ask.inference if ask is not None else None
    if inference is not None:
        said += ((names.METADATA_CLIENT_REQUEST_ID, inference.request_id),)
        if inference.metadata:
            said += ((names.METADATA_LABELS, json.dumps(inference.metadata, separators=(",", ":"))),)
    return said


def of_limits(consulted: Iterable[Figure]) -> tuple[tuple[str, str], ...]:
    """The figures of the limits that were consulted."""
    written = figures.written(consulted)
    return ((names.METADATA_FIGURES, written),) if written else ()
