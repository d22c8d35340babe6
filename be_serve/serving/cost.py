"""What our own work on one request costs, on the clock and on the processor."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from time import perf_counter, thread_time
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Cost:
    """Seconds of `wall` time, waiting included, and of `cpu` time, in which a thread really worked.

    On a busy machine the first also tells of others: a thread that lost the processor or
    Python's lock in the middle of its work gets it back milliseconds later.
    """

    def __init__(self) -> None:
        self.wall = 0.0
        self.cpu = 0.0

    @contextmanager
    def of_block(self) -> Iterator[None]:
        """Add what the block costs. It must not await: other tasks' work would count."""
        wall, cpu = perf_counter(), thread_time()
        try:
            yield
        finally:
            self.cpu += thread_time() - cpu
            self.wall += perf_counter() - wall

    async def of(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Its waiting adds wall time alone, and what other tasks do meanwhile no `cpu`."""
        begin = perf_counter()
        try:
            return await _Steps(self, work)
        finally:
            self.wall += perf_counter() - begin


class _Steps(Generic[T]):
    """A coroutine whose steps are timed, from one suspension to the next."""

    def __init__(self, cost: Cost, work: Coroutine[Any, Any, T]) -> None:
        self._cost, self._work = cost, work

    def __await__(self) -> Generator[Any, Any, T]:
        step: Any = self._work.send
        given: Any = None
        while True:
            begin = thread_time()
            try:
                awaited = step(given)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                self._cost.cpu += thread_time() - begin
            try:
                step, given = self._work.send, (yield awaited)
            except BaseException as exc:  # cancelled, or what was waited for failed: the work's own to handle
                step, given = self._work.throw, exc
