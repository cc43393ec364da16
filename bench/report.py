"""From samples to figures: medians over rounds, ratios within a round, targets, the table and the JSON document."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.load import Sample
from bench.machine import Memory

ONE: Final = 1
MANY: Final = 16
RPS_SHARE_MIN: Final = 0.75
LIMITED_RPS_SHARE_MIN: Final = 0.60
ADMIT_P99_MAX_MS: Final = 5.0
GROWTH_MAX: Final = 2.0
"""Of the scripts' time with 100,000 organisations or open requests, to that with ten: memory that is further away."""
ADDED_P50_MAX_MS: Final = 1.0
WORKER_MAX_MB: Final = 120.0
QUIET_MAX_CORES: Final = 0.1

MemoryOf = Mapping[str, Mapping[str, Memory]]
"""Memory by contestant's letter and process name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of several rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def text(self, form: str, *, between: str = " ") -> str:
        """``median (low…high)``, each in the given format."""
        return f"{self.median:{form}}{between}[dim]({self.low:{form}}…{self.high:{form}})[/dim]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A promise and what was measured of it."""

    name: str
    wanted: str
    measured: Spread
    form: str
    met: bool


def spread(samples: Sequence[Sample], letter: str, connections: int, figure: str) -> Spread:
    """One figure of one contestant over all rounds."""
    return Spread.of([getattr(s, figure) for s in samples if s.contestant == letter and s.connections == connections])


def _paired(
    samples: Sequence[Sample],
    connections: int,
    pair: tuple[str, str],
    figure: str,
    combine: Callable[[float, float], float],
) -> Spread:
    """A contestant's figure combined with another's of the same round, so that slow drift cancels out."""
    ours, theirs = pair
    by_round: dict[int, dict[str, float]] = {}
    for sample in samples:
        if sample.connections == connections:
            by_round.setdefault(sample.round, {})[sample.contestant] = getattr(sample, figure)
    return Spread.of([combine(of[ours], of[theirs]) for of in by_round.values()])


def _limit_targets(limits: Mapping[str, float]) -> list[Target]:
    """The promises about the limit store; one run, so without a spread."""
    p99 = limits["admit_p99_ms"]
    growth = max(limits["scripts_us_many_organizations"], limits["scripts_us_many_open_entries"]) / limits["scripts_us"]
    return [
        Target(
            name="p99 of an admission at 1,000 requests/s, ms",
            wanted=f"≤ {ADMIT_P99_MAX_MS:.0f}",
            measured=Spread(median=p99, low=p99, high=p99),
            form=".2f",
            met=p99 <= ADMIT_P99_MAX_MS,
        ),
        Target(
            name="limit scripts' time at 100,000 organisations or open requests, to 10",
            wanted=f"≤ {GROWTH_MAX:.0f}",
            measured=Spread(median=growth, low=growth, high=growth),
            form=".2f",
            met=growth <= GROWTH_MAX,
        ),
    ]


def targets(samples: Sequence[Sample], memory: MemoryOf, limits: Mapping[str, float]) -> list[Target]:
    """The promises."""
    share, limited = (
        _paired(samples, MANY, (ours, "B"), "requests_per_s", lambda ours, theirs: ours / theirs) for ours in "CD"
    )
    added = _paired(samples, ONE, ("C", "A"), "p50_ms", lambda ours, theirs: ours - theirs)
    workers = Spread.of([m.rss_mb for name, m in memory["D"].items() if name.startswith("worker ")])
    return [
        Target(
            name=f"requests/s at {MANY} connections, share of the do-nothing ext_proc's",
            wanted=f"≥ {RPS_SHARE_MIN:.0%}",
            measured=share,
            form=".1%",
            met=share.median >= RPS_SHARE_MIN,
        ),
        Target(
            name="the same with every limit on",
            wanted=f"≥ {LIMITED_RPS_SHARE_MIN:.0%}",
            measured=limited,
            form=".1%",
            met=limited.median >= LIMITED_RPS_SHARE_MIN,
        ),
        Target(
            name="p50 at 1 connection, added to Envoy direct, ms",
            wanted=f"≤ {ADDED_P50_MAX_MS:.1f}",
            measured=added,
            form=".2f",
            met=added.median <= ADDED_P50_MAX_MS,
        ),
        Target(
            name="resident memory of a worker, MB",
            wanted=f"≤ {WORKER_MAX_MB:.0f}",
            measured=workers,
            form=".0f",
            met=workers.high <= WORKER_MAX_MB,
        ),
        *_limit_targets(limits),
    ]


