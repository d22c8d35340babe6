"""Measures be-serve's own work on one request: wall time and processor time."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from time import perf_counter, thread_time
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Cost:
    """Sums `wall` seconds, which include waiting, and `cpu` seconds, in which a thread had the processor.

    On a busy machine `wall` also depends on other threads: a thread that loses the processor or
    Python's lock during its work gets it back milliseconds later.
    """

    def __init__(self) -> None:
        self.wall = 0.0
        self.cpu = 0.0

    @contextmanager
    def of_block(self) -> Iterator[None]:
        """Add the time of the block. The block must not await: the work of other tasks would count."""
        wall, cpu = perf_counter(), thread_time()
        try:
            yield
        finally:
            self.cpu += thread_time() - cpu
            self.wall += perf_counter() - wall

    async def of(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, whose time is added. While `work` waits, only `wall` grows."""
        begin = perf_counter()
        try:
            return await _TimedSteps(self, work)
        finally:
            self.wall += perf_counter() - begin


class _TimedSteps(Generic[T]):
    """An awaitable that runs a coroutine and measures the processor time between its suspensions."""

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
            except BaseException as exc:  # a cancellation or a failed await: the coroutine must handle it
                step, given = self._work.throw, exc
