"""Which event may follow which: the table of phases."""

from __future__ import annotations

from itertools import product

import pytest

from extproc.exchange import (
    Event,
    OutOfPhase,
    Phase,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    advance,
)

EVENTS: tuple[Event, ...] = (
    RequestHeaders(headers={}, ends=False),
    RequestBody(body=b""),
    ResponseHeaders(headers={}, ends=False),
    ResponseBody(body=b""),
)
UNREAD = (Phase.REQUEST_HEADERS, Phase.REQUEST_BODY)
ORDER = (Phase.REQUEST_HEADERS, Phase.REQUEST_BODY, Phase.RESPONSE_HEADERS, Phase.RESPONSE_BODY, Phase.DONE)


def test_whole_exchange_goes_through_every_phase() -> None:
    phase = Phase.REQUEST_HEADERS
    seen = [phase]
    for event in EVENTS:
        phase = advance(phase, event)
        seen.append(phase)
    assert tuple(seen) == ORDER == tuple(Phase)


@pytest.mark.parametrize(
    ("phase", "event"),
    [
        pytest.param(phase, event, id=f"{type(event).__name__} in {phase.name}")
        for (at, phase), (due, event) in product(enumerate(ORDER), enumerate(EVENTS))
        # Envoy's own reply is the one event that may come out of turn: before the request was read whole.
        if at != due and (phase, type(event)) not in {(unread, ResponseHeaders) for unread in UNREAD}
    ],
)
def test_event_that_is_not_due_is_out_of_phase(phase: Phase, event: Event) -> None:
    with pytest.raises(OutOfPhase, match=f"{type(event).__name__} in phase {phase.name}"):
        advance(phase, event)


def test_answer_in_parts_is_over_with_the_last() -> None:
    part, last = ResponseBody(body=b"a", ends=False), ResponseBody(body=b"")
    assert advance(Phase.RESPONSE_BODY, part) is Phase.RESPONSE_BODY
    assert advance(Phase.RESPONSE_BODY, last) is Phase.DONE


@pytest.mark.parametrize("phase", UNREAD)
def test_envoys_own_reply_may_come_before_the_request_was_read(phase: Phase) -> None:
    assert advance(phase, ResponseHeaders(headers={}, ends=False)) is Phase.RESPONSE_BODY
