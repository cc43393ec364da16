"""``router usage`` beside a ledger that says what it is told to say."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cli.usage
from cli.__main__ import router
from gateway import names
from gateway.settings import AUDIT_SOCKET
from usage.accounts import Counts
from usage.operator_app import RECONCILIATION_PATH, SUMS_PATH

COUNTS = Counts(
    completed=10,
    running=1,
    known=10,
    unaccounted=0,
    kinds={"forwarded": 9, "refused": 1},
    records=9,
    estimates=0,
    delivered=6,
    refused=0,
    waiting=3,
    oldest_waiting_s=4.0,
    unsettled=0,
    open=1,
    malformed=0,
).as_json()
SUM = {
    "organization_id": "acme",
    "model": "gpt-4o",
    "requests": 1234,
    "tokens_input": 5,
    "tokens_output": 6,
    "cost_micro_usd": 9_007_199_254_740_993,
}


class FakeLedger:
    """Answers in order, the last one again and again; remembers what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.answers: list[tuple[int, Any]] = []
        self.asked: list[str] = []
        ledger = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.headers[names.HEADER_ADMIN] == "true"
                ledger.asked.append(self.path)
                status, body = ledger.answers.pop(0) if len(ledger.answers) > 1 else ledger.answers[0]
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingUnixStreamServer(str(directory / AUDIT_SOCKET), Handler)

    def run(self, *arguments: str) -> Result:
        env = {"RUN_DIR": str(self.directory), "ROUTER_CONFIG": None, "COLUMNS": None}
        return CliRunner(env=env).invoke(router, ["usage", *arguments])


@pytest.fixture
def ledger() -> Iterator[FakeLedger]:
    with tempfile.TemporaryDirectory(prefix="lg-", dir="/tmp") as directory:
        fake = FakeLedger(Path(directory))
        thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield fake
        fake.server.shutdown()
        fake.server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.usage, "POLL_S", 0.001)


def test_counts_that_agree_are_explained_and_end_well(ledger: FakeLedger) -> None:
    ledger.answers = [(200, COUNTS)]
    done = ledger.run("reconcile")
    assert done.exit_code == 0
    assert ledger.asked == [RECONCILIATION_PATH]
    assert "- 3 records wait to be delivered, the oldest for 4 s." in done.stdout
    assert "9 forwarded, 1 refused" in done.stdout
    assert done.stdout.endswith("Every request is accounted for.\n")
    assert json.loads(ledger.run("reconcile", "--json").stdout) == COUNTS


def test_request_that_is_unaccounted_for_is_exit_code_1(ledger: FakeLedger) -> None:
    ledger.answers = [(200, COUNTS | {"unaccounted": 2})]
    done = ledger.run("reconcile")
    assert done.exit_code == 1
    assert "Every request is accounted for." not in done.stdout
    assert ledger.run("reconcile", "--json").exit_code == 1


def test_ledger_that_does_not_know_yet_is_asked_again(ledger: FakeLedger) -> None:
    unknown = COUNTS | {"unaccounted": None}
    ledger.answers = [(200, unknown), (200, unknown), (200, COUNTS)]
    assert ledger.run("reconcile").exit_code == 0
    assert len(ledger.asked) == 3


def test_without_envoys_count_nobody_can_tell(ledger: FakeLedger) -> None:
    difference = {"reason": "ENVOY_UNKNOWN", "requests": 0, "text": "Envoy's admin interface does not answer."}
    unknown = {"completed": None, "known": None, "unaccounted": None, "differences": [difference]}
    ledger.answers = [(200, COUNTS | unknown)]
    done = ledger.run("reconcile")
    assert done.exit_code == 1
    assert len(ledger.asked) == 1
    assert "unknown" in done.stdout
    assert "- Envoy's admin interface does not answer.\n" in done.stdout


def test_sums_are_shown_to_the_micro_dollar(ledger: FakeLedger) -> None:
    ledger.answers = [(200, {"sums": [SUM, SUM | {"model": "m", "cost_micro_usd": 1}]})]
    lines = [line.split() for line in ledger.run("show").stdout.splitlines()]
    assert lines[1] == ["acme", "gpt-4o", "1,234", "5", "6", "$9,007,199,254.740993"]
    assert lines[-1] == ["all", "2,468", "10", "12", "$9,007,199,254.740994"]
    told = json.loads(ledger.run("show", "--json").stdout)
    assert [one["cost_usd"] for one in told] == [9007199254.740993, 0.000001]


def test_sums_are_asked_for_an_organisation_and_since_a_time(ledger: FakeLedger) -> None:
    ledger.answers = [(200, {"sums": []})]
    done = ledger.run("show", "--org", "acme", "--since", "1970-01-01T00:00:07Z")
    assert done.stdout == "There is no usage record.\n"
    assert ledger.asked == [f"{SUMS_PATH}?organization=acme&since=7.000000"]
    assert ledger.run("show", "--since", "soon").exit_code == 2


def test_error_of_the_ledger_is_told_in_its_words(ledger: FakeLedger) -> None:
    ledger.answers = [(503, {"error": "The ledger cannot be read.", "code": "SERVICE_UNAVAILABLE", "trace_id": ""})]
    done = ledger.run("show")
    assert (done.exit_code, done.stderr) == (1, "Error: The ledger cannot be read. (SERVICE_UNAVAILABLE)\n")


@pytest.mark.parametrize("command", ["show", "reconcile"])
def test_without_a_ledger_one_line_says_so(tmp_path: Path, command: str) -> None:
    env = {"RUN_DIR": str(tmp_path), "ROUTER_CONFIG": None}
    done = CliRunner(env=env).invoke(router, ["usage", command])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: There is no ledger at ")
    assert done.stderr.count("\n") == 1


def test_url_needs_a_key(tmp_path: Path) -> None:
    env = {"RUN_DIR": str(tmp_path), "ROUTER_CONFIG": None, "ROUTER_API_KEY": None}
    done = CliRunner(env=env).invoke(router, ["audit", "explain", "x", "--url", "http://127.0.0.1:1"])
    assert done.exit_code == 2
    assert "ROUTER_API_KEY" in done.stderr
