"""The counts beside each other: every difference has a reason, and no reason is given where nothing differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.usage.usage_builders import a_finished, a_spool, a_usage, an_entry
from usage.accounts import Accounts, Counts, differences
from usage.archive import Archive
from usage.delivery import count_mark
from usage.entries import entry_of
from usage.reconcile import EnvoyCount
from usage.spool import RECORDS_MARK, Changes, Refusal, Spool
from usage.sums import PART, sum_records

QUIET = Counts(
    completed=10,
    running=0,
    known=10,
    unaccounted=0,
    kinds={"forwarded": 7, "limited": 1, "refused": 1, "anonymous": 1},
    records=8,
    estimates=0,
    delivered=8,
    refused=0,
    waiting=0,
    oldest_waiting_s=0.0,
    unsettled=0,
    open=0,
    malformed=0,
)


def told(**changes: Any) -> dict[str, int]:
    """Reasons and how many requests, of counts that differ from quiet ones by this."""
    return {one["reason"]: one["requests"] for one in differences(replace(QUIET, **changes))}


def test_nothing_is_explained_where_nothing_differs() -> None:
    assert told() == {}
    assert QUIET.as_json()["differences"] == []


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"completed": 13}, {"NOT_TOLD_YET": 3}),
        ({"completed": 13, "unaccounted": 2}, {"NOT_TOLD_YET": 1, "UNACCOUNTED": 2}),
        ({"completed": 13, "unaccounted": None}, {"NOT_TOLD_YET": 3}),
        ({"completed": 9}, {}),
        ({"completed": None, "known": None, "unaccounted": None}, {"ENVOY_UNKNOWN": 0}),
        ({"records": 7, "delivered": 7}, {"WITHOUT_RECORD": 1}),
        ({"records": 10, "estimates": 2, "delivered": 9}, {"ESTIMATES": 2, "REPLACED": 1}),
        ({"delivered": 5, "waiting": 3}, {"WAITING": 3}),
        ({"delivered": 5, "refused": 3}, {"REFUSED": 3}),
        ({"delivered": 9}, {"DELIVERED_TWICE": 1}),
        ({"unsettled": 4}, {"UNSETTLED": 4}),
        ({"open": 4}, {"OPEN": 4}),
        ({"open": None}, {}),
        ({"malformed": 4}, {"MALFORMED": 4}),
    ],
    ids=str,
)
def test_every_difference_has_its_reason(changes: dict[str, Any], reasons: dict[str, int]) -> None:
    assert told(**changes) == reasons


class FakeReconciliation:
    """Envoy has completed five requests and runs one; four are known."""

    unaccounted: int | None = 0

    async def compare(self) -> tuple[EnvoyCount, int] | None:
        return EnvoyCount(started_us=1, at_us=2, at_s=2.0, ended=5, running=1), 4


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[tuple[Spool, Archive]]:
    spool = a_spool(tmp_path)
    archive = Archive(spool.path)
    yield spool, archive
    archive.close()
    spool.close()


async def test_counts_are_looked_up_afresh(kept: tuple[Spool, Archive]) -> None:
    spool, archive = kept
    estimate = an_entry("r-1", revision=0)
    refused = an_entry("r-3", kind="refused", record=None, settlement=None, ended_us=3)
    spool.write(Changes(entries=[estimate, an_entry("r-2", ended_us=2), refused]))
    spool.write(Changes(entries=[an_entry("r-1", ended_us=1), an_entry("r-2", ended_us=2)]))
    spool.write(Changes(marks={RECORDS_MARK: 2, count_mark(RECORDS_MARK): 2}))
    spool.write(Changes(refused=[Refusal(stream=RECORDS_MARK, place=2, reason="NO")]))

    async def four() -> int | None:
        return 4

    accounts = Accounts(
        archive=archive,
        reconciliation=FakeReconciliation(),
        oldest_s=lambda: 7.0,
        malformed=lambda: 1.0,
        count_open=four,
    )
    assert await accounts.look() == Counts(
        completed=5,
        running=1,
        known=4,
        unaccounted=0,
        kinds={"forwarded": 2, "refused": 1},
        records=3,
        estimates=1,
        delivered=2,
        refused=1,
        waiting=1,
        oldest_waiting_s=7.0,
        unsettled=2,
        open=4,
        malformed=1,
    )


async def test_sums_are_exact_and_by_organisation_and_model(kept: tuple[Spool, Archive]) -> None:
    spool, archive = kept
    costs: Counter[tuple[str, str]] = Counter()
    for number in range(40):
        organization, model = ("acme", "globex")[number % 2], ("m", "n")[number % 4 // 2]
        finished = a_finished(
            request_id=f"r-{number}",
            organization_id=organization,
            model=model,
            started_us=number,
            reported=a_usage(number, 3),
        )
        entry = entry_of(finished)
        assert entry is not None
        spool.write(Changes(entries=[entry, an_entry(f"x-{number}", record=None)]))
        costs[organization, model] += -(-(number * 5000 + 3 * 15_000) // 1000)
    found = await sum_records(archive, since_us=None, organization_id=None)
    assert {(one.organization_id, one.model): one.cost_micro_usd for one in found} == costs
    assert [one.requests for one in found] == [10] * 4
    assert sum(one.tokens_input for one in found) == sum(range(40))
    [late] = await sum_records(archive, since_us=39, organization_id=None)
    assert (late.organization_id, late.model, late.tokens_input) == ("globex", "n", 39)
    assert await sum_records(archive, since_us=40, organization_id=None) == []
    mine = await sum_records(archive, since_us=None, organization_id="acme")
    assert {one.organization_id for one in mine} == {"acme"}


async def test_sums_go_beyond_one_part(kept: tuple[Spool, Archive]) -> None:
    spool, archive = kept
    entry = entry_of(a_finished(reported=a_usage(1, 0)))
    assert entry is not None
    many = [replace(entry, request_id=str(number)) for number in range(PART + 5)]
    spool.write(Changes(entries=many))
    [found] = await sum_records(archive, since_us=None, organization_id=None)
    assert (found.requests, found.tokens_input) == (PART + 5, PART + 5)
