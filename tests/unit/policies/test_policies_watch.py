"""Watching real directories: a change is told once, soon, and only when it is whole."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from policy_builders import MINIMAL, a_bundle, write

from policies.load import read_bundle
from policies.source import Bundle
from policies.watch import Change, no_files, watch

OTHER = MINIMAL.replace("http://a", "http://other")
POLL_S = 0.01


class Polls:
    """Stands in for the wait between polls: runs what a test has planned before each poll."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)
        self.count = 0

    async def __call__(self, _: float) -> None:
        await asyncio.sleep(0)
        if self._steps:
            self._steps.pop(0)()
        self.count += 1


def nothing() -> None:
    """A poll at which nothing happens."""


@asynccontextmanager
async def watching(
    directory: Path, extra_files: Callable[[], Iterable[Path]] = no_files, loaded: Bundle | None = None
) -> AsyncIterator[Callable[[], asyncio.Task[Change]]]:
    """A watcher that has taken its first look; the value starts waiting for the next change."""
    started = asyncio.Event()

    async def wait(seconds: float) -> None:
        started.set()
        await asyncio.sleep(seconds)

    async with aclosing(
        watch(directory, interval_s=POLL_S, extra_files=extra_files, loaded=loaded, sleep=wait)
    ) as changes:

        async def following() -> Change:
            return await asyncio.wait_for(anext(changes), 10)

        first = asyncio.create_task(following())
        await asyncio.wait_for(started.wait(), 10)
        pending = [first]
        yield lambda: pending.pop() if pending else asyncio.create_task(following())
        for task in pending:
            task.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_written_file_is_a_change(tmp_path: Path) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    async with watching(tmp_path) as following:
        write(tmp_path, {"a.yaml": OTHER})
        change = await following()
        assert change == Change(bundle=read_bundle(tmp_path))
        (tmp_path / "b.yml").write_text("models:\n")
        change = await following()
        assert change.bundle is not None
        assert [name for name, _ in change.bundle.files] == ["a.yaml", "b.yml"]
        (tmp_path / "b.yml").unlink()
        assert (await following()).bundle == read_bundle(tmp_path)


async def test_change_is_told_within_a_second_at_the_default_interval(tmp_path: Path) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    polled = asyncio.Event()

    async def wait(seconds: float) -> None:
        polled.set()
        await asyncio.sleep(seconds)

    async with aclosing(watch(tmp_path, sleep=wait)) as changes:
        change = asyncio.ensure_future(anext(changes))
        await polled.wait()
        write(tmp_path, {"a.yaml": OTHER})
        written = time.monotonic()
        await change
        assert time.monotonic() - written < 1


async def test_editors_rename_over_the_file_is_a_change(tmp_path: Path) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    kept = os.stat(tmp_path / "a.yaml")
    async with watching(tmp_path) as following:
        (tmp_path / ".a.yaml.swp").write_text(MINIMAL.replace("http://a", "http://b"))
        os.utime(tmp_path / ".a.yaml.swp", ns=(kept.st_atime_ns, kept.st_mtime_ns))
        os.replace(tmp_path / ".a.yaml.swp", tmp_path / "a.yaml")
        change = await following()
        assert change.bundle is not None
        assert "http://b" in change.bundle.files[0][1]


async def test_configmap_swap_is_a_change(tmp_path: Path) -> None:
    write(tmp_path / "..2024_01", {"a.yaml": MINIMAL})
    (tmp_path / "..data").symlink_to("..2024_01")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    async with watching(tmp_path) as following:
        write(tmp_path / "..2024_02", {"a.yaml": OTHER})
        (tmp_path / "..data_tmp").symlink_to("..2024_02")
        os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
        change = await following()
        assert change.bundle is not None
        assert change.bundle.files == (("a.yaml", OTHER),)


async def test_directory_may_vanish_and_come_back(tmp_path: Path) -> None:
    directory = write(tmp_path / "policies", {"a.yaml": MINIMAL})
    async with watching(directory) as following:
        directory.rename(tmp_path / "away")
        change = await following()
        assert change.bundle is None
        assert [problem.text for problem in change.problems] == ["cannot be read: No such file or directory"]
        write(tmp_path / "new", {"a.yaml": OTHER}).rename(directory)
        assert (await following()).bundle == read_bundle(directory)


async def test_directory_that_is_a_link_may_be_pointed_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a.yaml": MINIMAL})
    write(tmp_path / "two", {"a.yaml": OTHER})
    (tmp_path / "policies").symlink_to("one")
    async with watching(tmp_path / "policies") as following:
        (tmp_path / "next").symlink_to("two")
        os.replace(tmp_path / "next", tmp_path / "policies")
        change = await following()
        assert change.bundle is not None
        assert change.bundle.files[0][1] == OTHER


async def test_change_of_an_extra_file_is_told(tmp_path: Path) -> None:
    directory = write(tmp_path / "policies", {"a.yaml": MINIMAL})
    credential = tmp_path / "credential"
    async with watching(directory, extra_files=lambda: [credential]) as following:
        credential.write_text("sk-1")
        assert await following() == Change(bundle=read_bundle(directory), extra_files=True)
        write(directory, {"a.yaml": OTHER})
        assert await following() == Change(bundle=read_bundle(directory), extra_files=False)


async def test_directory_that_differs_from_the_loaded_bundle_is_a_change(tmp_path: Path) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    async with watching(tmp_path, loaded=a_bundle("older")) as following:
        assert (await following()).bundle == read_bundle(tmp_path)


async def test_unreadable_file_is_a_change_with_problems(tmp_path: Path) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    async with watching(tmp_path) as following:
        (tmp_path / "a.yaml").write_bytes(b"\xff")
        change = await following()
        assert change.bundle is None
        assert [problem.text for problem in change.problems] == ["is not UTF-8: byte 0xff"]


async def test_change_is_told_once_two_polls_agree(tmp_path: Path) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    drafts = [OTHER + "#" * i for i in range(1, 6)]
    steps = [lambda text=text: write(tmp_path, {"a.yaml": text}) for text in drafts]
    polls = Polls(*steps)
    async with aclosing(watch(tmp_path, sleep=polls)) as changes:
        change = await anext(changes)
    assert change.bundle is not None
    assert change.bundle.files[0][1] == drafts[-1]
    assert polls.count == len(drafts) + 1


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "first-look"])
async def test_same_content_written_again_is_no_change(tmp_path: Path, loaded: bool) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    bundle = read_bundle(tmp_path) if loaded else None
    again = [lambda i=i: os.utime(tmp_path / "a.yaml", (i, i)) for i in range(1, 4)]
    polls = Polls(
        *(step for touch in again for step in (touch, nothing, nothing)), lambda: write(tmp_path, {"a.yaml": OTHER})
    )
    async with aclosing(watch(tmp_path, loaded=bundle, sleep=polls)) as changes:
        change = await anext(changes)
    assert change.bundle is not None
    assert change.bundle.files[0][1] == OTHER


async def test_files_are_read_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.yaml": MINIMAL})
    threads: list[Callable[..., object]] = []
    to_thread = asyncio.to_thread

    async def recorded(function: Callable[..., object], *args: object) -> object:
        threads.append(function)
        return await to_thread(function, *args)

    monkeypatch.setattr(asyncio, "to_thread", recorded)
    async with aclosing(watch(tmp_path, sleep=Polls(lambda: write(tmp_path, {"a.yaml": OTHER})))) as changes:
        await anext(changes)
    assert {function.__name__ for function in threads} == {"_look", "_read"}
