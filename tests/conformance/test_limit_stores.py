"""One suite for every limit store: requests, tokens and parallel requests, of organisations and of keys."""

from __future__ import annotations

import random
from typing import Any

import pytest

from limits.model import Admission, Admitted, Denied, Figure, LimitKind, Settlement
from policies.limits import CallerLimits, SubjectLimits
from policies.model import KeyId
from tests.harness.limit_cases import OVERDUE_S, Case, MemoryCase, a_demand, an_organization, limits_for, limits_of

pytestmark = pytest.mark.integration

SUBJECTS = ["org", "key/k1"]


def figure(admission: Admission, kind: LimitKind) -> Figure:
    assert isinstance(admission, Admitted | Denied)
    return next(each for each in admission.figures if each.kind is kind)


def denied(admission: Admission, kind: LimitKind, subject: str) -> Denied:
    assert isinstance(admission, Denied), admission
    assert (admission.denier.kind, admission.denier.subject) == (kind, subject)
    assert admission.denier in admission.figures
    return admission


@pytest.mark.parametrize("subject", SUBJECTS)
async def test_burst_passes_and_the_next_waits_for_one_request(case: Case, subject: str) -> None:
    org, limits = an_organization(), limits_for(subject, requests_per_second=1, burst=3)
    for remaining in (2, 1, 0):
        admission = await case.store.admit(a_demand(org), limits)
        assert isinstance(admission, Admitted)
        assert figure(admission, LimitKind.REQUESTS)[1:4] == (subject, 3, remaining)
    denial = denied(await case.store.admit(a_demand(org), limits), LimitKind.REQUESTS, subject)
    assert denial.wait_ms is not None
    assert 0 < denial.wait_ms <= 1001
    case.pass_time(org, denial.wait_ms / 1000)
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)


