"""Rows of the workers' table: who lies where, and who may be written over."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from be_serve.serving.inject_resident_rows import RowIds, salt
from be_serve.serving.rows import RowPool, RowsBusy, TooManyVectors
from be_serve.serving.vllm_rows import _leased


class Table:
    """What a worker would hold."""

    def __init__(self, size):
        self.rows = [None] * size
        self.fault = None

    async def write(self, rows, vectors):
        await asyncio.sleep(0)
        for row, vector in zip(rows, vectors, strict=True):
            self.rows[row] = vector
        await asyncio.sleep(0)
        if self.fault:
            raise self.fault


def make_pool(size=4, **options):
    table = Table(size)
    return RowPool(range(size), table.write, **options), table


def vectors(name, k):
    return [f"{name}{i}" for i in range(k)]


async def test_a_token_is_written_once_and_found_again():
    pool, table = make_pool()
    first = await pool.lease([("a", vectors("a", 2))])
    second = await pool.lease([("a", vectors("a", 2))])
    assert first.rows == second.rows
    assert [table.rows[row] for row in first.rows] == ["a0", "a1"]
    assert pool.writes == 1


async def test_the_longest_unused_token_makes_room():
    pool, table = make_pool()
    for name in ("a", "b"):
        (await pool.lease([(name, vectors(name, 2))])).release()
    (await pool.lease([("a", vectors("a", 2))])).release()
    lease = await pool.lease([("c", vectors("c", 1))])
    assert pool.resident == 2
    assert {"a0", "a1", "c0"} <= set(table.rows)
    assert table.rows[lease.rows[0]] == "c0"


async def test_rows_in_use_are_never_written_over():
    pool, table = make_pool(patience=5)
    used = await pool.lease([("a", vectors("a", 3))])
    again = used.renew()
    used.release()
    used.release()
    waiting = asyncio.create_task(pool.lease([("b", vectors("b", 2))]))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert [table.rows[row] for row in again.rows] == ["a0", "a1", "a2"]
    again.release()
    lease = await waiting
    assert [table.rows[row] for row in lease.rows] == ["b0", "b1"]
    with pytest.raises(RuntimeError):
        again.renew()


async def test_a_server_whose_rows_are_all_in_use_says_so():
    pool, _ = make_pool(patience=0.01)
    await pool.lease([("a", vectors("a", 4))])
    with pytest.raises(RowsBusy, match="All 4 rows") as caught:
        await pool.lease([("b", vectors("b", 1))])
    assert caught.value.http_status == 503


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
    monkeypatch.setattr("be_serve.serving.rows._PASSED", 2)
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
    monkeypatch.setattr("be_serve.serving.rows._PASSED", 1)
    monkeypatch.setattr("be_serve.serving.rows._ALONE", 0.05)
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
    monkeypatch.setattr("be_serve.serving.rows._PASSED", 2)
    pool, _ = make_pool(patience=5)
    large = await waits_for_all(pool)
    burst = asyncio.gather(*(pool.lease([("b", vectors("b", 1))], wait=False) for _ in range(60)))
    await asyncio.wait_for(burst, 1)
    assert pool._passed == 1
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
    monkeypatch.setattr("be_serve.serving.rows._PASSED", 0)
    pool, _ = make_pool(patience=0.05)
    await pool.lease([("a", vectors("a", 1))])
    large = asyncio.create_task(pool.lease([("large", vectors("large", 4))]))
    await asyncio.sleep(0.03)
    behind = asyncio.create_task(pool.lease([("b", vectors("b", 1))]))
    with pytest.raises(RowsBusy):
        await large
    assert len((await behind).rows) == 1


async def test_a_burst_on_free_rows_is_served_whole_though_nobody_may_wait_for_room():
    pool, table = make_pool()
    leases = await asyncio.gather(*(pool.lease([("a", vectors("a", 2))], wait=False) for _ in range(8)))
    assert pool.writes == 1
    others = await asyncio.gather(*(pool.lease([(name, vectors(name, 1))], wait=False) for name in "bc"))
    for lease, name, k in [(leases[7], "a", 2), (others[0], "b", 1), (others[1], "c", 1)]:
        assert [table.rows[row] for row in lease.rows] == vectors(name, k)


async def test_a_token_with_more_vectors_than_rows_names_both():
    pool, _ = make_pool()
    with pytest.raises(TooManyVectors, match=r"5 vectors.* 4 rows") as caught:
        await pool.lease([("a", vectors("a", 5))])
    assert caught.value.http_status == 422


async def test_tokens_of_one_slot_lie_in_their_own_rows_and_are_shared():
    pool, table = make_pool()
    alone = await pool.lease([("b", vectors("b", 1))])
    both = await pool.lease([("a", vectors("a", 2)), ("b", vectors("b", 1)), ("a", vectors("a", 2))])
    assert [table.rows[row] for row in both.rows] == ["a0", "a1", "b0", "a0", "a1"]
    assert alone.rows[0] in both.rows
    assert (pool.resident, pool.writes) == (2, 2)
    alone.release()
    both.release()
    assert pool._make_room(4)
    with pytest.raises(TooManyVectors, match=r"5 vectors.* 4 rows"):
        await pool.lease([("a", vectors("a", 3)), ("c", vectors("c", 2))])


async def test_tokens_of_one_slot_are_leased_all_or_none():
    pool, table = make_pool(patience=5)
    used = await pool.lease([("a", vectors("a", 3))])
    await pool.lease([("b", vectors("b", 1))])
    waiting = asyncio.create_task(pool.lease([("b", vectors("b", 1)), ("c", vectors("c", 2))]))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    used.release()
    lease = await waiting
    assert [table.rows[row] for row in lease.rows] == ["b0", "c0", "c1"]


async def test_a_failed_write_leaves_no_resident_and_loses_no_rows():
    pool, table = make_pool()
    table.fault = OSError("the engine is gone")
    with pytest.raises(OSError, match="gone"):
        await pool.lease([("a", vectors("a", 4))])
    table.fault = None
    lease = await pool.lease([("a", vectors("a", 4))])
    assert [table.rows[row] for row in lease.rows] == vectors("a", 4)


async def test_a_client_that_goes_away_while_its_token_is_written_leaves_the_rows_to_others():
    pool, table = make_pool()
    task = asyncio.create_task(pool.lease([("a", vectors("a", 4))]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    lease = await pool.lease([("b", vectors("b", 4))])
    assert [table.rows[row] for row in lease.rows] == vectors("b", 4)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(0, 3)), max_size=60), st.integers(3, 8))
def test_under_any_load_a_lease_reads_its_own_vectors(requests, size):
    """Many clients at once: what lies in a lease's rows is its token's, from the first moment to the last."""

    async def client(pool, table, name, k, pauses):
        token = f"{name}/{k}"
        lease = await pool.lease([(token, vectors(token, k))])
        for _ in range(pauses + 1):
            assert [table.rows[row] for row in lease.rows] == vectors(token, k)
            await asyncio.sleep(0)
        lease.release()

    async def run():
        pool, table = make_pool(size, patience=5)
        await asyncio.gather(*(client(pool, table, *request) for request in requests))
        assert sum(len(found.rows) for found in pool._residents.values()) + len(pool._free) == size

    asyncio.run(run())


class Outputs:
    """vLLM's generator of outputs: `faults` says what closing it does."""

    def __init__(self, fault=None):
        self.closed, self._fault, self._left = False, fault, 3

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._left:
            raise StopAsyncIteration
        self._left -= 1
        return self._left

    async def aclose(self):
        self.closed = True
        if self._fault:
            raise self._fault


