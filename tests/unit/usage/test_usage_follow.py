"""Following the journal: in order, rotated once everything is safe, and not while there is no room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from gateway.telemetry import get_logger
from tests.unit.usage.usage_builders import START_S, Told, a_spool, line_of, metrics, until
from usage.follow import JournalFollower, reopener
from usage.intake import Intake
from usage.journal_file import JournalFile, Position
from usage.spool import Spool
from usage.writer import Writer


class Envoy:
    """Writes a journal, and opens it anew when it is told to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.reopened = 0
        self.down = False

    def write(self, *numbers: int) -> None:
        for number in numbers:
            self.file.write(line_of(Told(request_id=f"r-{number:03}")) + b"\n")

    async def reopen(self) -> None:
        if self.down:
            raise httpx.ConnectError("refused")
        self.reopened += 1
        self.file.close()
        self.file = self.path.open("ab", buffering=0)


class Ledger:
    """A follower, and what it has had written down."""

    def __init__(self, envoy: Envoy, spool: Spool, *, rotated_bytes: int) -> None:
        self.ids: list[str] = []
        self.spool = spool
        self.writer = Writer(
            spool, written=self._written, metrics=metrics(), log=get_logger(), retry_s=0.001, group_s=0
        )
        self.file = JournalFile(envoy.path, Position.read(str(spool.mark("journal", ""))), rotated_bytes=rotated_bytes)
        intake = Intake(
            self.writer,
            tried_s=lambda: None,
            running=lambda _: None,
            metrics=metrics(),
            log=get_logger(),
        )
        self.follower = JournalFollower(
            self.file,
            intake,
            self.writer,
            reopen=envoy.reopen,
            clock_s=lambda: float(START_S),
            metrics=metrics(),
            log=get_logger(),
            poll_s=0.001,
        )

    def _written(self, entries: object) -> None:
        self.ids += [entry.request_id for entry in entries]  # type: ignore[attr-defined]


@asynccontextmanager
async def running(directory: Path, envoy: Envoy, *, rotated_bytes: int = 1 << 20) -> AsyncIterator[Ledger]:
    ledger = Ledger(envoy, a_spool(directory), rotated_bytes=rotated_bytes)
    tasks = [asyncio.create_task(ledger.writer.run()), asyncio.create_task(ledger.follower.run())]
    try:
        yield ledger
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        ledger.writer.close()
        ledger.spool.close()
        ledger.file.close()


@pytest.fixture
def envoy(tmp_path: Path) -> Envoy:
    return Envoy(tmp_path / "requests.jsonl")


def ids(count: int) -> list[str]:
    return [f"r-{number:03}" for number in range(count)]


async def test_lines_are_taken_as_they_come(tmp_path: Path, envoy: Envoy) -> None:
    async with running(tmp_path, envoy) as ledger:
        for number in range(20):
            envoy.write(number)
            await until(lambda number=number: len(ledger.ids) == number + 1)  # type: ignore[misc]
        assert ledger.ids == ids(20)
        assert ledger.follower.caught_up.is_set()


async def test_it_has_caught_up_once_everything_was_read_that_was_there(tmp_path: Path, envoy: Envoy) -> None:
    envoy.write(*range(50))
    async with running(tmp_path, envoy) as ledger:
        await ledger.follower.caught_up.wait()
        assert await ledger.writer.drain(10) == 0
        assert ledger.ids == ids(50)


async def test_it_goes_on_after_a_restart_where_it_was(tmp_path: Path, envoy: Envoy) -> None:
    envoy.write(0, 1)
    async with running(tmp_path, envoy) as ledger:
        await until(lambda: len(ledger.ids) == 2)
    envoy.write(2)
    async with running(tmp_path, envoy) as ledger:
        await until(lambda: ledger.ids)
        assert ledger.ids == ["r-002"]


async def test_file_is_rotated_again_and_again_and_no_line_is_lost(tmp_path: Path, envoy: Envoy) -> None:
    async with running(tmp_path, envoy, rotated_bytes=2000) as ledger:
        for number in range(100):
            envoy.write(number)
            await asyncio.sleep(0.001)
        await until(lambda: len(ledger.ids) == 100)
        assert ledger.ids == ids(100)
        assert envoy.reopened > 2
        await until(lambda: not (tmp_path / "requests.jsonl.old").exists())


async def test_old_file_is_removed_only_once_the_spools_own_file_has_it(tmp_path: Path, envoy: Envoy) -> None:
    removed_with: list[int] = []

    async with running(tmp_path, envoy, rotated_bytes=1) as ledger:
        forget = ledger.file.forget_old

        def look_and_forget() -> None:
            removed_with.append((tmp_path / "usage.db-wal").stat().st_size)
            forget()

        ledger.file.forget_old = look_and_forget  # type: ignore[method-assign]
        envoy.write(1)
        await until(lambda: removed_with)
    assert removed_with[0] == 0


async def test_file_that_was_put_aside_waits_for_an_envoy_that_is_down(tmp_path: Path, envoy: Envoy) -> None:
    envoy.down = True
    async with running(tmp_path, envoy, rotated_bytes=1) as ledger:
        envoy.write(0)
        await until(lambda: ledger.file.is_aside)
        envoy.write(1)
        await until(lambda: ledger.ids == ids(2))
        envoy.down = False
        await until(lambda: envoy.reopened)
        envoy.write(2)
        await until(lambda: ledger.ids == ids(3))


async def test_file_system_that_fails_is_tried_again(tmp_path: Path, envoy: Envoy) -> None:
    async with running(tmp_path, envoy) as ledger:
        read, failures = ledger.file.read, iter([True] * 3)

        def failing() -> list[bytes]:
            if next(failures, False):
                raise OSError("Input/output error")
            return read()

        ledger.file.read = failing  # type: ignore[method-assign]
        envoy.write(0)
        await until(lambda: ledger.ids == ids(1))


@pytest.mark.parametrize("status", [200, 503])
async def test_envoy_is_told_to_open_its_files_anew(status: int) -> None:
    asked: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, str(request.url)))
        return httpx.Response(status)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        if status == 200:
            await reopener(http, "127.0.0.1:9901")()
        else:
            with pytest.raises(httpx.HTTPStatusError):
                await reopener(http, "127.0.0.1:9901")()
    assert asked == [("POST", "http://127.0.0.1:9901/reopen_logs")]
