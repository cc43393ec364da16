"""The command that admits, as a server reads it, and what is made of its replies."""

from __future__ import annotations

import json
import struct
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limits.admission import AMOUNT_MAX, admit_command, caller_part, organization_part, read_admission
from limits.model import Admitted, Claim, Claimed, Denied, Figure, LimitKind, StoredAnswer, charge_to
from limits.msgpack import encode
from limits.scripts import ADMIT, prefix, slot
from policies.limits import CallerLimits, SubjectLimits
from policies.model import Budget, OrganizationId
from tests.harness.limit_cases import a_budget, a_demand, limits_of

LIMITS = limits_of(
    SubjectLimits(subject="org", requests_per_second=5, burst=7, budgets=(a_budget("MONTHLY", "tokens", 9),)),
    SubjectLimits(subject="key/k1", max_parallel=3),
)


def arguments(command: bytes) -> list[bytes]:
    """A RESP array of strings, which a command is."""
    reader = hiredis.Reader()
    reader.feed(command)
    found = reader.gets()
    assert isinstance(found, list)
    assert reader.gets() is False
    return found


def a_command(limits: CallerLimits = LIMITS, org: str = "acme", **changes: Any) -> list[bytes]:
    demand = a_demand(OrganizationId(org), **changes)
    part = organization_part(OrganizationId(org), mode=b"admit")
    return arguments(admit_command(part, demand, caller_part(limits), overdue_ms=900))


def test_command_has_what_the_script_documents() -> None:
    found = a_command(
        request_id="r-ä", about="about", claim=Claim(key="c", fingerprint="f"), choices=2, input_cost=3, output_price=4
    )
    numbers = struct.unpack(">" + 7 * "Bq", found[7])
    assert found[:7] == [
        b"EVALSHA",
        ADMIT.sha,
        b"1",
        b"router:{acme}:open",
        b"router:{acme}:",
        b"admit",
        "r-ä".encode(),
    ]
    assert numbers[1::2] == (900, 10, 90, 2, 3, 4, 1000)
    assert set(numbers[::2]) == {0xD3}
    assert found[8:12] == [b"c", b"f", b"k1", b"about"]
    org = ("org", 5, 7, None, None, None, None, None, 9)
    key = ("key/k1", None, None, None, 3, None, None, None, None)
    assert found[12] == encode(False, 2, 2, *org, *key)


def test_request_without_a_claim_sends_an_empty_one() -> None:
    assert a_command()[8:10] == [b"", b""]


def test_amounts_are_bounded_so_that_sums_stay_exact() -> None:
    numbers = struct.unpack(">" + 7 * "Bq", a_command(tokens_output=10**30, micro_usd=10**40)[7])
    assert (numbers[5], numbers[13]) == (AMOUNT_MAX, AMOUNT_MAX)


@given(st.text(), st.text(), st.text(min_size=1))
def test_texts_of_any_kind_arrive_as_they_are(key_id: str, about: str, org: str) -> None:
    found = a_command(key_id=key_id, about=about, org=org)
    assert found[10:12] == [key_id.encode(), about.encode()]
    assert found[4].startswith(b"router:{")
    assert slot(found[3]) == slot(found[4] + b"entry:}{")


@given(st.text(), st.text())
def test_organizations_share_no_prefix(one: str, other: str) -> None:
    first, second = prefix(OrganizationId(one)), prefix(OrganizationId(other))
    assert (first == second) == (one == other)
    assert one == other or not first.startswith(second)


@pytest.mark.parametrize(
    ("key", "limited"),
    [
        (SubjectLimits(subject="key/k1"), 1),
        (SubjectLimits(subject="key/k1", max_parallel=1), 2),
        (SubjectLimits(subject="key/k1", budgets=(a_budget("DAILY", "tokens", 1),)), 2),
    ],
)
def test_key_without_limits_is_looked_at_only_where_budgets_are_set(key: SubjectLimits, limited: int) -> None:
    assert a_command(limits_of(key=key))[12].startswith(encode(False, limited, 2, "org"))


# --- Replies.


def test_figures_are_named_by_their_codes() -> None:
    caller = caller_part(LIMITS)
    admission = read_admission([b"OK", 1, 50, 600, 8 + 7, 9, 4, 1000, 8 + 1, 7, 6, 200, 16 + 3, 3, 2, 0], caller)
    figures = (
        Figure(LimitKind.MONTHLY_TOKENS, "org", 9, 4, 1000),
        Figure(LimitKind.REQUESTS, "org", 7, 6, 200),
        Figure(LimitKind.PARALLEL, "key/k1", 3, 2, 0),
    )
    assert admission == Admitted(at_ms=1, tokens_output=50, micro_usd=600, figures=figures)
    assert isinstance(admission.figures[0].kind, LimitKind)


@pytest.mark.parametrize(("wait_ms", "expected"), [(-1, None), (1500, 1500)])
def test_denial_names_the_limit_and_the_wait(wait_ms: int, expected: int | None) -> None:
    reply = [b"DENIED", 1, wait_ms, 16 + 3, 8 + 1, 7, 6, 200, 16 + 3, 3, 0, 0]
    denial = read_admission(reply, caller_part(LIMITS))
    assert isinstance(denial, Denied)
    assert (denial.wait_ms, denial.denier) == (expected, denial.figures[1])


def test_stored_answer_comes_back() -> None:
    headers = (("content-type", "text/plain"), ("x", "ä"))
    reply = [b"REPLAY", b"201", json.dumps(headers).encode(), b"\x00body"]
    answer = StoredAnswer(status=201, headers=headers, body=b"\x00body")
    assert read_admission(reply, caller_part(LIMITS)) == Claimed(state="done", answer=answer)


@pytest.mark.parametrize("state", ["running", "mismatch", "too_large"])
def test_states_of_a_key_have_names(state: str) -> None:
    assert read_admission([state.upper().encode()], caller_part(LIMITS)) == Claimed(state=state)  # type: ignore[arg-type]


def test_closed_entry_is_no_admission() -> None:
    assert read_admission([b"CLOSED"], caller_part(LIMITS)) is None


def test_use_is_charged_to_the_organization_and_to_every_budget() -> None:
    assert charge_to(limits_of()) == "org:DAILY org:MONTHLY"
    key = SubjectLimits(subject="key/a b", budgets=(Budget(period="DAILY", limit_tokens=1),))
    assert charge_to(limits_of(key=key)) == "org:DAILY org:MONTHLY key/a%20b:DAILY"
