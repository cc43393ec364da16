"""The journal's bounds and the fault header's grammar, without sockets."""

from __future__ import annotations

from random import Random

import pytest

from mocks.faults import Fault, FaultInvalid, FaultKind, Faults, parse_fault_header
from mocks.journal import Journal


def add(journal: Journal, body: bytes = b"") -> None:
    journal.add(method="POST", path="/", headers=(), body=body, time=0.0)


def test_oldest_requests_go_first_and_still_count() -> None:
    journal = Journal(requests_max=3)
    for _ in range(5):
        add(journal)
    assert [entry.number for entry in journal.entries()] == [3, 4, 5]
    assert journal.total == 5


def test_large_bodies_push_out_old_requests() -> None:
    journal = Journal(bodies_max_bytes=10)
    for _ in range(4):
        add(journal, b"1234")
    assert [entry.number for entry in journal.entries()] == [3, 4]


def test_cleared_journal_has_all_its_room_again() -> None:
    journal = Journal(bodies_max_bytes=10)
    add(journal, b"1234567890")
    journal.clear()
    add(journal, b"1234567890")
    assert [entry.number for entry in journal.entries()] == [1]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("status=503", Fault(kind=FaultKind.STATUS, status=503)),
        ("status", Fault(kind=FaultKind.STATUS, status=500)),
        ("reset", Fault(kind=FaultKind.RESET)),
        ("slow=0.5", Fault(kind=FaultKind.SLOW, delay_s=0.5)),
        ("stream_cut=2, event_delay_s=0.1", Fault(kind=FaultKind.STREAM_CUT, events=2, event_delay_s=0.1)),
        ("huge=100", Fault(kind=FaultKind.HUGE, bytes=100)),
        ("flaky=0.1,status=502", Fault(kind=FaultKind.FLAKY, p=0.1, status=502)),
    ],
    ids=str,
)
def test_fault_header(text: str, fault: Fault) -> None:
    assert parse_fault_header(text) == fault


@pytest.mark.parametrize("text", ["", "nonsense", "reset=1", "status=abc", "slow,x=1"], ids=str)
def test_fault_header_that_makes_no_sense(text: str) -> None:
    with pytest.raises(FaultInvalid):
        parse_fault_header(text)


def test_flaky_draws_are_repeatable() -> None:
    def draws() -> list[bool]:
        faults = Faults(Random(7))
        faults.set(Fault(kind=FaultKind.FLAKY, p=0.3))
        return [faults.take() is not None for _ in range(50)]

    assert draws() == draws()
    assert 0 < sum(draws()) < 50