async def test_bucket_is_whole_again_when_its_figure_says_so(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", requests_per_second=1, burst=10)
    for _ in range(4):
        admission = await case.store.admit(a_demand(org), limits)
    reset_ms = figure(admission, LimitKind.REQUESTS).reset_ms
    assert 3000 < reset_ms <= 4000
    case.pass_time(org, reset_ms / 1000)
    (whole,) = await case.store.look(org, limits)
    assert (whole.remaining, whole.reset_ms) == (10, 0)


async def test_what_refills_between_two_denials_is_kept(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", requests_per_second=1, burst=1)
    await case.store.admit(a_demand(org), limits)
    for waited in range(1, 4):
        case.pass_time(org, 0.25)
        denial = denied(await case.store.admit(a_demand(org), limits), LimitKind.REQUESTS, "org")
        assert denial.wait_ms is not None
        assert denial.wait_ms <= 1001 - 250 * waited
    case.pass_time(org, 0.25)
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)


async def test_bucket_never_holds_more_than_its_burst(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", requests_per_second=1, burst=2)
    for _ in range(2):
        await case.store.admit(a_demand(org), limits)
    case.pass_time(org, 50)
    admissions = [await case.store.admit(a_demand(org), limits) for _ in range(3)]
    assert [type(admission) for admission in admissions] == [Admitted, Admitted, Denied]


async def test_keys_of_an_organization_share_its_bucket_and_have_their_own(case: Case) -> None:
    org = an_organization()

    def of_key(name: str) -> CallerLimits:
        return limits_of(
            SubjectLimits(subject="org", requests_per_second=1, burst=3),
            SubjectLimits(subject=f"key/{name}", requests_per_second=1, burst=2),
        )

    async def admit(name: str) -> Admission:
        return await case.store.admit(a_demand(org, key_id=KeyId(name)), of_key(name))

    assert [type(await admit("a")) for _ in range(2)] == [Admitted, Admitted]
    denied(await admit("a"), LimitKind.REQUESTS, "key/a")
    assert isinstance(await admit("b"), Admitted)
    denied(await admit("b"), LimitKind.REQUESTS, "org")


async def test_organizations_do_not_touch_one_another(case: Case) -> None:
    limits = limits_for("org", requests_per_second=1, burst=1, max_parallel=1)
    for org in (an_organization(), an_organization()):
        assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)
        assert isinstance(await case.store.admit(a_demand(org), limits), Denied)


@pytest.mark.parametrize("subject", SUBJECTS)
async def test_tokens_are_taken_as_reserved_and_given_back_as_used(case: Case, subject: str) -> None:
    org, limits = an_organization(), limits_for(subject, tokens_per_minute=250)
    first, second, third = a_demand(org), a_demand(org), a_demand(org)
    await case.store.admit(first, limits)
    assert 50 <= figure(await case.store.admit(second, limits), LimitKind.TOKENS).remaining < 60
    assert denied(await case.store.admit(third, limits), LimitKind.TOKENS, subject).wait_ms
    await case.store.settle(Settlement(request_id=first.request_id, organization_id=org, tokens=30, micro_usd=0))
    assert isinstance(await case.store.admit(third, limits), Admitted)


async def test_tokens_used_beyond_the_reservation_are_owed(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", tokens_per_minute=600)
    demand = a_demand(org, tokens_output=590)
    await case.store.admit(demand, limits)
    await case.store.settle(Settlement(request_id=demand.request_id, organization_id=org, tokens=3000, micro_usd=0))
    case.pass_time(org, 30)
    denial = denied(await case.store.admit(a_demand(org), limits), LimitKind.TOKENS, "org")
    assert denial.wait_ms is not None
    assert 218_000 < denial.wait_ms <= 220_001
    # The debt outlives the time after which the bucket would have been full without it.
    case.pass_time(org, 215)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    case.pass_time(org, 5.1)
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)


async def test_request_larger_than_the_bucket_passes_when_it_is_full_and_is_owed(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", tokens_per_minute=600)
    admission = await case.store.admit(a_demand(org, tokens_input=1790, tokens_output=10), limits)
    assert isinstance(admission, Admitted)
    assert figure(admission, LimitKind.TOKENS).remaining == 0
    assert 179_000 < figure(admission, LimitKind.TOKENS).reset_ms <= 180_000
    small = denied(await case.store.admit(a_demand(org), limits), LimitKind.TOKENS, "org")
    assert small.wait_ms is not None
    assert 129_000 < small.wait_ms <= 130_001
    large = denied(await case.store.admit(a_demand(org, tokens_input=1790), limits), LimitKind.TOKENS, "org")
    assert large.wait_ms is not None
    assert 179_000 < large.wait_ms <= 180_001
    case.pass_time(org, 125)
    assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    case.pass_time(org, large.wait_ms / 1000 - 125)
    assert isinstance(await case.store.admit(a_demand(org, tokens_input=1790), limits), Admitted)


@pytest.mark.parametrize("subject", SUBJECTS)
async def test_parallel_requests_are_bounded_until_one_ends(case: Case, subject: str) -> None:
    org, limits = an_organization(), limits_for(subject, max_parallel=2)
    first = a_demand(org)
    assert figure(await case.store.admit(first, limits), LimitKind.PARALLEL)[1:] == (subject, 2, 1, 0)
    assert figure(await case.store.admit(a_demand(org), limits), LimitKind.PARALLEL).remaining == 0
    assert denied(await case.store.admit(a_demand(org), limits), LimitKind.PARALLEL, subject).wait_ms == 1000
    await case.store.settle(Settlement(request_id=first.request_id, organization_id=org, tokens=0, micro_usd=0))
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)


async def test_overdue_request_no_longer_takes_a_place(case: Case) -> None:
    org, limits = an_organization(), limits_for("org", max_parallel=1)
    await case.store.admit(a_demand(org), limits)
    case.pass_time(org, OVERDUE_S + 1)
    assert isinstance(await case.store.admit(a_demand(org), limits), Admitted)


ALL_LIMITS: list[Any] = [
    pytest.param({"requests_per_second": 1, "burst": 1}, id="requests"),
    pytest.param({"tokens_per_minute": 150}, id="tokens"),
    pytest.param({"max_parallel": 1}, id="parallel"),
]


@pytest.mark.parametrize("fields", ALL_LIMITS)
async def test_denial_changes_nothing(case: Case, fields: dict[str, Any]) -> None:
    org = an_organization()
    limits = limits_of(
        SubjectLimits(subject="org", requests_per_second=100, burst=100, tokens_per_minute=10_000, max_parallel=50),
        SubjectLimits(subject="key/k1", **fields),
    )
    await case.store.admit(a_demand(org), limits)
    before = case.kept(org)
    for _ in range(3):
        assert isinstance(await case.store.admit(a_demand(org), limits), Denied)
    assert case.kept(org) == before


async def test_figures_of_a_denial_are_what_is_there(case: Case) -> None:
    org = an_organization()
    limits = limits_of(
        SubjectLimits(subject="org", tokens_per_minute=10_000, max_parallel=50),
        SubjectLimits(subject="key/k1", max_parallel=1),
    )
    admission = await case.store.admit(a_demand(org), limits)
    denial = await case.store.admit(a_demand(org), limits)
    assert isinstance(denial, Denied)
    assert figure(denial, LimitKind.PARALLEL).remaining == figure(admission, LimitKind.PARALLEL).remaining == 49
    assert figure(denial, LimitKind.TOKENS).remaining >= figure(admission, LimitKind.TOKENS).remaining


async def test_of_several_denials_the_longest_wait_is_told(case: Case) -> None:
    org = an_organization()
    limits = limits_of(
        SubjectLimits(subject="org", requests_per_second=1, burst=1, tokens_per_minute=100, max_parallel=1),
        SubjectLimits(subject="key/k1", requests_per_second=10, burst=1),
    )
    await case.store.admit(a_demand(org), limits)
    denial = denied(await case.store.admit(a_demand(org), limits), LimitKind.TOKENS, "org")
    assert denial.wait_ms is not None
    case.pass_time(org, denial.wait_ms / 1000)
    denied(await case.store.admit(a_demand(org), limits), LimitKind.PARALLEL, "org")


async def test_look_changes_nothing_and_agrees_with_the_admission(case: Case) -> None:
    org = an_organization()
    limits = limits_for("org", requests_per_second=1, burst=5, tokens_per_minute=600, max_parallel=3)
    assert [each.remaining for each in await case.store.look(org, limits)] == [5, 600, 3]
    assert not case.kept(org) or case.uses(org) == {}
    admission = await case.store.admit(a_demand(org), limits)
    assert isinstance(admission, Admitted)
    before = case.kept(org)
    seen = await case.store.look(org, limits)
    assert [each[:3] for each in seen] == [each[:3] for each in admission.figures]
    assert all(0 <= now.remaining - then.remaining <= 10 for now, then in zip(seen, admission.figures, strict=True))
    assert case.kept(org) == before


# --- Retry-After is the truth.


def a_random_state(seed: int) -> tuple[CallerLimits, list[int], list[float], int]:
    """Limits, tokens of the requests before, seconds between them, tokens of the request that is to be denied."""
    chance = random.Random(seed)
    per_minute = chance.choice([60, 600, 7000, 123_457, 10**9])
    limits = limits_of(
        SubjectLimits(
            subject="org",
            requests_per_second=chance.choice([1, 3, 7, 100, 999]),
            burst=chance.choice([1, 2, 5]),
            tokens_per_minute=per_minute,
        ),
        SubjectLimits(subject="key/k1", requests_per_second=chance.choice([1, 9, 50]), burst=chance.choice([1, 3])),
    )
    sizes = [chance.randint(1, 2 * per_minute) for _ in range(8)]
    pauses = [chance.choice([0.0, chance.random() / 20, chance.random() * 3]) for _ in sizes]
    return limits, sizes, pauses, chance.randint(1, 3 * per_minute)


@pytest.mark.parametrize("part", range(4))
async def test_whoever_waits_as_long_as_told_succeeds(case: Case, part: int) -> None:
    waits = 0
    for seed in range(50 * part, 50 * part + 50):
        org, (limits, sizes, pauses, size) = an_organization(), a_random_state(seed)
        for before, pause in zip(sizes, pauses, strict=True):
            await case.store.admit(a_demand(org, tokens_input=before, tokens_output=0), limits)
            case.pass_time(org, pause)
        last = a_demand(org, tokens_input=size, tokens_output=0)
        denial = await case.store.admit(last, limits)
        while isinstance(denial, Admitted):
            last = a_demand(org, tokens_input=size, tokens_output=0)
            denial = await case.store.admit(last, limits)
        assert isinstance(denial, Denied)
        assert denial.wait_ms is not None
        # By the store's own clock, in whole milliseconds: what the calls have taken counts.
        taken_ms = max(0, case.now_ms() - denial.at_ms - 1)
        case.pass_time(org, (denial.wait_ms - taken_ms) / 1000)
        assert isinstance(await case.store.admit(last, limits), Admitted), (seed, denial)
        waits += 1
    assert waits == 50


async def test_whoever_waits_a_little_less_is_denied_again() -> None:
    case = MemoryCase()
    for seed in range(50):
        org, (limits, sizes, pauses, size) = an_organization(), a_random_state(seed)
        for before, pause in zip(sizes, pauses, strict=True):
            await case.store.admit(a_demand(org, tokens_input=before, tokens_output=0), limits)
            case.pass_time(org, pause)
        denial = await case.store.admit(a_demand(org, tokens_input=size, tokens_output=0), limits)
        if isinstance(denial, Denied) and denial.wait_ms is not None and denial.wait_ms > 3:
            case.pass_time(org, (denial.wait_ms - 2) / 1000)
            assert isinstance(await case.store.admit(a_demand(org, tokens_input=size, tokens_output=0), limits), Denied)
