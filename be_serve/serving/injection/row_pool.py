"""Assigns rows of the workers' table to tokens. Imports no vLLM.

Each server process owns a range of rows and counts the requests that use each
token. A token that is not in rows takes free rows, then the rows of the least
recently used tokens. Rows of a running request are never rewritten, because vLLM
embeds a preempted request again.

The pool assigns rows without an await, so no other request can take the rows that
were found for a request. Only writing the vectors takes time. If there are not enough
rows, requests wait in a queue and get rows in queue order as rows become free.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from be_serve.core.errors import RowsBusy, TooManyVectors

Write = Callable[[list[int], Any], Coroutine[Any, Any, None]]
_MAX_OVERTAKES = 32
"""How many requests may overtake the first of the queue. Then nobody overtakes it for `_EXCLUSIVE_SECONDS` seconds."""
_EXCLUSIVE_SECONDS = 3.0
_MAX_TRIED = 128
"""How many waiting requests are tried when rows become free, since thousands may wait.

Nobody overtakes a queue that is longer than this.
"""


def too_many_vectors(k: int, capacity: int) -> TooManyVectors:
    """The error for `k` vectors on a server process with `capacity` rows."""
    return TooManyVectors(
        f"The token has {k} vectors; this server process has {capacity} rows for tokens. Operators: raise --be-rows.",
        param="be_id",
    )


@dataclass(eq=False)
class _Resident:
    """A token whose vectors are in `rows` or are being written there, and the number of its users."""

    rows: list[int]
    users: int = 1
    """Number of leases on the token. The write of the vectors counts as one more."""
    written: asyncio.Task[None] = field(init=False)


@dataclass(eq=False)
class _Request:
    """The tokens that a request needs."""

    digests: Sequence[str]
    """Digests of the tokens, in order. A token may occur more than once."""
    vectors: dict[str, Any]
    granted: asyncio.Future[Lease] = field(init=False)
    """Set only while the request waits in the queue."""


class Lease:
    """Holds `rows`, the rows of one request's tokens in order, until it is released."""

    def __init__(self, pool: RowPool, residents: Sequence[_Resident]) -> None:
        self._pool, self._residents = pool, residents
        self.rows = [row for resident in residents for row in resident.rows]
        self._held = True
        for resident in residents:
            pool.enter(resident)

    def renew(self) -> Lease:
        """A second lease on the same rows, released on its own. This lease must still be held."""
        if not self._held:
            raise RuntimeError("A released lease cannot be renewed.")
        return Lease(self._pool, self._residents)

    def release(self) -> None:
        """End the lease. Rows without any lease may be rewritten. May be called more than once."""
        if self._held:
            self._held = False
            self._pool.leave(self._residents)

    async def written(self, patience: float) -> bool:
        """Wait at most `patience` seconds for the vectors. Returns whether they are in the rows.

        Raises the error of a write that failed.
        """
        writes = {resident.written for resident in self._residents}
        for ended in [write for write in writes if write.done()]:
            ended.result()  # a write that has just failed may not have freed its rows yet: raise its error
            writes.remove(ended)
        if not writes:
            return True
        # `asyncio.wait` cancels no write. Other requests may have leased the same token and need its write.
        done, pending = await asyncio.wait(writes, timeout=patience)
        for write in done:
            write.result()
        return not pending


