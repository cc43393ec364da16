"""What Linux tells about processes: their children, memory and processor time (proc(5))."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """``rss_mb`` counts shared pages in full, ``pss_mb`` by the process's share of them. 1 MB is 10^6 bytes."""

    rss_mb: float
    pss_mb: float


def memory(pid: int) -> Memory:
    """Memory that a process has resident now."""
    kib = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        kib[name] = int(amount)
    return Memory(rss_mb=kib["Rss:"] * 1024 / 1e6, pss_mb=kib["Pss:"] * 1024 / 1e6)


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time that processes have used so far, in user and kernel mode, all threads."""
    total = 0
    for pid in pids:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(after_name[11]) + int(after_name[12])
    return total / _TICKS_PER_S


def busy_s() -> float:
    """Processor time that the whole machine has spent since its start, what its host took from it included."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def ended_children_s() -> float:
    """Processor time of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return sorted(found)


def arguments(pid: int) -> list[str]:
    """Command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
