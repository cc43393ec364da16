"""Faults that a mock backend shows on demand: a closed vocabulary, and which request gets one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from random import Random
from typing import Any, Final


class FaultKind(Enum):
    """What goes wrong. ``health`` concerns /health alone; every other kind spares /health."""

    STATUS = "status"
    """Answer ``status`` with ``body`` and ``headers``."""
    HANG = "hang"
    """Never answer; the request ends when the client leaves."""
    RESET = "reset"
    """TCP RST instead of an answer."""
    CLOSE = "close"
    """TCP FIN instead of an answer."""
    SLOW = "slow"
    """Wait ``delay_s`` before the first byte, then answer."""
    STREAM_CUT = "stream_cut"
    """Drop the connection after ``events`` events, in the middle of the body."""
    STREAM_CLEAN_CUT = "stream_clean_cut"
    """End the body in good form after ``events`` events, without the stream's own end."""
    HOLD = "hold"
    """Send ``events`` events (default 1; none when not streaming), then wait for a release."""
    HUGE = "huge"
    """An answer of exactly ``bytes`` bytes (JSON; for a stream, its first event is padded)."""
    BAD_JSON = "bad_json"
    """200 with a body that stops in the middle of its JSON."""
    FLAKY = "flaky"
    """With probability ``p`` answer ``status``, else answer well."""
    HEALTH = "health"
    """/health answers ``status`` after ``delay_s``."""


class FaultInvalid(Exception):
    """A fault that cannot be set; the text says why."""


MAIN_FIELD: Final[Mapping[FaultKind, str]] = {
    FaultKind.STATUS: "status",
    FaultKind.SLOW: "delay_s",
    FaultKind.STREAM_CUT: "events",
    FaultKind.STREAM_CLEAN_CUT: "events",
    FaultKind.HOLD: "events",
    FaultKind.HUGE: "bytes",
    FaultKind.FLAKY: "p",
    FaultKind.HEALTH: "status",
}
"""The field that ``x-mock-fault: <kind>=<value>`` sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. ``event_delay_s``, the wait before each event but the first, goes with any kind."""

    kind: FaultKind
    status: int = 500
    body: Any = None
    """JSON value, or text as it stands; default: an error in OpenAI's form."""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    event_delay_s: float = 0.0
    events: int = 1
    bytes: int = 0
    p: float = 0.5
    times: int | None = None
    """How many requests it meets before it heals by itself; None: until healed."""


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "status": (int,),
    "headers": (dict,),
    "delay_s": (int, float),
    "event_delay_s": (int, float),
    "events": (int,),
    "bytes": (int,),
    "p": (int, float),
    "times": (int, type(None)),
}


def parse_fault(value: object) -> Fault:
    """Fault from its JSON object.

    Raises:
        FaultInvalid: not an object, an unknown kind or field, or a value out of its range.
    """
    if not isinstance(value, dict):
        raise FaultInvalid("a fault is a JSON object with a kind")
    given = dict(value)
    try:
        kind = FaultKind(given.pop("kind", None))
    except ValueError as error:
        raise FaultInvalid(f"kind is one of {', '.join(k.value for k in FaultKind)}") from error
    known = {f.name for f in fields(Fault)}
    for name, setting in given.items():
        if name not in known:
            raise FaultInvalid(f"unknown field {name}")
        allowed = _TYPES.get(name)
        if allowed and (not isinstance(setting, allowed) or isinstance(setting, bool)):
            raise FaultInvalid(f"{name} has the wrong type")
        if isinstance(setting, int | float) and setting < 0:
            raise FaultInvalid(f"{name} is negative")
    return Fault(kind=kind, **given)


def parse_fault_header(text: str) -> Fault:
    """Fault of one request from ``x-mock-fault``: ``status=503``, ``slow=0.5``, ``stream_cut=2, event_delay_s=0.1``.

    Raises:
        FaultInvalid: as :func:`parse_fault`.
    """
    first, *rest = (part.strip() for part in text.split(","))
    name, _, setting = first.partition("=")
    given: dict[str, Any] = {"kind": name}
    if setting:
        main = next((f for kind, f in MAIN_FIELD.items() if kind.value == name), None)
        if main is None:
            raise FaultInvalid(f"{name} takes no value")
        rest.insert(0, f"{main}={setting}")
    for part in rest:
        key, _, value = part.partition("=")
        try:
            given[key.strip()] = json.loads(value)
        except ValueError as error:
            raise FaultInvalid(f"{part}: the value is not a number") from error
    return parse_fault(given)


class Faults:
    """The faults in force: at most one for requests and one for /health."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._requests: Fault | None = None
        self._health: Fault | None = None

    def set(self, fault: Fault) -> None:
        """Put a fault in force in place of the one before."""
        if fault.kind is FaultKind.HEALTH:
            self._health = fault
        else:
            self._requests = fault

    def heal(self) -> None:
        """No fault any more, /health included."""
        self._requests = self._health = None

    def take(self) -> Fault | None:
        """Fault of the next request; a flaky one comes out as a status or as nothing."""
        fault, self._requests = self._requests, _spent(self._requests)
        return self.decide(fault) if fault else None

    def take_health(self) -> Fault | None:
        """Fault of the next health check."""
        fault, self._health = self._health, _spent(self._health)
        return fault

    def decide(self, fault: Fault) -> Fault | None:
        """Draw the lot of a flaky fault; every other fault stays as it is."""
        if fault.kind is not FaultKind.FLAKY:
            return fault
        return replace(fault, kind=FaultKind.STATUS) if self._random.random() < fault.p else None


def _spent(fault: Fault | None) -> Fault | None:
    """What stays in force after one more request."""
    if fault is None or fault.times is None:
        return fault
    return replace(fault, times=fault.times - 1) if fault.times > 1 else None
