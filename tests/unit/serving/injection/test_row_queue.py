"""Who waits for rows, who may pass, and who is given what becomes free."""

from __future__ import annotations

import asyncio

import pytest

from be_serve.core.errors import RowsBusy
from tests.unit.serving.injection.rows_table import make_pool, vectors


async def test_the_wait_counts_from_the_request_on_and_some_do_not_wait():
    pool, _ = make_pool(patience=0.05)
    await pool.lease([("a", vectors("a", 4))])
    started = asyncio.get_running_loop().time()
    waiting = [asyncio.create_task(pool.lease([(name, vectors(name, 1))])) for name in "bcdefgh"]
    with pytest.raises(RowsBusy):
        await pool.lease([("z", vectors("z", 1))], wait=False)
    assert asyncio.get_running_loop().time() - started < 0.04
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, RowsBusy) for one in found)
    assert asyncio.get_running_loop().time() - started < 0.2


async def waits_for_all(pool):
    """A request for all rows, of which another holds one."""
    await pool.lease([("a", vectors("a", 1))])
    waiting = asyncio.create_task(pool.lease([("large", vectors("large", pool.capacity))]))
    await asyncio.sleep(0.01)
    return waiting


async def test_small_tokens_pass_a_large_one_that_waits_but_not_for_ever(monkeypatch):
    """A request for nearly all rows must not keep the others out, nor they it."""
    monkeypatch.setattr("be_serve.serving.injection.row_pool._MAX_OVERTAKES", 2)
    pool, table = make_pool(patience=5)
    used = await pool.lease([("a", vectors("a", 1))])
    large = asyncio.create_task(pool.lease([("large", vectors("large", 4))]))
    await asyncio.sleep(0.01)
    passing = [await pool.lease([(name, vectors(name, 1))]) for name in "bc"]
    third = asyncio.create_task(pool.lease([("d", vectors("d", 1))]))
    with pytest.raises(RowsBusy):
        await pool.lease([("e", vectors("e", 1))], wait=False)
    await asyncio.sleep(0.01)
    assert not large.done()
    assert not third.done()
    for lease in (used, *passing):
        lease.release()
    lease = await large
    assert [table.rows[row] for row in lease.rows] == vectors("large", 4)
    await asyncio.sleep(0.01)
    assert not third.done()
    lease.release()
    assert [table.rows[row] for row in (await third).rows] == ["d0"]


async def test_a_large_one_is_alone_for_a_while_only(monkeypatch):
    monkeypatch.setattr("be_serve.serving.injection.row_pool._MAX_OVERTAKES", 1)
    monkeypatch.setattr("be_serve.serving.injection.row_pool._EXCLUSIVE_SECONDS", 0.05)
    pool, _ = make_pool(8, patience=5)
    large = await waits_for_all(pool)
    await pool.lease([("b", vectors("b", 1))])
    waiting = [asyncio.create_task(pool.lease([(name, vectors(name, 1))])) for name in "cde"]
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    assert not large.done()
    large.cancel()


async def test_a_burst_for_one_token_passes_a_large_one_once(monkeypatch):
    """Those behind the first of them need no room, and use up no passes."""
    monkeypatch.setattr("be_serve.serving.injection.row_pool._MAX_OVERTAKES", 2)
    pool, _ = make_pool(patience=5)
    large = await waits_for_all(pool)
    burst = asyncio.gather(*(pool.lease([("b", vectors("b", 1))], wait=False) for _ in range(60)))
    await asyncio.wait_for(burst, 1)
    assert pool._overtakes == 1
    large.cancel()


async def test_room_for_those_behind_is_found_when_rows_come_back():
    pool, _ = make_pool(patience=5)
    used = [await pool.lease([(name, vectors(name, 2))]) for name in "ab"]
    large = asyncio.create_task(pool.lease([("large", vectors("large", 4))]))
    await asyncio.sleep(0.01)
    small = [asyncio.create_task(pool.lease([(name, vectors(name, 1))])) for name in "cd"]
    await asyncio.sleep(0.01)
    used[0].release()
    await asyncio.wait_for(asyncio.gather(*small), 1)
    assert not large.done()
    large.cancel()


