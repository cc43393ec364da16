"""The deadline of calls to stores."""

from __future__ import annotations

import asyncio
import gc

import pytest

from extproc.keys.deadline import within


async def test_result_and_error_pass_through() -> None:
    async def answer() -> int:
        return 7

    async def fail() -> int:
        raise KeyError("no")

    assert await within(1, answer()) == 7
    with pytest.raises(KeyError):
        await within(1, fail())


async def test_call_that_swallows_its_cancellation_is_left_behind() -> None:
    end, ended = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            gc.collect()
            await end.wait()
            ended.set()
            raise KeyError("too late") from None

    with pytest.raises(TimeoutError):
        await within(0.001, stubborn())
    end.set()
    await asyncio.wait_for(ended.wait(), 5)


async def test_cancelled_caller_cancels_the_call() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    caller = asyncio.create_task(within(60, call()))
    await started.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.wait_for(cancelled.wait(), 5)
