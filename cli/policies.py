"""``router policies``: check a policy directory, or show what it makes of each model. Offline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from policies.candidates import Candidate, Entry, candidates_among
from policies.load import Loaded, PolicyRejected, load_directory
from policies.model import OrganizationOverride, Policy, Problem, WeightedBackend

_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
_ENDPOINTS = click.option(
    "--backend-endpoints",
    envvar="BACKEND_ENDPOINTS",
    default="",
    metavar="ID:URI,…",
    help="Add backends or override their URIs.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def policies() -> None:
    """Check and show routing policies without a running router."""


@policies.command()
@_DIRECTORY
@_ENDPOINTS
@_JSON
def check(directory: Path, backend_endpoints: str, as_json: bool) -> None:
    """Check the policy files of DIR. Exit code 1 when there is a problem."""
    loaded, problems = _load(directory, backend_endpoints)
    warnings = loaded.warnings if loaded else ()
    if as_json:
        found = {
            "ok": loaded is not None,
            "digest": loaded.policy.digest if loaded else None,
            "backends": len(loaded.policy.backends) if loaded else None,
            "models": _model_count(loaded.policy) if loaded else None,
            "problems": [_as_json(problem) for problem in problems],
            "warnings": [_as_json(warning) for warning in warnings],
        }
        click.echo(json.dumps(found, indent=2))
    else:
        _print_problems(problems, "", "red")
        _print_problems(warnings, "warning: ", "yellow")
        _print(Text(_summary(loaded), "green") if loaded else Text(_counted(len(problems), "problem"), "red"))
    if problems:
        raise SystemExit(1)


@policies.command()
@_DIRECTORY
@_ENDPOINTS
@_JSON
def show(directory: Path, backend_endpoints: str, as_json: bool) -> None:
    """Show the backends of each model of DIR, with their share and state."""
    loaded, problems = _load(directory, backend_endpoints)
    if loaded is None:
        _print_problems(problems, "", "red")
        raise SystemExit(1)
    entries: tuple[Entry, ...] = (*loaded.policy.models, *loaded.policy.organization_overrides)
    if as_json:
        shown = {"digest": loaded.policy.digest, "entries": [_entry_as_json(loaded.policy, e) for e in entries]}
        click.echo(json.dumps(shown, indent=2))
        return
    console = Console()
    for entry in entries:
        console.print(_table(loaded.policy, entry))


def _load(directory: Path, backend_endpoints: str) -> tuple[Loaded | None, tuple[Problem, ...]]:
    try:
        return load_directory(directory, backend_endpoints), ()
    except PolicyRejected as rejected:
        return None, rejected.problems


def _print_problems(problems: tuple[Problem, ...], kind: str, style: str) -> None:
    for problem in problems:
        _print(Text.assemble((str(problem.place), "bold"), ": ", (kind, style), problem.text))


def _print(text: Text) -> None:
    # Neither wrapped nor styled by content: a place must stay one word for editors and grep.
    Console(highlight=False).print(text, soft_wrap=True)


def _summary(loaded: Loaded) -> str:
    parts = (
        _counted(len(loaded.policy.backends), "backend"),
        _counted(_model_count(loaded.policy), "model"),
        _counted(len(loaded.warnings), "warning"),
    )
    return f"ok: {', '.join(parts)} (digest {loaded.policy.digest[:12]})"


def _model_count(policy: Policy) -> int:
    return len({entry.model for entry in policy.models})


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _as_json(problem: Problem) -> dict[str, Any]:
    return {**asdict(problem.place), "text": problem.text}


def _rows(policy: Policy, entry: Entry) -> list[dict[str, Any]]:
    """Backends of an entry; ``percent`` is the share of a key that no list narrows, while none is ejected."""
    left = candidates_among(policy, entry, None)
    normal = [candidate for candidate in left if candidate.standing == "normal"] or list(left)
    weight_sum = sum(candidate.weight for candidate in normal)
    by_id = {candidate.backend_id: candidate for candidate in left}

    def row(weighted: WeightedBackend) -> dict[str, Any]:
        candidate = by_id.get(weighted.backend_id)
        carries = candidate in normal and weight_sum > 0
        return {
            "backend_id": weighted.backend_id,
            "weight": weighted.weight,
            "percent": round(100 * weighted.weight / weight_sum, 1) if carries else 0.0,
            "state": _state(candidate),
            "allow_list": sorted(weighted.allow_list),
            "deny_list": sorted(weighted.deny_list),
        }

    return [row(weighted) for weighted in entry.backends]


def _state(candidate: Candidate | None) -> str:
    if candidate is None:
        return "killed"
    if candidate.standing == "degraded":
        return "degraded"
    return "active" if candidate.weight else "fallback"


def _entry_as_json(policy: Policy, entry: Entry) -> dict[str, Any]:
    override = isinstance(entry, OrganizationOverride)
    return {
        "model": entry.model,
        "organization_id": entry.organization_id,
        "override": override,
        "reason": entry.reason if isinstance(entry, OrganizationOverride) else None,
        "place": str(entry.place),
        "backends": _rows(policy, entry),
    }


def _table(policy: Policy, entry: Entry) -> Table:
    title = Text(f"{entry.model}  organisation {entry.organization_id}", style="bold")
    if isinstance(entry, OrganizationOverride):
        title.append(f"  override{': ' + entry.reason if entry.reason else ''}", style="yellow")
    table = Table(title=title, title_justify="left", caption=Text(str(entry.place)), caption_justify="left")
    table.add_column("backend", overflow="fold")
    table.add_column("weight", justify="right")
    table.add_column("share", justify="right")
    table.add_column("state")
    table.add_column("keys", overflow="fold")
    for row in _rows(policy, entry):
        lists = ("allow", row["allow_list"]), ("deny", row["deny_list"])
        keys = "; ".join(f"{word} {', '.join(ids)}" for word, ids in lists if ids)
        table.add_row(
            Text(row["backend_id"]), str(row["weight"]), f"{row['percent']} %", row["state"], Text(keys or "every")
        )
    return table
