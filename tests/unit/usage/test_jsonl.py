"""Records in files: order, hours, a full disk, old files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from structlog.testing import capture_logs

from gateway.telemetry import get_logger
from tests.harness.kafka_messages import EVENTS, RECORDS, a_message, messages
from usage.jsonl import HOUR_S, JsonlOutlet
from usage.outlet import BATCH_MAX, Message, record_message_id

EIGHT: Final = datetime(2026, 11, 25, 8, 15, tzinfo=UTC).timestamp()


class Clock:
    """Unix seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = EIGHT

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def an_outlet(directory: Path, *, clock_s: Callable[[], float] = lambda: EIGHT) -> AsyncIterator[JsonlOutlet]:
    outlet = JsonlOutlet(directory, clock_s=clock_s, log=get_logger())
    try:
        yield outlet
    finally:
        await outlet.close()


def numbers(directory: Path, *, topic: str = RECORDS) -> dict[str, list[int]]:
    """Numbers of the records in each file."""
    files = sorted((directory / topic).iterdir())
    return {path.stem: [json.loads(line)["n"] for line in path.read_bytes().splitlines()] for path in files}


async def test_messages_are_lines_in_order(tmp_path: Path) -> None:
    async with an_outlet(tmp_path) as outlet:
        assert await outlet.deliver(messages(700)) == 700
        assert await outlet.deliver(messages(700, start=700)) == 700
    written = (tmp_path / RECORDS / "2026-11-25T08.jsonl").read_bytes()
    assert written == b"".join(message.value + b"\n" for message in messages(1400))


async def test_each_topic_has_its_own_file(tmp_path: Path) -> None:
    mixed = [a_message(n, topic=RECORDS if n % 3 else EVENTS) for n in range(12)]
    async with an_outlet(tmp_path) as outlet:
        assert await outlet.deliver(mixed) == 12
    assert numbers(tmp_path, topic=EVENTS) == {"2026-11-25T08": [0, 3, 6, 9]}
    assert numbers(tmp_path, topic=RECORDS) == {"2026-11-25T08": [1, 2, 4, 5, 7, 8, 10, 11]}


async def test_a_file_ends_with_its_hour(tmp_path: Path) -> None:
    clock = Clock()
    async with an_outlet(tmp_path, clock_s=clock) as outlet:
        await outlet.deliver(messages(2))
        clock.now_s += HOUR_S
        await outlet.deliver(messages(2, start=2))
    assert numbers(tmp_path) == {"2026-11-25T08": [0, 1], "2026-11-25T09": [2, 3]}


@pytest.mark.parametrize("restart", [False, True], ids=["same process", "after a restart"])
async def test_a_clock_that_goes_back_changes_no_earlier_file(tmp_path: Path, *, restart: bool) -> None:
    clock = Clock()
    async with an_outlet(tmp_path, clock_s=clock) as outlet:
        await outlet.deliver(messages(2))
        clock.now_s += HOUR_S
        await outlet.deliver(messages(2, start=2))
        clock.now_s -= HOUR_S
        if not restart:
            assert await outlet.deliver(messages(2, start=4)) == 2
    if restart:
        async with an_outlet(tmp_path, clock_s=clock) as again:
            assert await again.deliver(messages(2, start=4)) == 2
    assert numbers(tmp_path) == {"2026-11-25T08": [0, 1], "2026-11-25T09": [2, 3, 4, 5]}


async def test_lines_and_new_directories_are_synced_before_they_are_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def noting(file: int) -> None:
        fsync(file)
        path = Path(f"/proc/self/fd/{file}").resolve()
        synced.append((str(path.relative_to(tmp_path)), path.stat().st_size if path.is_file() else 0))

    monkeypatch.setattr(os, "fsync", noting)
    file = f"{RECORDS}/2026-11-25T08.jsonl"
    async with an_outlet(tmp_path / "usage") as outlet:
        await outlet.deliver(messages(5))
        assert {name for name, _ in synced} == {".", "usage", f"usage/{RECORDS}", f"usage/{file}"}
        assert synced[-1] == (f"usage/{file}", (tmp_path / "usage" / file).stat().st_size)
        synced.clear()
        await outlet.deliver(messages(5, start=5))
        assert synced == [(f"usage/{file}", (tmp_path / "usage" / file).stat().st_size)]


@pytest.mark.parametrize("calls", [["fsync"], ["fsync", "truncate"]], ids=" and ".join)
async def test_lines_that_could_not_be_synced_are_written_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "no such luck")

    async with an_outlet(tmp_path) as outlet:
        await outlet.deliver(messages(3))
        with monkeypatch.context() as broken, capture_logs() as logs:
            for call in calls:
                broken.setattr(os, call, failing)
            assert await outlet.deliver(messages(3, start=3)) == 0
            assert await outlet.deliver(messages(3, start=3)) == 0
        assert [line["event"] for line in logs] == ["jsonl_not_written"]
        with capture_logs() as logs:
            assert await outlet.deliver(messages(3, start=3)) == 3
        assert [line["event"] for line in logs] == ["jsonl_written_again"]
    assert numbers(tmp_path) == {"2026-11-25T08": [0, 1, 2, 3, 4, 5]}