async def test_a_large_one_that_gives_up_lets_those_behind_it_go(monkeypatch):
    monkeypatch.setattr("be_serve.serving.injection.row_pool._MAX_OVERTAKES", 0)
    pool, _ = make_pool(patience=0.05)
    await pool.lease([("a", vectors("a", 1))])
    large = asyncio.create_task(pool.lease([("large", vectors("large", 4))]))
    await asyncio.sleep(0.03)
    behind = asyncio.create_task(pool.lease([("b", vectors("b", 1))]))
    with pytest.raises(RowsBusy):
        await large
    assert len((await behind).rows) == 1


async def test_a_small_one_behind_two_large_ones_goes_when_it_fits():
    pool, _ = make_pool(patience=5)
    used = [await pool.lease([(name, vectors(name, k))]) for name, k in (("a", 2), ("b", 1), ("c", 1))]
    waiting = [
        asyncio.create_task(pool.lease([(name, vectors(name, k))])) for name, k in (("x", 4), ("y", 3), ("z", 1))
    ]
    await asyncio.sleep(0.01)
    used[1].release()
    await asyncio.wait_for(waiting[2], 1)
    assert not waiting[0].done()
    assert not waiting[1].done()
    for task in waiting[:2]:
        task.cancel()


async def test_what_becomes_free_is_given_to_who_waits_and_not_to_who_comes_then():
    pool, table = make_pool(patience=5)
    used = await pool.lease([("a", vectors("a", 4))])
    waiting = asyncio.create_task(pool.lease([("b", vectors("b", 4))]))
    await asyncio.sleep(0.01)
    used.release()
    with pytest.raises(RowsBusy):  # in the same step of the loop, before the one that waits has run
        await pool.lease([("c", vectors("c", 1))], wait=False)
    assert [table.rows[row] for row in (await waiting).rows] == vectors("b", 4)


async def test_passes_are_forgotten_with_the_request_that_was_passed(monkeypatch):
    monkeypatch.setattr("be_serve.serving.injection.row_pool._MAX_OVERTAKES", 1)
    pool, _ = make_pool(8, patience=5)
    large = await waits_for_all(pool)
    await pool.lease([("b", vectors("b", 1))])
    with pytest.raises(RowsBusy):
        await pool.lease([("c", vectors("c", 1))], wait=False)
    large.cancel()
    await asyncio.sleep(0)
    await waits_for_all(pool)
    await pool.lease([("c", vectors("c", 1))], wait=False)


async def test_thousands_that_wait_cost_a_release_little():
    pool, _ = make_pool(8, patience=60)
    used = await pool.lease([("a", vectors("a", 4))])
    await pool.lease([("b", vectors("b", 4))])
    waiting = [asyncio.create_task(pool.lease([(f"w{n}", [0] * 8)])) for n in range(2000)]
    await asyncio.sleep(0.05)
    looks, grant = [], pool._grant
    pool._grant = lambda request, first: looks.append(1) or grant(request, first=first)
    used.release()
    assert len(looks) == 129
    for task in waiting:
        task.cancel()


async def test_rows_that_come_back_together_are_given_away_together():
    pool, _ = make_pool(patience=5)
    both = await pool.lease([("a", vectors("a", 2)), ("b", vectors("b", 2))])
    large = asyncio.create_task(pool.lease([("large", vectors("large", 4))]))
    await asyncio.sleep(0.01)
    small = asyncio.create_task(pool.lease([("c", vectors("c", 1))]))
    await asyncio.sleep(0.01)
    both.release()
    await asyncio.wait_for(large, 1)
    assert not small.done()
    small.cancel()


async def test_nobody_overtakes_those_whom_no_look_reaches():
    pool, _ = make_pool(8, patience=0.2)
    used = await pool.lease([("a", vectors("a", 1))])
    large = [asyncio.create_task(pool.lease([(f"w{n}", [0] * 8)])) for n in range(140)]
    small = asyncio.create_task(pool.lease([("c", vectors("c", 8))]))
    await asyncio.sleep(0.01)
    with pytest.raises(RowsBusy):
        await pool.lease([("d", vectors("d", 1))], wait=False)
    used.release()
    await asyncio.wait_for(large[0], 1)
    for task in (*large[1:], small):
        task.cancel()
