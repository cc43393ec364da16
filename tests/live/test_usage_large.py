"""A million records: the memory of the ledger does not grow with them, and what was kept long enough goes."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from bench.limits import running_valkey
from tests.harness.process import eventually
from tests.harness.usage_feed import FedLedger, a_ledger, feeding, until_delivered, until_read

pytestmark = [pytest.mark.live, pytest.mark.timeout(3600)]

RECORDS = 1_000_000
STEP = 50_000
AHEAD_MAX = 4000
UNREAD_MAX_BYTES = 2 * 1024 * 1024
"""What waits takes room, to a bound; what is to be seen here is whether something stays that does not wait."""
SETTLED_AT = 200_000
"""By then everything that grows to a bound has grown to it."""
DAY_S = 86_400
KEPT_S = 60


def kept(ledger: FedLedger) -> int:
    """Requests in the spool."""
    with sqlite3.connect(f"file:{ledger.directory / 'usage.db'}?mode=ro", uri=True) as db:
        [(count,)] = db.execute("SELECT count(*) FROM requests")
    return int(count)


async def tell(ledger: FedLedger) -> list[float]:
    """Tell of every request; memory in MB after each step."""
    memory_mb = []
    async with feeding(ledger) as feed:
        while feed.told < RECORDS:
            for _ in range(STEP // 500):
                await feed.tell(500)
                if feed.told > AHEAD_MAX:
                    await until_delivered(ledger, feed.told - AHEAD_MAX, within_s=120)
                    await until_read(ledger, UNREAD_MAX_BYTES, within_s=120)
            memory_mb.append(ledger.rss_mb())
            print(f"{feed.told:,} records: {memory_mb[-1]:.0f} MB, {ledger.cpu_s():.0f} s of a core")
        await until_delivered(ledger, RECORDS, within_s=120)
    return memory_mb


def test_memory_is_flat_over_a_million_records(tmp_path: Path) -> None:
    retention = {"USAGE_RETENTION_DAYS": str(KEPT_S / DAY_S)}
    with running_valkey() as redis_addr, a_ledger(tmp_path, redis_addr=redis_addr, **retention) as ledger:
        memory_mb = asyncio.run(tell(ledger))
        assert memory_mb[-1] < 1.1 * memory_mb[SETTLED_AT // STEP - 1]
        eventually(lambda: kept(ledger) == 0, "what was handed on is pruned", within_s=4 * KEPT_S, every_s=1)
        assert ledger.metric("malformed_total") == 0
