"""A bound on the memory that injected tensors may hold at one time in a server process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from be_serve.core.errors import OverBudget


class ByteBudget:
    """Counts bytes taken and given back; refuses what would exceed `capacity`.

    A tensor [T, hidden_size] goes to the engine for each request and waits there with
    it: without a bound, short requests could claim any amount of memory. `observe` is
    told the bytes in use after every change.
    """

    def __init__(self, capacity: int, observe: Callable[[int], None] = lambda used: None) -> None:
        self.capacity = capacity
        self._observe = observe
        self.used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Claim `size` bytes. Raises OverBudget."""
        with self._lock:
            if self.used + size > self.capacity:
                raise OverBudget(
                    f"Requests with tokens hold {self.used} of {self.capacity} bytes on this server; please try again "
                    "later. Operators: --be-inflight-bytes."
                )
            self.used += size
            self._observe(self.used)

    def give_back(self, size: int) -> None:
        """Return what `take` claimed."""
        with self._lock:
            self.used -= size
            self._observe(self.used)
