"""Which limits hold for a caller: what an organisation's and a key's own leave out comes from the wider ones."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.limits import CALLERS_MAX, CallerLimits, LimitIndex, SubjectLimits, key_subject
from policies.model import Budget, KeyId, LimitPolicy, Limits, OnStoreError, OrganizationId, StoreErrors

ACME, ALICE = OrganizationId("acme"), KeyId("alice")
MONTHLY = Budget(period="MONTHLY", limit_tokens=7)
DAILY = Budget(period="DAILY", limit_micro_usd=1)
NOTHING = LimitPolicy()


def limits(
    *,
    default: LimitPolicy = NOTHING,
    default_key: LimitPolicy = NOTHING,
    acme: LimitPolicy | None = None,
    alice: LimitPolicy | None = None,
) -> CallerLimits:
    """What holds for alice of acme."""
    index = LimitIndex(
        Limits(
            default=default,
            default_key=default_key,
            organizations=() if acme is None else ((ACME, acme),),
            keys=() if alice is None else ((ALICE, alice),),
        )
    )
    return index.for_caller(ACME, ALICE)


def of_organization(found: CallerLimits) -> SubjectLimits:
    return found.subjects[0]


def test_nothing_is_limited_where_nothing_is_written() -> None:
    found = limits()
    assert found == CallerLimits(subjects=(SubjectLimits(subject="org"), SubjectLimits(subject="key/alice")))
    assert all(subject.is_empty for subject in found.subjects)
    assert not found.has_budgets


FIELDS: dict[str, tuple[Any, Any]] = {
    "tokens_per_minute": (5, 9),
    "max_parallel": (9, 5),
    "requests_per_second": (5, 9),
    "budgets": ((MONTHLY,), (DAILY,)),
}


@pytest.mark.parametrize(("field", "values"), FIELDS.items(), ids=FIELDS)
def test_own_limit_wins_over_the_wider_one_be_it_lower_or_higher(field: str, values: tuple[Any, Any]) -> None:
    own, wider = (LimitPolicy(**{field: value}) for value in values)
    empty: Any = () if field == "budgets" else None
    cases: list[tuple[CallerLimits, Any, Any]] = [
        (limits(default=wider), values[1], empty),
        (limits(acme=own), values[0], empty),
        (limits(default=wider, acme=own), values[0], empty),
        (limits(default_key=wider), empty, values[1]),
        (limits(alice=own), empty, values[0]),
        (limits(default_key=wider, alice=own), empty, values[0]),
        (limits(default=wider, alice=own), values[1], values[0]),
    ]
    for found, organization, key in cases:
        assert [getattr(subject, field) for subject in found.subjects] == [organization, key]
        assert [subject.is_empty for subject in found.subjects] == [organization == empty, key == empty]


def test_one_field_of_its_own_leaves_the_others_as_they_are() -> None:
    found = of_organization(
        limits(default=LimitPolicy(tokens_per_minute=5, max_parallel=3), acme=LimitPolicy(max_parallel=4))
    )
    assert (found.tokens_per_minute, found.max_parallel) == (5, 4)


def rated(requests_per_second: int | None = None, burst: int | None = None) -> LimitPolicy:
    return LimitPolicy(requests_per_second=requests_per_second, burst=burst)


@pytest.mark.parametrize(
    ("default", "own", "rate", "burst"),
    [
        (rated(100, 200), rated(), 100, 200),
        (rated(100), rated(), 100, 100),
        (rated(100, 200), rated(5), 5, 5),
        (rated(100, 200), rated(5, 8), 5, 8),
        (rated(100, 200), rated(burst=8), 100, 8),
        (rated(), rated(burst=8), None, None),
        (rated(burst=8), rated(5), 5, 5),
        (rated(burst=8), rated(), None, None),
    ],
    ids=[
        "the wider one",
        "a burst is at least a second's",
        "a wider burst is not for another rate",
        "its own",
        "its own burst of the wider rate",
        "a burst of no rate",
        "a wider burst without a rate",
        "only a wider burst",
    ],
)
def test_burst_belongs_to_its_rate(default: LimitPolicy, own: LimitPolicy, rate: int | None, burst: int | None) -> None:
    found = of_organization(limits(default=default, acme=own))
    assert (found.requests_per_second, found.burst) == (rate, burst)


def test_empty_list_of_budgets_takes_the_wider_ones_away() -> None:
    found = limits(default=LimitPolicy(budgets=(MONTHLY,)), acme=LimitPolicy(budgets=()))
    assert of_organization(found).budgets == ()
    assert not found.has_budgets


def test_key_is_counted_by_itself_and_within_its_organization() -> None:
    found = limits(acme=LimitPolicy(budgets=(MONTHLY,)), alice=LimitPolicy(budgets=(DAILY,)))
    assert [(subject.subject, subject.budgets) for subject in found.subjects] == [
        ("org", (MONTHLY,)),
        (key_subject("alice"), (DAILY,)),
    ]
    assert found.has_budgets


def test_budget_of_a_key_alone_is_one() -> None:
    assert limits(alice=LimitPolicy(budgets=(DAILY,))).has_budgets


# --- What is one word for the whole request: the narrowest that says something.

SAID = st.none() | st.booleans()


@given(SAID, SAID, SAID, SAID)
def test_narrowest_word_on_clamping_holds(
    alice: bool | None, default_key: bool | None, acme: bool | None, default: bool | None
) -> None:
    found = limits(
        alice=LimitPolicy(clamp_output=alice),
        default_key=LimitPolicy(clamp_output=default_key),
        acme=LimitPolicy(clamp_output=acme),
        default=LimitPolicy(clamp_output=default),
    )
    said = [word for word in (alice, default_key, acme, default) if word is not None]
    assert found.clamp_output is (said[0] if said else False)


RATES: st.SearchStrategy[OnStoreError | None] = st.sampled_from([None, "local", "deny", "allow"])
BUDGETS: st.SearchStrategy[Literal["deny", "allow"] | None] = st.sampled_from([None, "deny", "allow"])
ERRORS = st.none() | st.builds(StoreErrors, rates=RATES, budgets=BUDGETS)


@given(st.tuples(ERRORS, ERRORS, ERRORS, ERRORS))
def test_narrowest_word_on_the_store_holds_for_each_class(errors: tuple[StoreErrors | None, ...]) -> None:
    alice, default_key, acme, default = (LimitPolicy(on_store_error=error) for error in errors)
    found = limits(alice=alice, default_key=default_key, acme=acme, default=default)
    rates = [error.rates for error in errors if error is not None and error.rates is not None]
    budgets = [error.budgets for error in errors if error is not None and error.budgets is not None]
    assert found.rates_on_store_error == (rates[0] if rates else "local")
    assert found.budgets_on_store_error == (budgets[0] if budgets else "deny")


# --- The look-up.


def test_limits_are_the_callers_and_nobody_elses() -> None:
    index = LimitIndex(
        Limits(
            default=LimitPolicy(max_parallel=1),
            organizations=((ACME, LimitPolicy(max_parallel=2)),),
            keys=((ALICE, LimitPolicy(max_parallel=3)),),
        )
    )

    def parallel(organization: str, key: str) -> list[int | None]:
        found = index.for_caller(OrganizationId(organization), KeyId(key))
        return [subject.max_parallel for subject in found.subjects]

    assert parallel("acme", "alice") == [2, 3]
    assert parallel("acme", "bob") == [2, None]
    assert parallel("zeta", "alice") == [1, 3]
    assert parallel("zeta", "bob") == [1, None]
    assert index.for_organization(ACME) == index.for_caller(ACME, KeyId("bob")).subjects[0]


def test_same_caller_gets_the_same_object() -> None:
    index = LimitIndex(Limits())
    assert index.for_caller(ACME, ALICE) is index.for_caller(OrganizationId("acme"), KeyId("alice"))


def test_made_up_callers_do_not_fill_the_memory() -> None:
    index = LimitIndex(Limits(default=LimitPolicy(max_parallel=1)))
    first = index.for_caller(ACME, ALICE)
    for number in range(CALLERS_MAX):
        index.for_caller(ACME, KeyId(str(number)))
    again = index.for_caller(ACME, ALICE)
    assert again == first
    assert again is not first