_COLUMNS: Final = (
    (f"requests/s at {MANY}", MANY, "requests_per_s", ",.0f"),
    ("p50 ms at 1", ONE, "p50_ms", ".2f"),
    ("p99 ms at 1", ONE, "p99_ms", ".2f"),
    (f"p50 ms at {MANY}", MANY, "p50_ms", ".2f"),
    (f"p99 ms at {MANY}", MANY, "p99_ms", ".1f"),
    ("Envoy CPU µs", MANY, "envoy_cpu_us", ".0f"),
    ("workers CPU µs", MANY, "workers_cpu_us", ".0f"),
)


def _speed_table(samples: Sequence[Sample], contestants: Mapping[str, str]) -> Table:
    table = Table(
        title="Speed: median (lowest…highest round); processor time is per request",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("")
    for heading, *_ in _COLUMNS:
        table.add_column(heading, justify="right")
    for letter, name in contestants.items():
        cells = [spread(samples, letter, at, figure).text(form, between="\n") for _, at, figure, form in _COLUMNS]
        table.add_row(f"{letter}  {name}", *cells)
    return table


def _memory_table(memory: MemoryOf) -> Table:
    table = Table(title="Memory after the load, MB", title_justify="left", header_style="bold")
    table.add_column("")
    table.add_column("process")
    table.add_column("RSS", justify="right")
    table.add_column("PSS", justify="right")
    for letter, processes in memory.items():
        for process, used in processes.items():
            table.add_row(letter, process, f"{used.rss_mb:.0f}", f"{used.pss_mb:.0f}")
    return table


def _target_table(found: Sequence[Target]) -> Table:
    table = Table(title="Targets", title_justify="left", header_style="bold")
    for heading in ("", "target", "measured", ""):
        table.add_column(heading)
    for target in found:
        verdict = "[green]met[/green]" if target.met else "[red]missed[/red]"
        table.add_row(target.name, target.wanted, target.measured.text(target.form), verdict)
    return table


def _limits_line(limits: Mapping[str, float]) -> str:
    return (
        f"Admission at 1,000 requests/s: p50 {limits['admit_p50_ms']:.2f} ms, p99 {limits['admit_p99_ms']:.2f} ms; "
        f"both scripts of a request {limits['scripts_us']:.0f} µs, "
        f"with 100,000 organisations {limits['scripts_us_many_organizations']:.0f}, "
        f"with 100,000 open requests {limits['scripts_us_many_open_entries']:.0f}"
    )


def show(
    console: Console,
    samples: Sequence[Sample],
    memory: MemoryOf,
    *,
    hot_path: Mapping[str, float],
    limits: Mapping[str, float],
    contestants: Mapping[str, str],
) -> None:
    """Print everything that was measured."""
    steps = ", ".join(f"{step} {us:.1f}" for step, us in hot_path.items() if ":" in step)
    other = Spread.of([sample.other_cores for sample in samples])
    answered, unwell = sum(s.requests for s in samples), sum(s.not_2xx + s.socket_errors + s.timeouts for s in samples)
    console.print(_speed_table(samples, contestants), _memory_table(memory), sep="\n")
    console.print(
        f"The router's own Python, a request: {hot_path['total']:.0f} µs "
        f"[dim]({hot_path['best']:.0f}…{hot_path['worst']:.0f})[/dim]: {steps}",
        _limits_line(limits),
        f"{answered:,} requests measured; not 2xx, socket errors or timeouts: {unwell}",
        f"Programs that take no part used {other.text('.2f')} cores meanwhile"
        + (": [red]too much for these figures to be trusted[/red]" if other.median > QUIET_MAX_CORES else ""),
        sep="\n",
        highlight=False,
    )
    console.print(_target_table(targets(samples, memory, limits)))


def document(
    samples: Sequence[Sample],
    memory: MemoryOf,
    hot_path: Mapping[str, float],
    limits: Mapping[str, float],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, with every round's own figures."""
    return {
        **about,
        "targets": [asdict(target) for target in targets(samples, memory, limits)],
        "rounds": [asdict(sample) for sample in samples],
        "memory": {letter: {name: asdict(used) for name, used in of.items()} for letter, of in memory.items()},
        "hot_path_us": dict(hot_path),
        "limits": dict(limits),
    }
