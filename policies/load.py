"""A directory of policy files to a policy that can be put in force, or every reason why not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from policies.check import check, warn
from policies.compose import compose
from policies.model import Backend, Place, Policy, PolicyRejected, Problem
from policies.nodes import Node, line_of
from policies.parse import parse, parse_endpoints
from policies.source import Bundle, load_last_good, read_bundle, save_last_good

__all__ = [
    "Bundle",
    "Loaded",
    "PolicyRejected",
    "Start",
    "load",
    "load_directory",
    "load_last_good",
    "load_or_last_good",
    "read_bundle",
    "save_last_good",
]

BACKEND_ENDPOINTS: Final = "BACKEND_ENDPOINTS"

_STEP = re.compile(r"[.\[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checked policy, what it was read from, and what is allowed but hardly meant."""

    policy: Policy
    bundle: Bundle
    warnings: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The policy to start with; ``problems`` say why the directory's own is not it, so the last good one is."""

    loaded: Loaded
    problems: tuple[Problem, ...] = ()


def load_directory(directory: Path, backend_endpoints: str = "") -> Loaded:
    """Read, parse and check a directory. Blocks on files: call it off the event loop.

    Raises:
        PolicyRejected: every problem found.
    """
    return load(read_bundle(directory), backend_endpoints)


def load(bundle: Bundle, backend_endpoints: str = "") -> Loaded:
    """Parse and check a bundle; ``backend_endpoints`` (``id1:uri1,id2:uri2``) adds backends or overrides URIs.

    Raises:
        PolicyRejected: every problem found.
    """
    composed = {f"{bundle.directory}/{name}": text for name, text in bundle.files}
    files = {file: compose(text, file=file) for file, text in composed.items()}
    broken = tuple(found for found in files.values() if isinstance(found, Problem))
    roots = {file: found for file, found in files.items() if not isinstance(found, Problem)}
    parsed = parse(roots.values(), digest=bundle.digest)
    endpoints, endpoint_problems = parse_endpoints(backend_endpoints, file=BACKEND_ENDPOINTS)
    policy = replace(parsed.policy, backends=_with_endpoints(parsed.policy.backends, endpoints))
    problems = broken + parsed.problems + endpoint_problems
    if not broken and all(_STEP.search(problem.place.path) for problem in parsed.problems):
        # With a file or a section missing, every reference into it would look broken.
        found = check(policy, root=Place(file=bundle.directory, line=1))
        spoiled = _spoiled(problems)
        problems += tuple(_sharpened(p, roots) for p in found if (p.place.file, p.place.path) not in spoiled)
    if problems:
        raise PolicyRejected(tuple(sorted(problems, key=lambda problem: (problem.place.file, problem.place.line))))
    warnings = tuple(_sharpened(problem, roots) for problem in warn(policy))
    return Loaded(policy=policy, bundle=bundle, warnings=warnings)


def load_or_last_good(directory: Path, backend_endpoints: str, last_good_path: Path) -> Start:
    """Load a directory or, where it is rejected, the last good bundle. Blocks on files.

    Raises:
        PolicyRejected: the directory's problems, when there is no last good bundle or it is rejected too.
    """
    try:
        return Start(loaded=load_directory(directory, backend_endpoints))
    except PolicyRejected as rejected:
        bundle = load_last_good(last_good_path)
        if bundle is None:
            raise
        try:
            return Start(loaded=load(bundle, backend_endpoints), problems=rejected.problems)
        except PolicyRejected:
            raise rejected from None


def _with_endpoints(backends: tuple[Backend, ...], endpoints: tuple[Backend, ...]) -> tuple[Backend, ...]:
    by_id = {endpoint.id: endpoint for endpoint in endpoints}
    known = {backend.id for backend in backends}
    overridden = tuple(
        replace(backend, uri=by_id[backend.id].uri) if backend.id in by_id else backend for backend in backends
    )
    return overridden + tuple(endpoint for endpoint in endpoints if endpoint.id not in known)


def _spoiled(problems: tuple[Problem, ...]) -> set[tuple[str, str]]:
    """File and path of what could not be read and of all that it is part of: rules stumble there."""
    return {
        (problem.place.file, problem.place.path[:end])
        for problem in problems
        for end in (*(step.start() for step in _STEP.finditer(problem.place.path)), len(problem.place.path))
    }


def _sharpened(problem: Problem, roots: dict[str, Node]) -> Problem:
    """The problem with the line of its path, where the rule only knew the line of the item around it."""
    root = roots.get(problem.place.file)
    line = line_of(root, problem.place.path) if root is not None else None
    return problem if line is None else replace(problem, place=replace(problem.place, line=line))
