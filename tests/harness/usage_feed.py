"""A ledger by itself, told of requests as Envoy tells of them: by gRPC, and in the journal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import httpx

from gateway import names
from gateway.names import ACCESS_LOG_SERVICE
from gateway.protobuf import message_classes
from gateway.settings import JOURNAL, USAGE_SOCKET
from tests.harness.process import Process, eventually, free_ports

ROOT: Final = Path(__file__).parents[2]
ORGANIZATIONS: Final = 50
TOGETHER: Final = 20
"""Entries of one message: what Envoy's threads collect in 20 ms at 1,000 requests a second."""
PRICES: Final = "a=5000,15000,2500,;b=5000,15000,,"
_message: Final = message_classes("usage", "access_log.binpb")
_Message: Final = _message("envoy.service.accesslog.v3.StreamAccessLogsMessage")


class FedLedger:
    """``python -m usage`` on its own, with a limit store or without."""

    def __init__(self, directory: Path, *, redis_addr: str, environ: dict[str, str]) -> None:
        [self.port] = free_ports(1)
        self.directory = directory
        (directory / "policies").mkdir(exist_ok=True)
        self._environ = {
            "RUN_DIR": str(directory),
            "POLICY_DIR": str(directory / "policies"),
            "USAGE_METRICS_PORT": str(self.port),
            "REDIS_ADDR": redis_addr,
            "PYTHONPATH": str(ROOT),
            **environ,
        }
        self.process = Process("usage", [sys.executable, "-m", "usage"], directory=directory, environ=self._environ)
        self._http = httpx.Client(trust_env=False, timeout=10)

    def start(self, *, cores: set[int] | None = None) -> None:
        """Start it, on some cores only, and wait until it serves."""
        self.process.start()
        if cores:
            os.sched_setaffinity(self.process.pid, cores)
        eventually((self.directory / USAGE_SOCKET).exists, "the ledger serves")

    def metric(self, name: str) -> float:
        """A metric of the ledger, all labels together."""
        text = self._http.get(f"http://127.0.0.1:{self.port}/metrics").text
        return sum(map(float, re.findall(rf"^router_usage_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))

    def delivered(self) -> int:
        """Records that were handed on."""
        text = self._http.get(f"http://127.0.0.1:{self.port}/metrics").text
        found = re.search(r'^router_usage_delivered_total{topic="usage.records.v1"} (\S+)$', text, re.MULTILINE)
        return int(float(found.group(1))) if found else 0

    def cpu_s(self) -> float:
        """Processor time it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        """Memory it has now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def stop(self) -> None:
        """End it."""
        self._http.close()
        self.process.stop()


@contextmanager
def a_ledger(
    directory: Path, *, redis_addr: str = "", cores: set[int] | None = None, **environ: str
) -> Iterator[FedLedger]:
    """A running ledger in a directory of its own."""
    ledger = FedLedger(directory, redis_addr=redis_addr, environ=environ)
    try:
        ledger.start(cores=cores)
        yield ledger
    finally:
        ledger.stop()


class Feed:
    """Tells a ledger of chat requests that have ended well."""

    def __init__(self, ledger: FedLedger, call: Any) -> None:
        self._call = call
        self._journal = (ledger.directory / JOURNAL).open("ab")
        self.told = 0

    async def tell(self, count: int) -> None:
        """Tell of so many more."""
        for start in range(0, count, TOGETHER):
            together = [_a_request(self.told + n) for n in range(min(TOGETHER, count - start))]
            self._journal.write(b"".join(map(_line, together)))
            await self._call.write(_log_message(together))
            self.told += len(together)
        self._journal.flush()

    def close(self) -> None:
        """End the journal."""
        self._journal.close()


@asynccontextmanager
async def feeding(ledger: FedLedger) -> AsyncIterator[Feed]:
    """A stream to the ledger."""
    async with grpc.aio.insecure_channel(f"unix:{ledger.directory / USAGE_SOCKET}") as channel:
        method = channel.stream_unary(f"/{ACCESS_LOG_SERVICE}/StreamAccessLogs")
        call = method()
        await call.write(_Message(identifier={"log_name": names.LISTENER_PUBLIC}).SerializeToString())
        feed = Feed(ledger, call)
        try:
            yield feed
        finally:
            feed.close()
            await call.done_writing()


async def until_delivered(ledger: FedLedger, count: int, *, within_s: float) -> None:
    """Wait until so many records were handed on."""
    end_s = time.monotonic() + within_s
    while (delivered := await asyncio.to_thread(ledger.delivered)) < count:
        assert time.monotonic() < end_s, f"{delivered} of {count} records within {within_s} s"
        await asyncio.sleep(0.05)


async def until_read(ledger: FedLedger, left_bytes: int, *, within_s: float) -> None:
    """Wait until no more than this of the journal is still to be read."""
    end_s = time.monotonic() + within_s
    while (left := await asyncio.to_thread(ledger.metric, "journal_unread_bytes")) > left_bytes:
        assert time.monotonic() < end_s, f"{left} bytes of the journal unread after {within_s} s"
        await asyncio.sleep(0.05)


def _a_request(number: int) -> dict[str, Any]:
    return {
        "listener": names.LISTENER_PUBLIC,
        "request_id": str(uuid.uuid4()),
        "started": f"{time.time():.9f}",
        "duration_ms": 900,
        "path": "/v1/chat/completions",
        "status": 200,
        "flags": "-",
        "attempts": 1,
        "body_bytes": 1200,
        "backend": "a",
        "decision": "PRIMARY",
        "cluster": names.entry_cluster("a"),
        names.METADATA_NAMESPACE: {
            names.METADATA_ORGANIZATION: f"org-{number % ORGANIZATIONS}",
            names.METADATA_KEY: f"key-{number % 500}",
            names.METADATA_MODEL: "gpt-4o",
            names.METADATA_ENDPOINT: "chat",
            names.METADATA_POLICY: "5ab1f74c9dba5f7b9370d59123f0929758ec8404911cfa84a4a4885aacabdc45",
            names.METADATA_PRICES: PRICES,
            names.METADATA_CHARGE_TO: "org:DAILY org:MONTHLY",
        },
        names.LIMITS_NAMESPACE: {
            names.METADATA_TOKENS_INPUT: "120",
            names.METADATA_TOKENS_OUTPUT: "4096",
            names.METADATA_FIGURES: "1 org 200 199 10;6 org 500000000 499985000 86400000;7 org 50000000 49 86400000",
        },
        names.USAGE_NAMESPACE: {"tokens_input": 118, "tokens_output": 240, "tokens_input_cached": 0},
    }


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(request, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _struct(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "fields": {
            key: {"string_value": value} if isinstance(value, str) else {"number_value": value}
            for key, value in fields.items()
        }
    }


def _log_message(requests: list[dict[str, Any]]) -> bytes:
    namespaces = (names.METADATA_NAMESPACE, names.LIMITS_NAMESPACE, names.USAGE_NAMESPACE)
    entries = []
    for request in requests:
        seconds, _, nanos = request["started"].partition(".")
        common = {
            "start_time": {"seconds": int(seconds), "nanos": int(nanos)},
            "duration": {"nanos": request["duration_ms"] * 1_000_000},
            "upstream_cluster": request["cluster"],
            "upstream_request_attempt_count": 1,
            "metadata": {"filter_metadata": {name: _struct(request[name]) for name in namespaces}},
        }
        headers = {names.HEADER_ROUTING_BACKEND: "a", names.HEADER_ROUTING_DECISION: "PRIMARY"}
        entries.append(
            {
                "common_properties": common,
                "request": {"request_id": request["request_id"], "path": request["path"]},
                "response": {
                    "response_code": {"value": 200},
                    "response_body_bytes": request["body_bytes"],
                    "response_headers": headers,
                },
            }
        )
    return bytes(_Message(http_logs={"log_entry": entries}).SerializeToString())
