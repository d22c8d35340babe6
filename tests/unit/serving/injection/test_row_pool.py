"""Rows of the workers' table: who lies where, and who may be written over."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from be_serve.core.errors import RowsBusy, TooManyVectors
from be_serve.serving.injection.resident_rows import RowIds, salt
from be_serve.serving.injection.row_pool import RowPool
from be_serve.serving.vllm.rows import _leased
from tests.unit.serving.injection.rows_table import make_pool, vectors


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
    with pytest.raises(RowsBusy, match="Too few of the 4 rows") as caught:
        await pool.lease([("b", vectors("b", 1))])
    assert caught.value.http_status == 503


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


async def test_the_time_of_writes_is_no_waiting_for_room():
    """A server that has just started: rows enough for all, and an engine that takes its time."""
    pool, table = make_pool(patience=0.5)
    quick = table.write

    async def slow(rows, vectors):
        await asyncio.sleep(0.2)
        await quick(rows, vectors)

    pool._write = slow
    leases = await asyncio.gather(*(pool.lease([(name, vectors(name, 1))], wait=name < "c") for name in "abcd"))
    assert [table.rows[lease.rows[0]] for lease in leases] == ["a0", "b0", "c0", "d0"]


async def test_who_leased_a_token_that_could_not_be_written_is_told_and_the_next_may_try():
    pool, table = make_pool()
    table.fault = OSError("the engine is gone")
    found = await asyncio.gather(*(pool.lease([("a", vectors("a", 4))]) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(one, OSError) for one in found)
    assert (pool.resident, pool.writes, len(pool._free)) == (0, 0, 4)
    table.fault = None
    assert len((await pool.lease([("a", vectors("a", 4))])).rows) == 4


async def test_who_comes_between_a_failed_write_and_its_end_is_told():
    """The task is done, and the pool does not know of it yet: rows that hold nothing must not pass for written."""

    async def write(rows, vectors):
        raise OSError("the engine is gone")

    pool = RowPool(range(4), write)
    first = asyncio.create_task(pool.lease([("a", vectors("a", 4))]))
    while "a" not in pool._residents or not pool._residents["a"].written.done():
        await asyncio.sleep(0)
    with pytest.raises(OSError, match="gone"):
        await pool.lease([("a", vectors("a", 4))])
    with pytest.raises(OSError, match="gone"):
        await first
    assert (pool.resident, len(pool._free)) == (0, 4)


async def test_a_write_goes_on_for_others_when_the_request_that_began_it_is_gone():
    pool, table = make_pool()
    first = asyncio.create_task(pool.lease([("a", vectors("a", 4))]))
    second = asyncio.create_task(pool.lease([("a", vectors("a", 4))]))
    await asyncio.sleep(0)
    first.cancel()
    assert [table.rows[row] for row in (await second).rows] == vectors("a", 4)
    assert pool.writes == 1


async def test_a_request_that_is_given_rows_and_cancelled_at_once_gives_them_back():
    pool, _ = make_pool(patience=5)
    used = await pool.lease([("a", vectors("a", 4))])
    waiting = asyncio.create_task(pool.lease([("b", vectors("b", 4))]))
    await asyncio.sleep(0.01)
    used.release()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0.01)
    assert pool._idle == 4


async def test_the_number_of_residents_is_told_when_it_falls_too():
    told = []
    pool, table = make_pool(observe=lambda *figures: told.append(figures))
    for name in "abcd":
        (await pool.lease([(name, vectors(name, 1))])).release()
    (await pool.lease([("e", vectors("e", 4))])).release()
    table.fault = OSError("the engine is gone")
    with pytest.raises(OSError, match="gone"):
        await pool.lease([("f", vectors("f", 4))])
    assert told == [(1, 1), (2, 1), (3, 1), (4, 1), (1, 1), (0, 0)]
    assert pool.writes == 5


async def test_a_write_keeps_nothing_of_the_request_that_began_it():
    seen = contextvars.ContextVar("seen", default=None)

    class Request:
        pass

    async def asks():
        request = Request()
        seen.set(request)
        (await pool.lease([("a", vectors("a", 4))])).release()
        return weakref.ref(request)

    pool, _ = make_pool(patience=0.01)
    request = await asyncio.create_task(asks())
    await asyncio.sleep(0.02)  # the timer of its patience holds the request's context, too
    gc.collect()
    assert pool.resident == 1
    assert request() is None


async def test_an_engine_that_never_takes_a_token_keeps_nobody():
    pool, _ = make_pool(patience=0.02)

    async def never(rows, vectors):
        await asyncio.sleep(60)

    pool._write = never
    for wait in (True, False):
        with pytest.raises(RowsBusy, match="did not write"):
            await pool.lease([("a", vectors("a", 1))], wait=wait)


REQUEST = st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 3), st.sampled_from(["stays", "goes", "part"]))


@given(st.lists(REQUEST, max_size=60), st.integers(4, 8), st.sets(st.integers(0, 40), max_size=5))
def test_under_any_load_a_lease_reads_its_own_vectors(requests, size, faults):
    """Many clients at once, some of which go away, and writes of which some fail.

    What lies in a lease's rows is its tokens', from the first moment to the last, and no row is lost.
    """

    async def client(pool, table, name, k, pauses, way):
        tokens = [(f"{name}/{k}", vectors(f"{name}/{k}", k))]
        if way == "part" and k < 4:
            tokens.append((f"{name}/1", vectors(f"{name}/1", 1)))
        lease = await pool.lease(tokens)
        try:
            for _ in range(pauses + 1):
                assert [table.rows[row] for row in lease.rows] == [vector for _, token in tokens for vector in token]
                await asyncio.sleep(0)
        finally:
            lease.release()

    async def run():
        pool, table = make_pool(size, patience=5)
        count, write = iter(range(10_000)), table.write

        async def at_times_faulty(rows, vectors):
            await write(rows, vectors)
            if next(count) in faults:
                raise OSError("the engine is gone")

        pool._write = at_times_faulty
        tasks = [asyncio.create_task(client(pool, table, *request)) for request in requests]
        for task, (_, _, pauses, way) in zip(tasks, requests, strict=True):
            if way == "goes":
                for _ in range(pauses):
                    await asyncio.sleep(0)
                task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(one is None or isinstance(one, (OSError, asyncio.CancelledError)) for one in done), done
        await asyncio.gather(*(found.written for found in pool._residents.values()), return_exceptions=True)
        await asyncio.sleep(0)
        assert not pool._waiting
        assert pool._idle == sum(len(found.rows) for found in pool._residents.values())
        assert sorted([*pool._free, *(row for found in pool._residents.values() for row in found.rows)]) == list(
            range(size)
        )

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
    await asyncio.sleep(0)
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
