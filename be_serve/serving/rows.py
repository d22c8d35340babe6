"""Which token's vectors lie in which row of the workers' side table. No vLLM here.

Each server process owns a range of rows and counts the requests that use each
token. A token that is asked for and not resident takes the rows of those that were
used longest ago; rows of a request in flight are never rewritten, for a preempted
request is embedded again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from be_serve.core.errors import BEError, UnsupportedRequest

Write = Callable[[list[int], Any], Awaitable[None]]
_PASSED = 32
"""How many requests that fit may pass one that waits for more room, until it has been alone for `_ALONE` seconds."""
_ALONE = 3.0


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
    """The right of one request to `rows`, those of its tokens in order."""

    def __init__(self, pool: RowPool, residents: Sequence[_Resident]) -> None:
        self._pool, self._residents = pool, residents
        self.rows = [row for resident in residents for row in resident.rows]
        self._held = True
        for resident in residents:
            resident.users += 1

    def renew(self) -> Lease:
        """A second right to the same rows, with a life of its own. The first must still be held."""
        if not self._held:
            raise RuntimeError("A lease that was released cannot be renewed.")
        return Lease(self._pool, self._residents)

    def release(self) -> None:
        """Let the rows be rewritten once no other lease is on them. May be called more than once."""
        if self._held:
            self._held = False
            for resident in self._residents:
                self._pool.leave(resident)


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
        self._writing = asyncio.Lock()
        self._waiting: list[asyncio.Event] = []
        """Requests that wait for room, first come, first served; an event says that its request may look again."""
        self._passed = 0

    @property
    def resident(self) -> int:
        """Number of tokens that lie in rows."""
        return len(self._residents)

    async def lease(self, parts: Sequence[tuple[str, Any]], *, wait: bool = True) -> Lease:
        """The rows of tokens, each a digest and its vectors [k, hidden_size]; written where they are not resident.

        All or none: nothing is held while waiting. Raises TooManyVectors where the
        vectors exceed the rows of this process, RowsBusy where too few became free
        within `patience` seconds, at once without `wait`.
        """
        wanted = dict(parts)
        k = self._rows_of(wanted)
        if k > self.capacity:
            raise TooManyVectors(
                f"The token has {k} vectors; this server process has {self.capacity} rows for tokens. "
                "Operators: --be-rows.",
                param="be_id",
            )
        if any(digest not in self._residents for digest in wanted):
            await self._in_turn(wanted, wait=wait)
        for digest in wanted:
            self._residents.move_to_end(digest)
        return Lease(self, [self._residents[digest] for digest, _ in parts])

    def leave(self, resident: _Resident) -> None:
        """For leases: one user less."""
        resident.users -= 1
        if not resident.users:
            self._look_again(0)

    async def _in_turn(self, wanted: dict[str, Any], *, wait: bool) -> None:
        """Make the tokens resident, once there is room and nobody waits too long for it. Only the waiting has a limit.

        Without `wait` it may wait for others' writes, which take milliseconds, and not for room.
        """
        busy = RowsBusy(
            f"All {self.capacity} rows of this server process are used by requests in flight; please try again later. "
            "Operators: --be-rows."
        )
        turn = asyncio.Event()
        try:
            async with asyncio.timeout(self._patience) as limit:
                while True:
                    async with self._writing:
                        missing = self._missing(wanted)
                        if not missing:
                            return
                        first = not self._waiting or self._waiting[0] is turn
                        if (first or self._passed < _PASSED) and self._make_room(self._rows_of(missing), keep=wanted):
                            limit.reschedule(None)
                            if not first:
                                self._pass()
                            for digest, vectors in missing.items():
                                await self._admit(digest, vectors)
                            return
                        if not wait:
                            raise busy
                        if turn not in self._waiting:
                            self._waiting.append(turn)
                        turn.clear()
                        if self._waiting[0] is turn:
                            self._look_again(1)  # for less room
                    await turn.wait()
        except TimeoutError:
            raise busy from None
        finally:
            self._leave_queue(turn)

    def _pass(self) -> None:
        self._passed += 1
        if self._passed == _PASSED:
            asyncio.get_running_loop().call_later(_ALONE, self._let_pass)

    def _let_pass(self) -> None:
        self._passed = 0
        self._look_again(0)

    def _look_again(self, place: int) -> None:
        """Tell the request at a place of the queue. One after another, for each look goes through all tokens."""
        if place < len(self._waiting):
            self._waiting[place].set()

    def _leave_queue(self, turn: asyncio.Event) -> None:
        if turn in self._waiting:
            place = self._waiting.index(turn)
            del self._waiting[place]
            self._look_again(place)

    @staticmethod
    def _rows_of(tokens: dict[str, Any]) -> int:
        return sum(map(len, tokens.values()))

    def _missing(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {digest: vectors for digest, vectors in wanted.items() if digest not in self._residents}

    async def _admit(self, digest: str, vectors: Any) -> None:
        rows = [self._free.pop() for _ in range(len(vectors))]
        try:
            await self._write(rows, vectors)
        except BaseException:
            # The write may still land. Writes reach the workers in order, so the rows' next owner comes after it.
            self._free += rows
            raise
        self._residents[digest] = _Resident(rows)
        self.writes += 1
        self._observe(len(self._residents))

    def _make_room(self, k: int, keep: Container[str] = ()) -> bool:
        """Whether k rows are free, after giving up tokens that nobody uses, the longest unused first; not `keep`."""
        idle = [digest for digest, found in self._residents.items() if not found.users and digest not in keep]
        if len(self._free) + sum(len(self._residents[digest].rows) for digest in idle) < k:
            return False
        for digest in idle:
            if len(self._free) >= k:
                break
            self._free += self._residents.pop(digest).rows
        return True
