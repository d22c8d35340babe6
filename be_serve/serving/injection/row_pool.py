"""Which token's vectors lie in which row of the workers' side table. No vLLM here.

Each server process owns a range of rows and counts the requests that use each
token. A token that is asked for and not resident takes the rows of those that were
used longest ago; rows of a request in flight are never rewritten, for a preempted
request is embedded again.

Who gets which rows is decided at once, without waiting for anything, so that nobody
can come between a request and the rows that were found for it. Only the writing
takes time. Where there is no room, requests wait in a queue, and whatever becomes
free is given to them from there.
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
_PASSED = 32
"""How many requests that fit may pass the first of the queue before it is alone for `_ALONE` seconds."""
_ALONE = 3.0
_LOOKS = 128
"""How far into the queue room is looked for, since thousands may wait. A queue of more is overtaken by nobody."""


def too_many_vectors(k: int, capacity: int) -> TooManyVectors:
    """The refusal of `k` vectors where a server process has `capacity` rows."""
    return TooManyVectors(
        f"The token has {k} vectors; this server process has {capacity} rows for tokens. Operators: --be-rows.",
        param="be_id",
    )


@dataclass(eq=False)
class _Resident:
    """A token whose vectors lie in `rows`, or are being written there, and how many use it."""

    rows: list[int]
    users: int = 1
    """The write that brings the vectors counts as one."""
    written: asyncio.Task[None] = field(init=False)


@dataclass(eq=False)
class _Request:
    """What a request asks for."""

    digests: Sequence[str]
    """In order; a token may stand in it more than once."""
    vectors: dict[str, Any]
    granted: asyncio.Future[Lease] = field(init=False)
    """For a request that waits."""


class Lease:
    """The right of one request to `rows`, those of its tokens in order."""

    def __init__(self, pool: RowPool, residents: Sequence[_Resident]) -> None:
        self._pool, self._residents = pool, residents
        self.rows = [row for resident in residents for row in resident.rows]
        self._held = True
        for resident in residents:
            pool.enter(resident)

    def renew(self) -> Lease:
        """A second right to the same rows, with a life of its own. The first must still be held."""
        if not self._held:
            raise RuntimeError("A lease that was released cannot be renewed.")
        return Lease(self._pool, self._residents)

    def release(self) -> None:
        """Let the rows be rewritten once no other lease is on them. May be called more than once."""
        if self._held:
            self._held = False
            self._pool.leave(self._residents)

    async def written(self, patience: float) -> bool:
        """Whether the vectors are in the rows within `patience` seconds. Raises what kept them from it."""
        writes = {resident.written for resident in self._residents}
        for ended in [write for write in writes if write.done()]:
            ended.result()  # one that failed a moment ago has not given its rows back yet
            writes.remove(ended)
        if not writes:
            return True
        # `wait` cancels none: others may have leased the same token, whose write does not end with this request.
        done, pending = await asyncio.wait(writes, timeout=patience)
        for write in done:
            write.result()
        return not pending


class RowPool:
    """Rows of the side table that belong to this process.

    `write` puts vectors [n, hidden_size] into rows on every worker, and returns when
    they are there; calls reach the workers in the order in which they are made. `observe`
    is told, after each write, the number of resident tokens and how many tokens were written:
    1, or 0 for a write that failed. One event loop; not for threads.
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
        """How often vectors were written into rows."""
        self._observe = observe
        self._free = list(reversed(rows))
        self._write = write
        self._patience = patience
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # the longest unused first
        self._idle = 0
        """Rows of residents that nobody uses."""
        self._waiting: dict[_Request, None] = {}
        """Requests that wait for room, first come, first served."""
        self._passed = 0
        """Requests that took rows past the first that waits, since it is the first or was last alone."""
        self._alone: asyncio.TimerHandle | None = None

    @property
    def resident(self) -> int:
        """Number of tokens that lie in rows."""
        return len(self._residents)

    async def lease(self, parts: Sequence[tuple[str, Any]], *, wait: bool = True) -> Lease:
        """The rows of tokens, each a digest and its vectors [k, hidden_size]; written where they are not resident.

        All or none: nothing is held while waiting. A request whose tokens are resident
        never waits for room. Raises TooManyVectors where the vectors exceed the rows of this
        process, RowsBusy where too few became free within `patience` seconds, at once without `wait`,
        or where the engine does not take the vectors within as many seconds more.
        """
        request = _Request([digest for digest, _ in parts], dict(parts))
        k = sum(map(len, request.vectors.values()))
        if k > self.capacity:
            raise too_many_vectors(k, self.capacity)
        lease = self._grant(request, first=not self._waiting)
        if lease is None:
            lease = await self._granted(request) if wait else None
        if lease is None:
            raise RowsBusy(
                f"All {self.capacity} rows of this server process are used by requests in flight, or kept for one that "
                "waits for many; please try again later. Operators: --be-rows."
            )
        try:
            if not await lease.written(self._patience):
                raise RowsBusy("The engine did not take the token into its memory in time; please try again.")
        except BaseException:
            lease.release()
            raise
        return lease

    def enter(self, resident: _Resident) -> None:
        """For leases: one user more."""
        if not resident.users:
            self._idle -= len(resident.rows)
        resident.users += 1

    def leave(self, residents: Sequence[_Resident]) -> None:
        """For leases: one user less of each. What becomes idle with them is given away as one."""
        for resident in residents:
            resident.users -= 1
            if not resident.users:
                self._idle += len(resident.rows)
        if not all(resident.users for resident in residents):
            self._serve()

    def _grant(self, request: _Request, *, first: bool) -> Lease | None:
        """A lease, if there is room for what is missing and it may have it; the writes have begun then."""
        missing = {digest: vectors for digest, vectors in request.vectors.items() if digest not in self._residents}
        if missing:
            if not first and (self._passed >= _PASSED or len(self._waiting) > _LOOKS):
                return None
            if not self._make_room(sum(map(len, missing.values())), keep=request.vectors):
                return None
            if not first:
                self._pass()
        for digest, vectors in missing.items():
            self._begin_writing(digest, vectors)
        for digest in request.vectors:
            self._residents.move_to_end(digest)
        return Lease(self, [self._residents[digest] for digest in request.digests])

    async def _granted(self, request: _Request) -> Lease | None:
        """The lease that the request is given in its turn, or None once its patience is at an end."""
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

    def _serve(self) -> None:
        """Give what is free to those who wait, in their order."""
        refused = 0
        for request in list(self._waiting):
            first = next(iter(self._waiting)) is request
            if lease := self._grant(request, first=first):
                del self._waiting[request]
                request.granted.set_result(lease)
                if first:
                    self._new_first()
            elif (refused := refused + 1) > _LOOKS:
                break

    def _leave_queue(self, request: _Request) -> None:
        if request in self._waiting:
            first = next(iter(self._waiting)) is request
            del self._waiting[request]
            if first:
                self._new_first()
                self._serve()

    def _new_first(self) -> None:
        self._passed = 0
        if self._alone:
            self._alone.cancel()
            self._alone = None

    def _pass(self) -> None:
        self._passed += 1
        if self._passed >= _PASSED:
            self._alone = asyncio.get_running_loop().call_later(_ALONE, self._let_pass, context=Context())

    def _let_pass(self) -> None:
        self._new_first()
        self._serve()

    def _begin_writing(self, digest: str, vectors: Any) -> None:
        resident = _Resident([self._free.pop() for _ in range(len(vectors))])
        self._residents[digest] = resident
        # In a context of its own: a task keeps its context, and with it the request that began the write.
        resident.written = asyncio.create_task(self._write(resident.rows, vectors), context=Context())
        resident.written.add_done_callback(partial(self._end_writing, digest, resident), context=Context())

    def _end_writing(self, digest: str, resident: _Resident, task: asyncio.Task[None]) -> None:
        done = not task.cancelled() and task.exception() is None
        self.writes += done
        if not done:
            # It may still land. Writes reach the workers in order, so the rows' next owner comes after it.
            del self._residents[digest]
            self._free += resident.rows
            resident.rows = []
        if task.cancelled():  # the loop is about to end
            resident.users -= 1
        else:
            self.leave([resident])
        self._observe(len(self._residents), int(done))

    def _make_room(self, k: int, keep: Collection[str] = ()) -> bool:
        """Whether k rows are free, after giving up tokens that nobody uses, the longest unused first; not `keep`."""
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
