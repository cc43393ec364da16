"""The ledger's HTTP server: who may ask, and errors as the contract has them."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import usage.audit_app
from gateway import names
from gateway.endpoints import AUDIT_PATH
from tests.contract.document import document
from tests.unit.usage.usage_builders import REQUEST_ID, a_finished, a_spool
from usage.accounts import Accounts, Counts
from usage.archive import Archive
from usage.audit_app import Sources, build_audit_app
from usage.entries import entry_of
from usage.operator_app import POLICIES_PATH, RECONCILIATION_PATH, SUMS_PATH, operator_routes
from usage.spool import Changes, Spool

RECEIPT = f"{AUDIT_PATH}/{REQUEST_ID}"
ASKED_BY = str(uuid.uuid4())
ACME = {names.HEADER_ORGANIZATION: "acme", names.HEADER_REQUEST_ID: ASKED_BY}
ADMIN = ACME | {names.HEADER_ADMIN: "true"}


class Log:
    """A log that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    def exception(self, event: str, **fields: Any) -> None:
        self.told.append((event, fields))


class NoReconciliation:
    """Envoy does not answer."""

    unaccounted: int | None = None

    async def compare(self) -> None:
        return None


class Broken(Archive):
    """An archive whose file is what the error says."""

    error: Exception | None = None
    delay_s = 0.0

    async def call(self, work: Any) -> Any:
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return await super().call(work)


class Asked:
    """The server without a socket, over a spool of its own."""

    def __init__(self, directory: Path) -> None:
        self.spool: Spool = a_spool(directory)
        self.archive = Broken(self.spool.path)
        self.log = Log()
        log: Any = self.log

        async def nobody() -> int | None:
            return None

        accounts = Accounts(
            archive=self.archive,
            reconciliation=NoReconciliation(),
            oldest_s=lambda: 0.0,
            malformed=lambda: 0.0,
            count_open=nobody,
        )
        sources = Sources(archive=self.archive, opened=None, health=lambda: {"spool": "writable"}, log=log)
        app = build_audit_app(sources, operator_routes(self.archive, accounts, log=log))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ledger")

    async def get(self, path: str, headers: dict[str, str] | None = None, **parameters: str) -> httpx.Response:
        return await self.client.get(path, headers=headers, params=parameters)


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[Asked]:
    opened = Asked(tmp_path)
    entry = entry_of(a_finished())
    assert entry is not None
    opened.spool.write(Changes(entries=[entry], policies=[("0c", '{"directory": "p", "files": []}')]))
    yield opened
    await opened.client.aclose()
    opened.archive.close()
    opened.spool.close()


