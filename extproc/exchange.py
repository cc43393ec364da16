"""One HTTP exchange as ext_proc sees it, without I/O: closed vocabularies and a table of phases.

Envoy tells of an exchange by events, the decision goes back as one command for each event. What the
decisions are is the pipeline's business; which event may follow which is this module's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

# --- Events: what Envoy says.


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHeaders:
    """Headers by lower-case name; ``ends`` when no body follows."""

    headers: Mapping[str, str]
    ends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBody:
    """The whole request body."""

    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHeaders:
    """Headers of the backend's answer; ``ends`` when no body follows."""

    headers: Mapping[str, str]
    ends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseBody:
    """The answer, or a part of it where it is passed on as it comes; ``ends`` with the last."""

    body: bytes
    ends: bool = True


Event = RequestHeaders | RequestBody | ResponseHeaders | ResponseBody

# --- Commands: what Envoy is to do.


Metadata = tuple[tuple[str, str | bool], ...]
"""Dynamic metadata of the exchange, which the access log has too."""
Counts = tuple[tuple[str, str], ...]
"""The same, of an answer whose tokens have been counted here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue:
    """Go on with what was said, unchanged.

    ``counted`` are the tokens of the answer so far. ``body_wanted``, on an answer's headers: its body is to pass here.
    """

    metadata: Metadata = ()
    counted: Counts = ()
    body_wanted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Route the request: set headers, maybe replace the body, choose the route anew.

    ``limits`` is metadata that differs from request to request; the rest is often the same for the same caller.
    """

    headers: tuple[tuple[str, str], ...]
    body: bytes | None
    metadata: Metadata
    limits: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Let the request go where its path leads, with these headers; its body is not waited for."""

    headers: tuple[tuple[str, str], ...]
    metadata: Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """Replace the answer's body, which is JSON, and its status where ``status`` is set."""

    body: bytes
    status: int | None = None
    counted: Counts = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Answer the client at once; no backend is contacted (or no further one)."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    details: str = ""
    metadata: Metadata = ()
    limits: tuple[tuple[str, str], ...] = ()


Command = Continue | Forward | Pass | Rewrite | Reply


class Phase(Enum):
    """Which event is due."""

    REQUEST_HEADERS = auto()
    REQUEST_BODY = auto()
    RESPONSE_HEADERS = auto()
    RESPONSE_BODY = auto()
    DONE = auto()


class OutOfPhase(Exception):
    """Envoy sent an event that its configuration does not lead to."""


# The phase that each event leads to from the phases it may come in.
_AFTER: Final[dict[tuple[Phase, type[object]], Phase]] = {
    (Phase.REQUEST_HEADERS, RequestHeaders): Phase.REQUEST_BODY,
    (Phase.REQUEST_BODY, RequestBody): Phase.RESPONSE_HEADERS,
    # Envoy itself has answered: a request it cannot serve (an upgrade), or one whose body is not complete (413, 408).
    (Phase.REQUEST_HEADERS, ResponseHeaders): Phase.RESPONSE_BODY,
    (Phase.REQUEST_BODY, ResponseHeaders): Phase.RESPONSE_BODY,
    (Phase.RESPONSE_HEADERS, ResponseHeaders): Phase.RESPONSE_BODY,
    (Phase.RESPONSE_BODY, ResponseBody): Phase.DONE,
}


def advance(phase: Phase, event: Event) -> Phase:
    """The phase after ``event``.

    Raises:
        OutOfPhase: the event is not due.
    """
    after = _AFTER.get((phase, type(event)))
    if after is None:
        raise OutOfPhase(f"{type(event).__name__} in phase {phase.name}")
    if after is Phase.DONE and isinstance(event, ResponseBody) and not event.ends:
        return phase
    return after
