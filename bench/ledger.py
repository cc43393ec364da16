"""The ledger by itself, on one core: 10,000 records a minute, as many as it can, and its memory as they add up.

It is told of requests as Envoy tells of them, settles them in a Valkey and hands records on to JSONL files; nothing is
left out but Envoy and the workers. The telling itself takes another core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

# Run as a script: import from this checkout, not from this directory.
sys.path[0] = str(Path(__file__).parents[1])

PER_MINUTE: Final = 10_000
STEADY_S: Final = 15
FLOOD: Final = 20_000
ROUNDS: Final = 3
AHEAD_MAX: Final = 4000
"""How far the teller may be ahead of what was handed on."""
WITHIN_S: Final = 60.0


async def _steady(ledger: Any, feed: Any) -> dict[str, float]:
    """At the target's rate: processor time, and how much waited at most."""
    from tests.harness.usage_feed import until_delivered

    per_step, began_s, cpu_s, waiting = PER_MINUTE // 60 // 5, time.monotonic(), ledger.cpu_s(), []
    for step in range(STEADY_S * 5):
        await feed.tell(per_step)
        await asyncio.sleep(max(0.0, began_s + (step + 1) / 5 - time.monotonic()))
        waiting.append(feed.told - await asyncio.to_thread(ledger.delivered))
    await until_delivered(ledger, feed.told, within_s=WITHIN_S)
    share = (ledger.cpu_s() - cpu_s) / (time.monotonic() - began_s)
    return {"steady_core_share": share, "steady_backlog_max": max(waiting)}


async def _flood(ledger: Any, feed: Any) -> float:
    """Records a second when there is always one more."""
    from tests.harness.usage_feed import until_delivered

    before, began_s = feed.told, time.monotonic()
    while feed.told < before + FLOOD:
        await feed.tell(500)
        if feed.told - before > AHEAD_MAX:
            await until_delivered(ledger, feed.told - AHEAD_MAX, within_s=WITHIN_S)
    await until_delivered(ledger, feed.told, within_s=WITHIN_S)
    return FLOOD / (time.monotonic() - began_s)


async def measure() -> dict[str, float]:
    """The figures."""
    from bench.limits import running_valkey
    from tests.harness.usage_feed import a_ledger, feeding

    cores = sorted(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as name,
        running_valkey() as redis_addr,
        a_ledger(Path(name), redis_addr=redis_addr, cores={cores[0]}) as ledger,
    ):
        async with feeding(ledger) as feed:
            found = await _steady(ledger, feed)
            rss_mb = ledger.rss_mb()
            rates = [await _flood(ledger, feed) for _ in range(ROUNDS)]
            return {
                **found,
                "flood_per_s": statistics.median(rates),
                "rss_mb_first": rss_mb,
                "rss_mb_last": ledger.rss_mb(),
                "records": feed.told,
            }


def main() -> None:
    """Print the figures, as JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    found = asyncio.run(measure())
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{PER_MINUTE:,} records a minute take {found['steady_core_share']:.0%} of a core, "
        f"{found['steady_backlog_max']:.0f} wait at most; "
        f"{found['flood_per_s']:,.0f} a second at most; "
        f"{found['rss_mb_first']:.0f} MB, after {found['records']:,.0f} records {found['rss_mb_last']:.0f} MB."
    )


if __name__ == "__main__":
    main()
