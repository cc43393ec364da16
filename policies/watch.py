"""Changes of a policy directory, and of files that its policy names, as an asynchronous iterator.

Polling sees what notification misses: a ConfigMap's ``..data`` link swapped, an editor's rename, a
network mount. Every look at the disk is made in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from policies.model import PolicyRejected, Problem
from policies.source import Bundle, Signature, list_files, read_bundle, signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The directory as it is now: its bundle, or why it cannot be read. ``extra_files`` tells whether those changed."""

    bundle: Bundle | None
    problems: tuple[Problem, ...] = ()
    extra_files: bool = False

    def usable(self) -> Bundle:
        """The bundle.

        Raises:
            PolicyRejected: the directory cannot be read.
        """
        if self.bundle is None:
            raise PolicyRejected(self.problems)
        return self.bundle


def no_files() -> Iterable[Path]:
    """No extra files to watch."""
    return ()


async def watch(
    directory: Path,
    *,
    interval_s: float = 0.2,
    extra_files: Callable[[], Iterable[Path]] = no_files,
    loaded: Bundle | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Change]:
    """Yield once for each change, when two polls in a row saw the same files.

    Args:
        directory: where policies are; it may vanish and come back.
        interval_s: between polls. A change is yielded at most three polls after the last write.
        extra_files: called at each poll, in a thread, for files whose change counts too.
        loaded: the bundle already in use; where the directory differs from it at the start, that is
            a change as well. None: what is there at the first poll is in use.
        sleep: waits between polls.
    """
    look = await asyncio.to_thread(_look, directory, extra_files)
    if loaded is None:
        reported = look
        digest = _digest(await asyncio.to_thread(_read, directory))
    else:
        reported = replace(look, directory=None)
        digest = loaded.digest
    while True:
        await sleep(interval_s)
        before, look = look, await asyncio.to_thread(_look, directory, extra_files)
        if look != before or look == reported:
            continue
        change = await asyncio.to_thread(_read, directory)
        extra_changed = look.extra_files != reported.extra_files
        told, digest, reported = digest, _digest(change), look
        if extra_changed or digest is None or digest != told:
            yield replace(change, extra_files=extra_changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What one poll saw; ``directory`` is None where it is absent."""

    directory: Signature | None
    extra_files: Signature


def _look(directory: Path, extra_files: Callable[[], Iterable[Path]]) -> _Look:
    try:
        found: Signature | None = signature(list_files(directory))
    except OSError:
        found = None
    return _Look(directory=found, extra_files=signature(extra_files()))


def _read(directory: Path) -> Change:
    try:
        return Change(bundle=read_bundle(directory))
    except PolicyRejected as rejected:
        return Change(bundle=None, problems=rejected.problems)


def _digest(change: Change) -> str | None:
    return None if change.bundle is None else change.bundle.digest
