"""The disk fails the ledger: serving goes on, somebody is told, and nothing is lost once it is well again."""

from __future__ import annotations

import json
import resource
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.calls import CHAT, call
from tests.harness.limits import StoreView, limited_policy
from tests.harness.process import eventually
from tests.harness.stack import Stack, running_stack

pytestmark = pytest.mark.integration

ORGANIZATION = "acme"


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack(valkey=True, mocks=("a",), workers=1) as running:
        running.apply(limited_policy(running.uris))
        yield running


def serve(stack: Stack, count: int) -> dict[str, dict[str, int]]:
    """Requests that are answered well: what each has used, by request id."""
    with stack.client(f"dev-{ORGANIZATION}-x") as client:
        answers = [call(client, CHAT) for _ in range(count)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.headers["x-request-id"]: answer.json()["usage"] for answer in answers}


def delivered(stack: Stack) -> list[dict[str, Any]]:
    """Every record in the JSONL files."""
    files = sorted((stack.directory / "records" / "usage.records.v1").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def health(stack: Stack) -> dict[str, Any]:
    found: dict[str, Any] = stack.http.get(f"{stack.usage_url}/healthz").json()
    return found


def all_is_recorded(stack: Stack, used: dict[str, dict[str, int]]) -> None:
    """Wait until each request has one record with what its client saw, and the budget the same sum."""
    eventually(lambda: {record["request_id"] for record in delivered(stack)} >= set(used), "every request has a record")
    assert Counter(record["request_id"] for record in delivered(stack)) == Counter(list(used))
    for record in delivered(stack):
        seen = used[record["request_id"]]
        assert (record["tokens_input"], record["tokens_output"]) == (seen["prompt_tokens"], seen["completion_tokens"])
    cost = sum(record["cost_micro_usd"] for record in delivered(stack))
    view = StoreView(stack)
    eventually(lambda: view.open(ORGANIZATION) == 0, "every request is settled")
    eventually(lambda: view.spent_micro_usd(ORGANIZATION) == cost, "the budget agrees")
    view.close()


def test_a_full_disk_holds_up_no_request_and_loses_none(stack: Stack) -> None:
    used = serve(stack, 20)
    all_is_recorded(stack, used)
    log = stack.directory / "usage.db-wal"
    _, hard = resource.prlimit(stack.usage.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(stack.usage.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
    used |= serve(stack, 50)
    eventually(lambda: health(stack)["spool"] == "not_writable", "the ledger says so")
    assert '"spool_not_writable"' in stack.usage.log()
    eventually(lambda: _readiness(stack) == ("degraded", 200), "readiness warns, and the router is ready")
    used |= serve(stack, 50)
    resource.prlimit(stack.usage.pid, resource.RLIMIT_FSIZE, (hard, hard))
    all_is_recorded(stack, used)
    eventually(lambda: not health(stack)["warnings"], "the ledger is well again")
    assert '"spool_writable"' in stack.usage.log()


def _readiness(stack: Stack) -> tuple[str, int]:
    response = stack.readyz()
    assert response is not None
    body = response.json()
    warned = any("spool" in warning for warning in body["components"]["usage"].get("warnings", []))
    return (body["status"] if warned else "", response.status_code)


def _cut_tail(directory: Path) -> str:
    """Damage the end of the log: the last commits can no longer be read."""
    log = directory / "usage.db-wal"
    content = bytearray(log.read_bytes())
    for at in range(len(content) - 3 * 4096, len(content), 64):
        content[at] ^= 0xFF
    log.write_bytes(content)
    return "spool_tail_cut"


def _spoil_file(directory: Path) -> str:
    """Overwrite the beginning of the file: it is no database any more."""
    (directory / "usage.db-wal").unlink()
    with (directory / "usage.db").open("r+b") as file:
        file.write(b"\xa5" * 2048)
    return "spool_damaged"


@pytest.mark.parametrize("damage", [_cut_tail, _spoil_file], ids=["a cut tail", "a spoilt file"])
def test_a_damaged_spool_is_told_of_and_made_whole_from_the_journal(stack: Stack, damage: Any) -> None:
    used = serve(stack, 60)
    all_is_recorded(stack, used)
    stack.usage.stop(signal.SIGKILL)
    used |= serve(stack, 20)
    event = damage(stack.directory)
    stack.usage.start()
    used |= serve(stack, 20)
    all_is_recorded(stack, used)
    assert f'"{event}"' in stack.usage.log()
    metrics = stack.http.get(f"{stack.usage_url}/metrics").text
    assert "router_usage_spool_recovered_total 1.0" in metrics


def _spoil_all(directory: Path) -> None:
    """Overwrite what a running ledger has written; what it holds in memory does not last."""
    for name in ("usage.db", "usage.db-wal"):
        with (directory / name).open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(100)
            file.write(b"\xa5" * (size - 100))


def test_a_spool_found_damaged_at_work_is_made_whole_without_a_hand(stack: Stack) -> None:
    used = serve(stack, 60)
    all_is_recorded(stack, used)
    pid = stack.usage.pid
    _spoil_all(stack.directory)
    used |= serve(stack, 20)
    eventually(lambda: '"spool_replaced"' in stack.usage.log(), "the damage is found, and what can be read is kept")
    used |= serve(stack, 20)
    all_is_recorded(stack, used)
    assert stack.usage.pid == pid
    assert '"spool_damaged_at_work"' in stack.usage.log()
    metrics = stack.http.get(f"{stack.usage_url}/metrics").text
    assert "router_usage_spool_recovered_total 1.0" in metrics
    eventually(lambda: _readiness(stack) == ("", 200), "nothing is left to warn of")


def test_a_spool_whose_file_is_removed_is_written_anew_with_everything_in_it(stack: Stack) -> None:
    used = serve(stack, 30)
    all_is_recorded(stack, used)
    for name in ("usage.db", "usage.db-wal", "usage.db-shm"):
        (stack.directory / name).unlink()
    used |= serve(stack, 20)
    eventually(lambda: '"spool_replaced"' in stack.usage.log(), "the ledger has noticed")
    used |= serve(stack, 20)
    all_is_recorded(stack, used)
    assert '"spool_gone"' in stack.usage.log()
    with sqlite3.connect(f"file:{stack.directory / 'usage.db'}?mode=ro", uri=True) as db:
        assert {row[0] for row in db.execute("SELECT request_id FROM requests")} >= set(used)
    eventually(lambda: _readiness(stack) == ("", 200), "nothing is left to warn of")
