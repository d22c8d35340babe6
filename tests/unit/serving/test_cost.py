"""What a request's own work costs: waiting is no processor time, nor is others' work."""

from __future__ import annotations

import asyncio
import time

import pytest

from be_serve.serving.cost import Cost


def work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def test_only_the_works_own_steps_count():
    async def own() -> str:
        work(0.01)
        await asyncio.sleep(0.1)
        work(0.01)
        return "done"

    async def other() -> None:
        await asyncio.sleep(0.02)
        work(0.05)

    cost, beside = Cost(), asyncio.create_task(other())
    assert await cost.of(own()) == "done"
    await beside
    assert 0.02 <= cost.cpu < 0.04
    assert cost.wall >= 0.12


async def test_errors_pass_and_count():
    async def failing() -> None:
        await asyncio.sleep(0)
        work(0.01)
        raise ValueError("no")

    cost = Cost()
    with pytest.raises(ValueError, match="no"):
        await cost.of(failing())
    assert cost.cpu >= 0.01


async def test_what_was_waited_for_fails_inside_the_work():
    async def own(future: asyncio.Future[None]) -> str:
        try:
            await future
        except ValueError:
            return "caught"
        return "missed"

    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_exception, ValueError())
    assert await Cost().of(own(future)) == "caught"


async def test_cancelling_reaches_the_work():
    seen = []

    async def own() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0)  # cleaning up may wait, too
            seen.append("cleaned up")

    task = asyncio.create_task(Cost().of(own()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cleaned up"]


def test_a_block_adds_up():
    cost = Cost()
    for _ in range(2):
        with cost.of_block():
            work(0.005)
            time.sleep(0.01)
    assert 0.01 <= cost.cpu < cost.wall
    assert cost.wall >= 0.03