class RowPool:
    """The rows of the workers' table that belong to this process. For one event loop; not thread-safe.

    `write` puts vectors [n, hidden_size] into rows on every worker and returns when they are there. Its calls
    must reach the workers in the order of the calls. `observe` is called after each write with the number of
    resident tokens and the number of written tokens: 1, or 0 if the write failed.
    """

    def __init__(
        self,
        rows: Sequence[int],
        write: Write,
        *,
        patience: float = 30.0,
        observe: Callable[[int, int], None] = lambda resident, written: None,
    ) -> None:
        self.capacity = len(rows)
        self.writes = 0
        """Number of successful writes."""
        self._observe = observe
        self._free = list(reversed(rows))
        self._write = write
        self._patience = patience
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._idle = 0
        """Number of rows of residents without users."""
        self._waiting: dict[_Request, None] = {}
        """Requests that wait for rows, in order of arrival."""
        self._overtakes = 0
        """Requests that overtook the first of the queue since it became first, or since its last time alone."""
        self._exclusive: asyncio.TimerHandle | None = None

    @property
    def resident(self) -> int:
        """Number of tokens in rows."""
        return len(self._residents)

    async def lease(self, parts: Sequence[tuple[str, Any]], *, wait: bool = True) -> Lease:
        """A lease on the rows of the tokens in `parts`: digest and vectors [k, hidden_size] of each.

        Writes the tokens that are not in rows. A request holds no rows while it waits; it gets all its rows
        together. A request whose tokens are all in rows never waits for rows. Raises TooManyVectors if the
        vectors exceed the rows of this process. Raises RowsBusy if too few rows became free within `patience`
        seconds (at once without `wait`), or if the write then takes more than `patience` seconds.
        """
        request = _Request([digest for digest, _ in parts], dict(parts))
        k = sum(map(len, request.vectors.values()))
        if k > self.capacity:
            raise too_many_vectors(k, self.capacity)
        lease = self._grant(request, first=not self._waiting)
        if lease is None:
            lease = await self._wait_for_grant(request) if wait else None
        if lease is None:
            raise RowsBusy(
                f"Too few of the {self.capacity} rows of this server process are free: running requests use them, or "
                "an earlier request waits for them; please try again later. Operators: raise --be-rows."
            )
        try:
            if not await lease.written(self._patience):
                raise RowsBusy("The engine did not write the token into its rows in time; please try again.")
        except BaseException:
            lease.release()
            raise
        return lease

    def enter(self, resident: _Resident) -> None:
        """Add one user to a resident. Called by leases."""
        if not resident.users:
            self._idle -= len(resident.rows)
        resident.users += 1

    def leave(self, residents: Sequence[_Resident]) -> None:
        """Remove one user from each resident. Called by leases. All rows that become idle are then offered together."""
        for resident in residents:
            resident.users -= 1
            if not resident.users:
                self._idle += len(resident.rows)
        if not all(resident.users for resident in residents):
            self._grant_waiting()

    def _grant(self, request: _Request, *, first: bool) -> Lease | None:
        """A lease whose writes have begun, or None if too few rows are free or the request may not overtake."""
        missing = {digest: vectors for digest, vectors in request.vectors.items() if digest not in self._residents}
        if missing:
            if not first and (self._overtakes >= _MAX_OVERTAKES or len(self._waiting) > _MAX_TRIED):
                return None
            if not self._make_room(sum(map(len, missing.values())), keep=request.vectors):
                return None
            if not first:
                self._count_overtake()
        for digest, vectors in missing.items():
            self._begin_writing(digest, vectors)
        for digest in request.vectors:
            self._residents.move_to_end(digest)
        return Lease(self, [self._residents[digest] for digest in request.digests])

    async def _wait_for_grant(self, request: _Request) -> Lease | None:
        """Wait in the queue for a lease. Returns None after `patience` seconds."""
        request.granted = asyncio.get_running_loop().create_future()
        self._waiting[request] = None
        try:
            await asyncio.wait([request.granted], timeout=self._patience)
        except BaseException:
            if request.granted.done():
                request.granted.result().release()
            raise
        finally:
            self._leave_queue(request)
        return request.granted.result() if request.granted.done() else None

    def _grant_waiting(self) -> None:
        """Give free rows to the waiting requests, in order."""
        refused = 0
        for request in list(self._waiting):
            first = next(iter(self._waiting)) is request
            if lease := self._grant(request, first=first):
                del self._waiting[request]
                request.granted.set_result(lease)
                if first:
                    self._reset_overtakes()
            elif (refused := refused + 1) > _MAX_TRIED:
                break

    def _leave_queue(self, request: _Request) -> None:
        if request in self._waiting:
            first = next(iter(self._waiting)) is request
            del self._waiting[request]
            if first:
                self._reset_overtakes()
                self._grant_waiting()

    def _reset_overtakes(self) -> None:
        self._overtakes = 0
        if self._exclusive:
            self._exclusive.cancel()
            self._exclusive = None

    def _count_overtake(self) -> None:
        self._overtakes += 1
        if self._overtakes >= _MAX_OVERTAKES:
            self._exclusive = asyncio.get_running_loop().call_later(
                _EXCLUSIVE_SECONDS, self._end_exclusive, context=Context()
            )

    def _end_exclusive(self) -> None:
        self._reset_overtakes()
        self._grant_waiting()

    def _begin_writing(self, digest: str, vectors: Any) -> None:
        resident = _Resident([self._free.pop() for _ in range(len(vectors))])
        self._residents[digest] = resident
        # An empty context: a task keeps its context alive, and this one would keep the request that began the write.
        resident.written = asyncio.create_task(self._write(resident.rows, vectors), context=Context())
        resident.written.add_done_callback(partial(self._end_writing, digest, resident), context=Context())

    def _end_writing(self, digest: str, resident: _Resident, task: asyncio.Task[None]) -> None:
        done = not task.cancelled() and task.exception() is None
        self.writes += done
        if not done:
            # The failed write may still arrive. Writes arrive in order, so the rows' next token overwrites it.
            del self._residents[digest]
            self._free += resident.rows
            resident.rows = []
        if task.cancelled():  # the event loop is closing
            resident.users -= 1
        else:
            self.leave([resident])
        self._observe(len(self._residents), int(done))

    def _make_room(self, k: int, keep: Collection[str] = ()) -> bool:
        """Free k rows: remove tokens without users, least recently used first, but none of `keep`.

        Returns False, and removes nothing, if that cannot free k rows.
        """
        kept = [found for digest in keep if (found := self._residents.get(digest)) and not found.users]
        if len(self._free) + self._idle - sum(len(found.rows) for found in kept) < k:
            return False
        for digest, found in list(self._residents.items()) if len(self._free) < k else []:
            if not found.users and digest not in keep:
                self._free += self._residents.pop(digest).rows
                self._idle -= len(found.rows)
                if len(self._free) >= k:
                    break
        return True
