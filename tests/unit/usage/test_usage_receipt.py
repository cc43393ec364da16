"""Receipts of what the spool keeps: decisions, attempts, figures, and whose they are."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.audit import AuditAction
from gateway.errors import Reason, Refused, StoreUnavailable
from limits.about import About
from limits.model import LimitKind, Opened
from policies.model import OrganizationId
from tests.contract.document import document
from tests.unit.usage.usage_builders import (
    PRICES,
    REQUEST_ID,
    START_S,
    a_finished,
    a_spool,
    a_usage,
    an_attempt,
    an_event,
    figures_of,
)
from usage.archive import Archive
from usage.audit_app import ORGANIZATIONS_MAX, Receipts, Sources
from usage.entries import entry_of, estimate_of
from usage.record import record_id
from usage.spool import RECORDS_MARK, Changes, Entry, Refusal, Spool

POLICY = """
backends:
  - {id: a, uri: http://secret.test, price: {input_usd_per_1k: 0.005, output_usd_per_1k: 0.015}}
  - {id: b, uri: http://secret.test}
  - {id: off, uri: http://secret.test}
models:
  - model: gpt-4o
    backends:
      - {backend_id: a, weight: 70}
      - {backend_id: b, weight: 30, deny_list: [k-2]}
      - {backend_id: off, weight: 1}
    degraded_backends: [b]
kill_switches: [{backend_id: off, enabled: true}]
"""
US = START_S * 1_000_000
OTHER = "00000000-0000-4000-8000-000000000000"


class Log:
    """A log that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warning(self, event: str, **_: Any) -> None:
        self.told.append(event)


class Asked:
    """A spool, and who asks for receipts of it."""

    def __init__(self, directory: Path) -> None:
        self.spool: Spool = a_spool(directory)
        self.archive = Archive(self.spool.path)
        self.log = Log()
        self.running: dict[tuple[str, str], Opened] = {}
        self.store_is_down = False
        self.organizations: list[str] = []
        self.looked_in: list[str] = []
        log: Any = self.log
        self.receipts = Receipts(
            Sources(archive=self.archive, opened=self._opened, organizations=self._used, health=dict, log=log)
        )

    def write(self, *entries: Entry | None, **changes: Any) -> None:
        self.spool.write(Changes(entries=[entry for entry in entries if entry is not None], **changes))

    def keep(self, policy: str, *, digest: str = "0a1b") -> None:
        kept = {"directory": "policies", "files": [["router.yaml", policy]]}
        self.write(policies=[(digest, json.dumps(kept))])

    async def _opened(self, organization_id: str, request_id: str) -> Opened | None:
        if self.store_is_down:
            raise StoreUnavailable("away")
        self.looked_in.append(organization_id)
        return self.running.get((organization_id, request_id))

    async def _used(self) -> tuple[OrganizationId, ...]:
        return tuple(map(OrganizationId, self.organizations))

    async def find(self, request_id: str = REQUEST_ID, *, of: str = "acme", everyones: bool = False) -> dict[str, Any]:
        """A receipt, which is as documented in any case."""
        found = await self.receipts.find(request_id, of, everyones=everyones)
        document().validator("/components/schemas/Receipt").validate(found)
        return found

    async def is_unknown(self, request_id: str = REQUEST_ID, **asked: Any) -> bool:
        """Whether there is said to be no such request."""
        try:
            await self.find(request_id, **asked)
        except Refused as refused:
            return refused.reason is Reason.REQUEST_UNKNOWN
        return False


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[Asked]:
    opened = Asked(tmp_path)
    yield opened
    opened.archive.close()
    opened.spool.close()


def an_opened(**changes: Any) -> Opened:
    """A request that runs."""
    about = About(model="gpt-4o", endpoint="chat", policy="0a1b", prices=PRICES)
    fields: dict[str, Any] = {
        "request_id": REQUEST_ID,
        "organization_id": "acme",
        "key_id": "k-1",
        "admitted_ms": 1_800_000_000_000,
        "tokens_input": 10,
        "tokens_output": 100,
        "micro_usd": 1550,
        "about": about.written(),
    }
    return Opened(**(fields | changes))


def attempts(found: Mapping[str, Any]) -> list[tuple[str, str, int | None]]:
    return [(one["backend_id"], one["outcome"], one["status"]) for one in found["attempts"]]


# --- What it says.


async def test_candidates_are_those_of_the_policy_of_then_for_this_key(asked: Asked) -> None:
    asked.keep(POLICY)
    asked.write(entry_of(a_finished()), entry_of(a_finished(request_id=OTHER, key_id="k-2")))
    found = await asked.find()
    assert found["policy_version"] == "0a1b"
    assert found["candidates"] == [
        {"backend_id": "a", "weight": 70, "standing": "normal"},
        {"backend_id": "b", "weight": 30, "standing": "degraded"},
    ]
    assert [one["backend_id"] for one in (await asked.find(OTHER))["candidates"]] == ["a"]
    assert "secret.test" not in json.dumps(found)


async def test_policy_that_was_not_kept_leaves_the_candidates_unknown(asked: Asked) -> None:
    asked.write(entry_of(a_finished()))
    assert (await asked.find())["candidates"] is None
    asked.keep("models: [")
    assert (await asked.find())["candidates"] is None
    assert asked.log.told == ["kept_policy_rejected"]


async def test_usage_price_and_cost_are_those_of_the_record(asked: Asked) -> None:
    asked.write(entry_of(a_finished(reported=a_usage(100, 10, cached=40))))
    found = await asked.find()
    assert found["usage"] == {
        "tokens_input": 100,
        "tokens_output": 10,
        "tokens_input_cached": 40,
        "tokens_output_reasoning": 0,
        "source": "provider",
    }
    assert (found["price"]["backend_id"], found["price"]["cached_input_micro_usd_per_1k"]) == ("a", 2500)
    assert found["cost_micro_usd"] == (60 * 5000 + 40 * 2500 + 10 * 15_000) // 1000
    assert found["settlement"] == {"state": "WAITING", "tokens": 110, "micro_usd": found["cost_micro_usd"]}


async def test_settlement_and_delivery_are_told_once_they_are_done(asked: Asked) -> None:
    entry = entry_of(a_finished())
    asked.write(entry)
    assert (await asked.find())["delivery"] == {"state": "WAITING", "record_id": record_id(REQUEST_ID), "revision": 1}
    assert entry is not None
    asked.write(settled=[entry], marks={RECORDS_MARK: 1})
    found = await asked.find()
    assert (found["settlement"]["state"], found["delivery"]["state"]) == ("SETTLED", "DELIVERED")
    asked.write(refused=[Refusal(stream=RECORDS_MARK, place=1, reason="MSG_SIZE_TOO_LARGE")])
    assert (await asked.find())["delivery"]["state"] == "REFUSED"


async def test_failed_attempts_come_before_the_one_that_answered(asked: Asked) -> None:
    failed = an_attempt(backend="b", status=503, flags=("UF",))
    asked.write(entry_of(a_finished(attempts=2, decision="FAILOVER")), attempts=[failed])
    found = await asked.find()
    assert found["decision"]["what"] == "FAILOVER"
    assert attempts(found) == [("b", "FAILED", 503), ("a", "ANSWERED", 200)]


@pytest.mark.parametrize(
    ("changes", "last", "outcome"),
    [
        ({"status": 502}, {"status": 502}, ("a", "FAILED", 502)),
        ({"status": 400}, {"status": 400}, ("a", "ANSWERED", 400)),
        ({"status": 200, "flags": ("DC",)}, {"status": 200, "flags": ("DR",)}, ("a", "CUT", 200)),
        ({"status": 0, "flags": ("DC",), "backend": ""}, {"status": 0, "flags": ("DR",)}, ("a", "CUT", None)),
    ],
    ids=["failed", "refused by the backend", "cut", "left before an answer"],
)
async def test_last_attempt_is_told_once_and_as_it_ended(
    asked: Asked, changes: dict[str, Any], last: dict[str, Any], outcome: tuple[str, str, int | None]
) -> None:
    asked.write(entry_of(a_finished(**changes)), attempts=[an_attempt(**last)])
    assert attempts(await asked.find()) == [outcome]


async def test_where_no_backend_had_an_endpoint_nothing_was_tried(asked: Asked) -> None:
    gone = {"status": 503, "flags": ("UH",)}
    told_twice = [an_attempt(backend=backend, started_us=at, **gone) for at, backend in enumerate(("", "a", "", "b"))]
    unavailable = a_finished(status=503, flags=("URX",), attempts=2, decision="FAILOVER", backend="b")
    asked.write(entry_of(unavailable), attempts=told_twice)
    found = await asked.find()
    assert found["attempts"] == []
    assert found["decision"] == {
        "what": "ADMITTED",
        "reason": "NO_BACKEND_AVAILABLE",
        "limit_state": "WITHIN_LIMIT",
    }
    assert found["price"]["backend_id"] is None


async def test_backend_without_an_endpoint_is_passed_over_for_the_one_that_answered(asked: Asked) -> None:
    gone = {"status": 503, "flags": ("UH",)}
    told_twice = [an_attempt(backend=backend, started_us=at, **gone) for at, backend in enumerate(("", "b"))]
    asked.write(entry_of(a_finished(attempts=2, decision="FAILOVER")), attempts=told_twice)
    found = await asked.find()
    assert attempts(found) == [("b", "FAILED", 503), ("a", "ANSWERED", 200)]
    assert (found["decision"]["what"], found["decision"]["reason"]) == ("FAILOVER", None)


@pytest.mark.parametrize(
    ("status", "flags", "code"),
    [
        (502, (), "BACKEND_ERROR"),
        (504, ("UT",), "BACKEND_TIMEOUT"),
        (503, ("UO",), "BACKEND_UNAVAILABLE"),
        (503, ("UH",), "NO_BACKEND_AVAILABLE"),
        (429, (), None),
    ],
)
async def test_reason_is_the_code_of_what_was_answered_in_a_backends_place(
    asked: Asked, status: int, flags: tuple[str, ...], code: str | None
) -> None:
    failed = [an_attempt(backend="b", status=502), an_attempt(started_us=2 * US, status=status, flags=flags)]
    asked.write(entry_of(a_finished(status=status, attempts=2, decision="FAILOVER")), attempts=failed)
    found = await asked.find()
    assert (found["decision"]["what"], found["decision"]["reason"]) == ("FAILOVER", code)
    assert [attempt["backend_id"] for attempt in found["attempts"]] == ["b", "a"]


async def test_limits_are_told_with_their_figures(asked: Asked) -> None:
    figures = figures_of((LimitKind.REQUESTS, "org", 9), (LimitKind.MONTHLY_MICRO_USD, "key/k-1", 400_000))
    asked.write(entry_of(a_finished(figures=figures)))
    requests, money = (await asked.find())["limits"]
    assert (requests["subject"], requests["window"], requests["remaining"]) == ("organization", "burst", 9)
    assert (money["api_key_id"], money["period"], money["remaining"]) == ("k-1", "MONTHLY", 0.4)
    assert money["micro_usd"] == {"limit": 1_000_000, "current_usage": 600_000, "remaining": 400_000}


async def test_denial_has_its_reason_and_its_event(asked: Asked) -> None:
    denial = an_event(
        "e-1", request_id=REQUEST_ID, action=AuditAction.REQUEST_DENIED, metadata={"reason": "request_rate"}
    )
    finished = a_finished(
        status=429, reason="RATE_LIMIT_EXCEEDED", admitted=False, attempts=0, backend="", prices="", decision=""
    )
    asked.write(entry_of(finished), events=[denial, an_event("e-2", request_id=OTHER)])
    found = await asked.find()
    assert found["decision"] == {"what": "DENIED", "reason": "RATE_LIMIT_EXCEEDED", "limit_state": "RATE_LIMITED"}
    assert [event["event_id"] for event in found["events"]] == ["e-1"]
    assert (found["attempts"], found["price"], found["settlement"]["state"]) == ([], None, "NONE")


async def test_estimate_says_that_nobody_told_where_it_went(asked: Asked) -> None:
    asked.write(estimate_of(an_opened()))
    found = await asked.find()
    assert (found["decision"]["what"], found["usage"]["source"], found["delivery"]["revision"]) == (
        "ADMITTED",
        "estimated",
        0,
    )
    assert (found["state"], found["timestamps"]["ended"]) == ("ESTIMATED", None)
    assert found["settlement"] == {"state": "WAITING", "tokens": 110, "micro_usd": 1550}


async def test_request_that_runs_is_told_with_what_is_reserved(asked: Asked) -> None:
    asked.keep(POLICY)
    asked.running["acme", REQUEST_ID] = an_opened()
    found = await asked.find()
    assert (found["state"], found["model"], found["candidates"][0]["backend_id"]) == ("RUNNING", "gpt-4o", "a")
    assert found["settlement"] == {"state": "RESERVED", "tokens": 110, "micro_usd": 1550}
    assert await asked.is_unknown(of="globex")
    asked.store_is_down = True
    assert await asked.is_unknown()


async def test_admin_finds_what_runs_in_any_organisation_and_looks_in_his_own_first(asked: Asked) -> None:
    asked.organizations = [*(f"o{number}" for number in range(120)), "globex", "acme"]
    asked.running["acme", REQUEST_ID] = an_opened()
    found = await asked.find(of="globex", everyones=True)
    assert (found["state"], found["organization_id"]) == ("RUNNING", "acme")
    assert (asked.looked_in[0], asked.looked_in.count("globex")) == ("globex", 1)
    assert (await asked.find(of="", everyones=True))["state"] == "RUNNING"
    assert await asked.is_unknown(of="globex")
    asked.store_is_down = True
    assert await asked.is_unknown(of="globex", everyones=True)


async def test_no_more_organisations_are_looked_through_than_can_be(asked: Asked) -> None:
    asked.organizations = [f"o{number}" for number in range(ORGANIZATIONS_MAX + 100)]
    assert await asked.is_unknown(of="", everyones=True)
    assert len(asked.looked_in) == ORGANIZATIONS_MAX


# --- Which, and whose.


async def test_clients_id_leads_to_what_was_forwarded_and_not_to_its_repetition(asked: Asked) -> None:
    mine = "11111111-1111-4111-8111-111111111111"
    first = a_finished(client_request_id=mine)
    repeated = a_finished(request_id=OTHER, client_request_id=mine, reason="REPEATED", admitted=False)
    asked.write(entry_of(first), entry_of(repeated))
    assert (await asked.find(mine))["request_id"] == REQUEST_ID
    found = await asked.find(OTHER)
    assert (found["decision"]["what"], found["decision"]["reason"], found["attempts"]) == ("REPEATED", None, [])


async def test_clients_id_is_looked_for_within_the_organisation(asked: Asked) -> None:
    mine = "11111111-1111-4111-8111-111111111111"
    asked.write(
        entry_of(a_finished(client_request_id=mine)),
        entry_of(a_finished(request_id=OTHER, client_request_id=mine, organization_id="globex")),
    )
    assert (await asked.find(mine))["request_id"] == REQUEST_ID
    assert (await asked.find(mine, of="globex"))["request_id"] == OTHER


async def test_others_requests_are_unknown_but_to_an_admin(asked: Asked) -> None:
    asked.write(entry_of(a_finished()))
    assert await asked.is_unknown(of="globex")
    assert await asked.is_unknown("nothing")
    assert (await asked.find(of="globex", everyones=True))["organization_id"] == "acme"


async def test_request_of_nobody_is_for_an_admin_alone(asked: Asked) -> None:
    said = {"reason": "key_unknown", "status": 401, "endpoint": "chat", "trace_id": REQUEST_ID}
    denial = an_event(
        request_id=REQUEST_ID, organization_id="", actor="", action=AuditAction.REQUEST_DENIED, metadata=said
    )
    asked.write(events=[denial])
    assert await asked.is_unknown()
    found = await asked.find(everyones=True)
    assert (found["organization_id"], found["status"]) == (None, 401)
    assert found["decision"] == {"what": "DENIED", "reason": "AUTH_INVALID", "limit_state": "WITHIN_LIMIT"}
