"""Records in files are there once, whenever the program dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from gateway.telemetry import get_logger
from tests.harness.kafka_messages import EVENTS, RECORDS, a_message, messages
from usage.jsonl import JsonlOutlet
from usage.outlet import BATCH_MAX, Message

EIGHT: Final = 1_795_594_500.0  # 2026-11-25 08:15
FILE: Final = "2026-11-25T08.jsonl"


async def deliver(directory: Path, *batches: list[Message], now_s: float = EIGHT) -> None:
    """What a program delivers from its start to its end."""
    outlet = JsonlOutlet(directory, clock_s=lambda: now_s, log=get_logger())
    for batch in batches:
        assert await outlet.deliver(batch) == len(batch)
    await outlet.close()


def written(directory: Path, topic: str = RECORDS) -> list[int]:
    """Numbers of all records of a topic."""
    lines = b"".join(path.read_bytes() for path in sorted((directory / topic).iterdir()))
    assert lines.endswith(b"\n")
    return [json.loads(line)["n"] for line in lines.splitlines()]


async def test_a_batch_whose_acknowledgement_was_lost_is_not_written_again(tmp_path: Path) -> None:
    await deliver(tmp_path, messages(500), messages(BATCH_MAX, start=500))
    await deliver(tmp_path, messages(BATCH_MAX, start=500), messages(10, start=1500))
    assert written(tmp_path) == list(range(1510))


async def test_nor_in_the_same_process(tmp_path: Path) -> None:
    await deliver(tmp_path, messages(BATCH_MAX), messages(BATCH_MAX), messages(BATCH_MAX, start=300))
    assert written(tmp_path) == list(range(1300))


async def test_nor_when_its_lines_are_in_files_of_several_hours(tmp_path: Path) -> None:
    for hour in range(4):
        await deliver(tmp_path, messages(300, start=300 * hour), now_s=EIGHT + 3600 * hour)
    await deliver(tmp_path, messages(BATCH_MAX, start=200), now_s=EIGHT + 3600 * 4)
    assert written(tmp_path) == list(range(1200))
    assert [path.name[11:13] for path in sorted((tmp_path / RECORDS).iterdir())] == ["08", "09", "10", "11"]


async def test_events_are_known_by_their_event_id(tmp_path: Path) -> None:
    events = [a_message(n, topic=EVENTS) for n in range(20)]
    await deliver(tmp_path, events[:15])
    await deliver(tmp_path, events)
    assert written(tmp_path, EVENTS) == list(range(20))


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["one byte", "half a line", "all but the newline"])
async def test_a_line_that_was_cut_off_is_written_again_whole(tmp_path: Path, kept: int) -> None:
    await deliver(tmp_path, messages(3))
    path = tmp_path / RECORDS / FILE
    path.write_bytes(path.read_bytes() + (a_message(3).value + b"\n")[:kept])
    await deliver(tmp_path, messages(3, start=2))
    assert written(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "tail", [b"\0" * 100, b'{"record_id": "id-3\0\0\0\0"}\n', b"\0\0\n\0\0\n"], ids=["zeros", "a line", "lines"]
)
async def test_blocks_that_never_reached_the_disk_are_cut_off(tmp_path: Path, tail: bytes) -> None:
    await deliver(tmp_path, messages(3))
    path = tmp_path / RECORDS / FILE
    path.write_bytes(path.read_bytes() + tail)
    await deliver(tmp_path, messages(3, start=3))
    assert written(tmp_path) == [0, 1, 2, 3, 4, 5]


async def test_a_cut_off_line_is_gone_from_every_topic_before_the_first_delivery(tmp_path: Path) -> None:
    await deliver(tmp_path, messages(3), [a_message(0, topic=EVENTS)])
    path = tmp_path / EVENTS / FILE
    path.write_bytes(path.read_bytes() + b'{"event')
    await deliver(tmp_path, messages(1, start=3), now_s=EIGHT + 3600)
    assert written(tmp_path, EVENTS) == [0]


async def test_an_empty_file_and_a_lone_torn_line_are_a_beginning(tmp_path: Path) -> None:
    (tmp_path / RECORDS).mkdir()
    (tmp_path / EVENTS).mkdir()
    (tmp_path / RECORDS / FILE).touch()
    (tmp_path / EVENTS / FILE).write_bytes(b'{"event_id"')
    await deliver(tmp_path, messages(2), [a_message(7, topic=EVENTS)])
    assert (written(tmp_path), written(tmp_path, EVENTS)) == ([0, 1], [7])


STOPS_AT: Final = """
import asyncio, os, sys, time
from pathlib import Path
from gateway.telemetry import get_logger
from tests.harness.kafka_messages import messages
from usage.jsonl import JsonlOutlet

fsync, write, stop_at = os.fsync, os.write, sys.argv[2]

def stop():
    print("stopped", flush=True)
    time.sleep(600)

def stopping_fsync(file):
    if stop_at == "before the sync":
        stop()
    fsync(file)
    if stop_at == "before the acknowledgement":
        stop()

def stopping_write(file, data):
    if stop_at == "before the write":
        stop()
    size = write(file, data[: len(data) // 2 + 1])
    if stop_at == "in the write":
        stop()
    return size

async def main(directory):
    outlet = JsonlOutlet(directory, clock_s=lambda: float(sys.argv[3]), log=get_logger())
    assert await outlet.deliver(messages(500, padding=300)) == 500
    os.fsync, os.write = stopping_fsync, stopping_write
    await outlet.deliver(messages(1000, start=500, padding=300))

asyncio.run(main(Path(sys.argv[1])))
"""


def killed_in_a_delivery(directory: Path, at: str) -> None:
    """Deliver 500 records, and kill the program in the delivery of the next 1000."""
    command = [sys.executable, "-c", STOPS_AT, str(directory), at, str(EIGHT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "stopped\n"
        finally:
            child.kill()


@pytest.mark.parametrize("at", ["before the write", "in the write", "before the sync", "before the acknowledgement"])
async def test_killed_in_a_delivery_each_record_is_written_once_in_order(tmp_path: Path, at: str) -> None:
    killed_in_a_delivery(tmp_path, at)
    left = (tmp_path / RECORDS / FILE).read_bytes()
    assert left.endswith(b"\n") is (at != "in the write")
    await deliver(tmp_path, messages(1000, start=500, padding=300), messages(10, start=1500))
    assert written(tmp_path) == list(range(1510))