FULL_DISK: Final = """
import asyncio, json, resource, sys
from pathlib import Path
from gateway.telemetry import configure_logging, get_logger
from tests.harness.kafka_messages import EVENTS, a_message, messages
from usage.jsonl import JsonlOutlet

async def main(directory):
    configure_logging(program="test")
    outlet = JsonlOutlet(directory, clock_s=lambda: 1.8e9, log=get_logger())
    safe = [await outlet.deliver(messages(20))]
    size = sum(path.stat().st_size for path in directory.rglob("*.jsonl"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))
    mixed = [*[a_message(n, topic=EVENTS) for n in range(3)], *messages(100, start=20)]
    safe += [await outlet.deliver(mixed), await outlet.deliver(mixed)]
    assert sum(path.stat().st_size for path in directory.rglob("*.jsonl") if path.parent.name != EVENTS) == size
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    safe += [await outlet.deliver(mixed[safe[-1]:])]
    print(json.dumps(safe))

asyncio.run(main(Path(sys.argv[1])))
"""


def test_a_full_disk_takes_nothing_away_and_ends_by_itself(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [20, 3, 3, 100]
    assert [json.loads(line)["event"] for line in run.stderr.splitlines()] == [
        "jsonl_not_written",
        "jsonl_written_again",
    ]
    (records,) = numbers(tmp_path).values()
    (events,) = numbers(tmp_path, topic=EVENTS).values()
    assert (records, events) == (list(range(120)), [0, 1, 2])


async def test_prune_deletes_the_files_of_hours_that_ended_before(tmp_path: Path) -> None:
    clock = Clock()
    async with an_outlet(tmp_path, clock_s=clock) as outlet:
        for hour in range(3):
            await outlet.deliver([a_message(hour), a_message(hour, topic=EVENTS)])
            clock.now_s += HOUR_S
        (tmp_path / RECORDS / "notes.jsonl").write_text("not ours\n")
        at_ten = datetime(2026, 11, 25, 10, tzinfo=UTC).timestamp()
        assert await outlet.prune(at_ten - 1) == 2
        assert sorted(path.name for path in (tmp_path / EVENTS).iterdir()) == [
            "2026-11-25T09.jsonl",
            "2026-11-25T10.jsonl",
        ]
        assert await outlet.prune(at_ten + HOUR_S) == 4
        assert await outlet.deliver(messages(1, start=9)) == 1
    assert (tmp_path / RECORDS / "notes.jsonl").read_text() == "not ours\n"
    (tmp_path / RECORDS / "notes.jsonl").unlink()
    assert numbers(tmp_path) == {"2026-11-25T11": [9]}


async def test_one_process_at_a_time_has_a_directory(tmp_path: Path) -> None:
    async with an_outlet(tmp_path) as second:
        async with an_outlet(tmp_path) as first:
            assert await first.deliver(messages(1)) == 1
            assert await second.deliver(messages(1, start=1)) == 0
        assert await second.deliver(messages(1, start=1)) == 1
    assert numbers(tmp_path) == {"2026-11-25T08": [0, 1]}


@pytest.mark.parametrize("topic", ["..", "a/b", "", "a\0"], ids=repr)
async def test_a_topic_that_is_no_name_is_nobody_s_file(tmp_path: Path, topic: str) -> None:
    async with an_outlet(tmp_path) as outlet:
        with pytest.raises(ValueError, match="not a topic"):
            await outlet.deliver([Message(id="1", topic=topic, key="k", value=b"{}")])


async def test_what_is_no_batch_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="newline"):
        Message(id="1", topic=RECORDS, key="k", value=b"{\n}")
    async with an_outlet(tmp_path) as outlet:
        with pytest.raises(ValueError, match="at most"):
            await outlet.deliver(messages(BATCH_MAX + 1))
        assert await outlet.deliver([]) == 0


async def test_a_closed_outlet_takes_nothing(tmp_path: Path) -> None:
    async with an_outlet(tmp_path) as outlet:
        await outlet.close()
        assert await outlet.deliver(messages(1)) == 0
    assert os.listdir(tmp_path) == []


async def test_another_revision_of_a_record_is_no_repetition_of_it(tmp_path: Path) -> None:
    def record(revision: int) -> Message:
        value = json.dumps({"record_id": "id-1", "revision": revision, "n": revision}).encode()
        return Message(id=record_message_id("id-1", revision), topic=RECORDS, key="acme", value=value)

    async with an_outlet(tmp_path) as outlet:
        assert await outlet.deliver([record(0)]) == 1
        assert await outlet.deliver([record(0), record(1)]) == 2
    async with an_outlet(tmp_path) as outlet:  # by what is in the file
        assert await outlet.deliver([record(0), record(1)]) == 2
    assert numbers(tmp_path) == {"2026-11-25T08": [0, 1]}
