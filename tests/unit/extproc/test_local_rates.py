"""Rates as one worker counts them while the limit store is down: bounded, refilled, nobody's but the caller's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extproc.local_rates import SUBJECTS_MAX, LocalRates
from limits.model import LimitKind
from policies.limits import CallerLimits, SubjectLimits
from policies.model import OrganizationId

ACME, GLOBEX = OrganizationId("acme"), OrganizationId("globex")
NOW_S = 1_700_000_000.0


def limits(*subjects: SubjectLimits, **of_organization: int) -> CallerLimits:
    return CallerLimits(subjects=(SubjectLimits(subject="org", **of_organization), *subjects))


def taken(rates: LocalRates, what: CallerLimits, times: int, *, tokens: int = 0, now_s: float = NOW_S) -> int:
    """How many of so many requests are let through."""
    return sum(rates.take(ACME, what, tokens=tokens, now_s=now_s) is None for _ in range(times))


def test_a_worker_grants_its_share() -> None:
    rates = LocalRates(workers=4)
    what = limits(requests_per_second=8, burst=40)
    assert taken(rates, what, 100) == 10
    assert taken(rates, what, 100, now_s=NOW_S + 1) == 2


def test_small_limits_still_let_one_through() -> None:
    assert taken(LocalRates(workers=8), limits(requests_per_second=1, burst=1), 5) == 1


def test_who_waits_as_long_as_told_gets_through() -> None:
    rates, what = LocalRates(workers=2), limits(requests_per_second=3, burst=6)
    taken(rates, what, 10)
    denied = rates.take(ACME, what, tokens=0, now_s=NOW_S)
    assert denied is not None
    assert denied.wait_ms
    assert denied.denier.kind is LimitKind.REQUESTS
    assert rates.take(ACME, what, tokens=0, now_s=NOW_S + denied.wait_ms / 1000) is None


def test_tokens_are_counted_too_and_a_large_request_passes_a_full_bucket() -> None:
    rates, what = LocalRates(workers=1), limits(tokens_per_minute=600)
    assert rates.take(ACME, what, tokens=1000, now_s=NOW_S) is None
    denied = rates.take(ACME, what, tokens=10, now_s=NOW_S)
    assert denied is not None
    assert denied.denier.kind is LimitKind.TOKENS
    assert denied.wait_ms == 41_000
    assert rates.take(ACME, what, tokens=10, now_s=NOW_S + 41) is None


def test_a_denial_by_the_key_takes_nothing_from_its_organisation() -> None:
    key = SubjectLimits(subject="key/k", requests_per_second=1, burst=1)
    rates, both = LocalRates(workers=1), limits(key, requests_per_second=1, burst=5)
    assert taken(rates, both, 10) == 1
    assert taken(rates, limits(requests_per_second=1, burst=5), 10) == 4


def test_organisations_are_counted_apart_and_forgotten_together() -> None:
    rates, what = LocalRates(workers=1), limits(requests_per_second=1, burst=1)
    assert taken(rates, what, 2) == 1
    assert rates.take(GLOBEX, what, tokens=0, now_s=NOW_S) is None
    rates.clear()
    assert taken(rates, what, 2) == 1


def test_no_limit_takes_nothing() -> None:
    assert taken(LocalRates(workers=1), limits(max_parallel=1), 100, tokens=10**9) == 100


def test_memory_is_bounded() -> None:
    rates, what = LocalRates(workers=1), limits(requests_per_second=1, burst=1)
    for number in range(SUBJECTS_MAX + 10):
        rates.take(OrganizationId(f"o{number}"), what, tokens=0, now_s=NOW_S)
    assert len(rates) == SUBJECTS_MAX


@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 8), st.lists(st.floats(0, 0.5), max_size=60))
def test_workers_together_admit_no_more_than_the_limit_and_one_each(
    rate: int, burst: int, workers: int, waits_s: list[float]
) -> None:
    every = [LocalRates(workers=workers) for _ in range(workers)]
    what = limits(requests_per_second=rate, burst=burst)
    now_s, admitted = NOW_S, 0
    for wait_s in waits_s:
        now_s += wait_s
        admitted += sum(taken(rates, what, 5, now_s=now_s) for rates in every)
    assert admitted <= burst + rate * (now_s - NOW_S) + workers