def is_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an error, which is as documented."""
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["code"]) == (status, code)
    assert response.headers["cache-control"] == "no-store"
    if body["trace_id"]:
        document().validator(f"/components/schemas/RouterError{status}").validate(body)
    return body


async def test_own_receipt_is_told_and_anothers_is_not(asked: Asked) -> None:
    response = await asked.get(RECEIPT, ACME)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    assert response.json()["request_id"] == REQUEST_ID
    other = await asked.get(RECEIPT, ACME | {names.HEADER_ORGANIZATION: "globex"})
    unknown = await asked.get(f"{AUDIT_PATH}/{uuid.uuid4()}", ACME)
    assert is_error(other, 404, "REQUEST_NOT_FOUND") == is_error(unknown, 404, "REQUEST_NOT_FOUND")
    assert other.json()["trace_id"] == ASKED_BY


@pytest.mark.parametrize("path", [AUDIT_PATH, RECEIPT])
@pytest.mark.parametrize("said", [{}, {names.HEADER_ADMIN: "yes"}, {names.HEADER_ORGANIZATION: ""}], ids=str)
async def test_whoever_was_not_authenticated_is_told_nothing(asked: Asked, path: str, said: dict[str, str]) -> None:
    is_error(await asked.get(path, said), 401, "AUTH_INVALID")


async def test_listing_is_of_the_own_organisation_whatever_is_asked(asked: Asked) -> None:
    assert len((await asked.get(AUDIT_PATH, ACME)).json()["events"]) == 1
    assert len((await asked.get(AUDIT_PATH, ACME, organization="acme")).json()["events"]) == 1
    is_error(await asked.get(AUDIT_PATH, ACME, organization="globex"), 403, "FORBIDDEN")
    assert (await asked.get(AUDIT_PATH, ACME | {names.HEADER_ORGANIZATION: "globex"})).json()["events"] == []
    assert (await asked.get(AUDIT_PATH, ADMIN, organization="globex")).json()["events"] == []
    assert len((await asked.get(AUDIT_PATH, ADMIN)).json()["events"]) == 1


async def test_trace_of_envoys_is_told_in_errors(asked: Asked) -> None:
    traced = ACME | {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    assert (await asked.get(f"{AUDIT_PATH}/x", traced)).json()["trace_id"] == "ab" * 16
    feigned = ACME | {"traceparent": "<script>"}
    assert (await asked.get(f"{AUDIT_PATH}/x", feigned)).json()["trace_id"] == ASKED_BY


@pytest.mark.parametrize("path", [AUDIT_PATH, RECEIPT, SUMS_PATH, RECONCILIATION_PATH])
async def test_spool_that_cannot_be_read_is_a_503(asked: Asked, path: str) -> None:
    asked.archive.error = sqlite3.OperationalError("disk I/O error")
    body = is_error(await asked.get(path, ADMIN), 503, "SERVICE_UNAVAILABLE")
    assert "disk" not in body["error"]
    assert [event for event, _ in asked.log.told] == ["spool_not_readable"]


async def test_bug_is_a_500_with_the_id_that_is_logged(asked: Asked) -> None:
    asked.archive.error = RuntimeError("secret")
    body = is_error(await asked.get(RECEIPT, ACME), 500, "INTERNAL_ERROR")
    [(event, fields)] = asked.log.told
    assert (event, fields["request_id"]) == ("audit_failed", ASKED_BY)
    assert fields["error_id"] in body["error"]
    assert "secret" not in body["error"]


@pytest.mark.parametrize("path", ["/", "/v1/audit", "/operator", f"{POLICIES_PATH}/none", "/healthz/x"])
async def test_nothing_is_anywhere_else(asked: Asked, path: str) -> None:
    is_error(await asked.get(path, ADMIN), 404, "NOT_FOUND")


async def test_receipt_has_no_parameters(asked: Asked) -> None:
    assert is_error(await asked.get(RECEIPT, ACME, verbose="1"), 400, "VALIDATION_ERROR")["param"] == "verbose"


@pytest.mark.parametrize("path", [AUDIT_PATH, RECEIPT])
async def test_ledger_that_is_slow_says_so_before_envoy_gives_up(
    asked: Asked, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage.audit_app, "ANSWER_WITHIN_S", 0.01)
    asked.archive.delay_s = 60
    assert "The ledger" in is_error(await asked.get(path, ACME), 503, "SERVICE_UNAVAILABLE")["error"]


async def test_health_says_what_the_ledger_says(asked: Asked) -> None:
    assert (await asked.get("/healthz")).json() == {"status": "ok", "spool": "writable"}


async def test_operator_is_told_of_policies_sums_and_counts(asked: Asked) -> None:
    assert (await asked.get(f"{POLICIES_PATH}/0c")).json() == {"directory": "p", "files": []}
    [found] = (await asked.get(SUMS_PATH)).json()["sums"]
    assert (found["organization_id"], found["requests"]) == ("acme", 1)
    is_error(await asked.get(SUMS_PATH, since="soon"), 400, "VALIDATION_ERROR")
    counts = (await asked.get(RECONCILIATION_PATH)).json()
    assert counts.keys() == {*Counts.__dataclass_fields__, "differences"}
    assert (counts["completed"], counts["records"], counts["waiting"]) == (None, 1, 1)
