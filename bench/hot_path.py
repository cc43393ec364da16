"""Microseconds of processor time that the router's own Python takes for one request, without gRPC, Envoy and sockets.

Decode, decide and encode for the headers, then for the body, exactly as ``extproc.server`` calls them; the limit store
is a Valkey on a unix socket, whose own time does not count. Free of the machine's other noise, it shows a slower hot
path that requests per second would hide.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

# Run as a script: import from this checkout, not from this directory.
sys.path[0] = str(Path(__file__).parents[1])

STEPS: Final = (
    "headers: decode",
    "headers: decide",
    "headers: encode",
    "body: decode",
    "body: decide",
    "body: encode",
)
REQUESTS: Final = 2000
ROUNDS: Final = 9


def request_id() -> str:
    """A new one, as Envoy makes them."""
    return str(uuid.uuid4())


def _headers(key: str, length: int, request: str) -> list[tuple[str, str]]:
    """What Envoy sends of a client's chat completion."""
    return [
        (":authority", "api.example.com"),
        (":path", "/v1/chat/completions"),
        (":method", "POST"),
        (":scheme", "http"),
        ("content-type", "application/json"),
        ("authorization", f"Bearer {key}"),
        ("accept", "application/json"),
        ("content-length", str(length)),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-envoy-internal", "true"),
        ("x-request-id", request),
    ]


def messages(key: str, body: str, request: str) -> tuple[bytes, bytes]:
    """The two ProcessingRequests of one exchange."""
    from extproc.wire import message

    message_of = message("envoy.service.ext_proc.v3.ProcessingRequest")
    headers = [{"key": name, "raw_value": value.encode()} for name, value in _headers(key, len(body), request)]
    said = message_of(request_headers={"headers": {"headers": headers}}, metadata_context={})
    whole = message_of(request_body={"body": body.encode(), "end_of_stream": True}, metadata_context={})
    return said.SerializeToString(), whole.SerializeToString()


async def _round(decide: Callable[[], Any], key: str, body: str) -> list[float]:
    """Microseconds a request for every step, the mean over one round. Each request has an id of its own, as Envoy's."""
    from extproc.wire import decode, encode

    clock, spent = time.thread_time_ns, [0] * len(STEPS)
    for sent in [messages(key, body, request_id()) for _ in range(REQUESTS)]:
        decision, at = decide(), 0
        for data in sent:
            t0 = clock()
            event = decode(data)
            t1 = clock()
            command = await decision.on_event(event)
            t2 = clock()
            encode(command, event)
            t3 = clock()
            spent[at] += t1 - t0
            spent[at + 1] += t2 - t1
            spent[at + 2] += t3 - t2
            at += 3
    return [ns / REQUESTS / 1000 for ns in spent]


async def _measure(directory: Path) -> dict[str, float]:
    from bench.contestants import write_policy
    from bench.keys import write_key
    from bench.limits import running_valkey
    from bench.load import BODY, MODEL
    from extproc.exchange import Forward
    from extproc.pipeline import Decision
    from extproc.policy import FollowedPolicy
    from extproc.wire import decode
    from extproc.worker import open_deciders
    from gateway.settings import ExtprocSettings
    from gateway.telemetry import get_logger

    key = write_key(directory / "keys.yaml")
    write_policy(directory / "policies", (8001, 8002), MODEL)
    log = get_logger()
    with running_valkey() as address:
        settings = ExtprocSettings(
            environment="production",
            run_dir=directory,
            policy_dir=directory / "policies",
            key_file=directory / "keys.yaml",
            redis_addr=address,
        )
        policy = FollowedPolicy(settings, log=log)
        async with open_deciders(settings, policy, log=log) as deciders:
            decision = Decision(deciders, None)
            for data in messages(key, BODY, request_id()):
                command = await decision.on_event(decode(data))
            if not isinstance(command, Forward):
                sys.exit(f"the request is not forwarded: {command}")
            rounds = [await _round(lambda: Decision(deciders, None), key, BODY) for _ in range(ROUNDS + 1)][1:]
    steps = {name: statistics.median(each) for name, each in zip(STEPS, zip(*rounds, strict=True), strict=True)}
    totals = sorted(map(sum, rounds))
    return {**steps, "total": statistics.median(totals), "best": totals[0], "worst": totals[-1]}


def main() -> None:
    """Print the figures as JSON, or one a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    as_json = parser.parse_args().json
    import uvloop

    from gateway.telemetry import configure_logging

    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp") as name:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = name  # counters in files, as the workers have them
        configure_logging(program="bench", level="warning")
        measured = uvloop.run(_measure(Path(name)))
    if as_json:
        print(json.dumps(measured))
        return
    for step, us in measured.items():
        print(f"{step:16} {us:7.1f} µs")


if __name__ == "__main__":
    main()