@pytest.mark.parametrize("read", [0, 1, 3, None])
@pytest.mark.parametrize("fault", [None, OSError("the engine is gone")])
async def test_rows_are_held_from_the_call_to_the_end_of_the_engines_work(read, fault):
    """Read to the end, given up in the middle, or never begun: the rows come back once, behind vLLM's own abort."""
    pool, _ = make_pool()
    http = await pool.lease([("a", vectors("a", 4))])
    outputs = Outputs(fault)
    held = _leased(http, outputs)
    http.release()
    assert not pool._make_room(4)
    with contextlib.suppress(OSError):
        if read is None:
            assert [one async for one in held] == [2, 1, 0]
        else:
            for _ in range(read):
                await anext(held)
                assert not pool._make_room(4)
        await held.aclose()
    del held
    gc.collect()
    assert outputs.closed == (read != 0)
    assert pool._make_room(4)


def test_the_salt_tells_tokens_and_clients_apart():
    salts = {salt("a", None), salt("b", None), salt("a", "x"), salt("b", "x")}
    assert len(salts) == 4
    assert salt("a", None) == salt("a", "")


def test_ids_with_rows_know_the_plain_ones():
    ids = RowIds([1, 2], [900, 901], [3], lease=None)
    assert ids == [1, 2, 900, 901, 3]
    assert ids.plain == [1, 2, 3]
