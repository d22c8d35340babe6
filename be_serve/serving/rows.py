"""Which token's vectors lie in which row of the workers' side table. No vLLM here.

Each server process owns a range of rows and counts the requests that use each
token. A token that is asked for and not resident takes the rows of those that were
used longest ago; rows of a request in flight are never rewritten, for a preempted
request is embedded again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from be_serve.core.errors import BEError, UnsupportedRequest

Write = Callable[[list[int], Any], Awaitable[None]]


class TooManyVectors(UnsupportedRequest):
    """A token, or several in one request, that no server of this size can hold."""

    http_status = 422
    code = "be_too_many_vectors"


class RowsBusy(BEError):
    """Every row is used by requests in flight; the client may try again."""

    http_status = 503
    code = "be_rows_busy"


@dataclass
class _Resident:
    """A token whose vectors lie in `rows`, and how many requests use it."""

    rows: list[int]
    users: int = 0


class Lease:
    """The right of one request to `rows`."""

    def __init__(self, pool: RowPool, resident: _Resident) -> None:
        self._pool, self._resident = pool, resident
        self.rows = resident.rows
        self._held = True
        resident.users += 1

    def renew(self) -> Lease:
        """A second right to the same rows, with a life of its own. The first must still be held."""
        if not self._held:
            raise RuntimeError("A lease that was released cannot be renewed.")
        return Lease(self._pool, self._resident)

    def release(self) -> None:
        """Let the rows be rewritten once no other lease is on them. May be called more than once."""
        if self._held:
            self._held = False
            self._pool.leave(self._resident)


class RowPool:
    """Rows of the side table that belong to this process.

    `write` puts vectors [n, hidden_size] into rows on every worker, and returns when
    they are there. `observe` is told the number of resident tokens after each write.
    One event loop; not for threads.
    """

    def __init__(
        self,
        rows: Sequence[int],
        write: Write,
        *,
        patience: float = 30.0,
        observe: Callable[[int], None] = lambda resident: None,
    ) -> None:
        self.capacity = len(rows)
        self.writes = 0
        """How often vectors were written into rows."""
        self._observe = observe
        self._free = list(reversed(rows))
        self._write = write
        self._patience = patience
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # the longest unused first
        self._writing = asyncio.Lock()  # first come, first served
        self._freed = asyncio.Event()

    @property
    def resident(self) -> int:
        """Number of tokens that lie in rows."""
        return len(self._residents)

    async def lease(self, digest: str, vectors: Any, *, wait: bool = True) -> Lease:
        """The rows of a token's vectors [k, hidden_size], written if they are not resident.

        Raises TooManyVectors where k exceeds the rows of this process, RowsBusy where
        none became free within `patience` seconds, at once without `wait`.
        """
        k = len(vectors)
        if k > self.capacity:
            raise TooManyVectors(
                f"The token has {k} vectors; this server process has {self.capacity} rows for tokens. "
                "Operators: --be-rows.",
                param="be_id",
            )
        found = self._residents.get(digest)
        if found is None:
            found = await self._in_turn(digest, vectors, k, self._patience if wait else 0.0)
        self._residents.move_to_end(digest)
        return Lease(self, found)

    def leave(self, resident: _Resident) -> None:
        """For leases: one user less."""
        resident.users -= 1
        if not resident.users:
            self._freed.set()

    async def _in_turn(self, digest: str, vectors: Any, k: int, patience: float) -> _Resident:
        """The token's rows, once it is this request's turn and there is room. Only the waiting has a limit."""
        busy = RowsBusy(
            f"All {self.capacity} rows of this server process are used by requests in flight; please try again later. "
            "Operators: --be-rows."
        )
        try:
            async with asyncio.timeout(patience) as limit, self._writing:
                while digest not in self._residents and not self._make_room(k):
                    if not patience:
                        raise busy
                    self._freed.clear()
                    await self._freed.wait()
                limit.reschedule(None)
                return self._residents.get(digest) or await self._admit(digest, vectors, k)
        except TimeoutError:
            raise busy from None

    async def _admit(self, digest: str, vectors: Any, k: int) -> _Resident:
        rows = [self._free.pop() for _ in range(k)]
        try:
            await self._write(rows, vectors)
        except BaseException:
            # The write may still land. Writes reach the workers in order, so the rows' next owner comes after it.
            self._free += rows
            raise
        found = self._residents[digest] = _Resident(rows)
        self.writes += 1
        self._observe(len(self._residents))
        return found

    def _make_room(self, k: int) -> bool:
        """Whether k rows are free, after giving up tokens that no request uses, the longest unused first."""
        idle = [digest for digest, found in self._residents.items() if not found.users]
        if len(self._free) + sum(len(self._residents[digest].rows) for digest in idle) < k:
            return False
        for digest in idle:
            if len(self._free) >= k:
                break
            self._free += self._residents.pop(digest).rows
        return True
