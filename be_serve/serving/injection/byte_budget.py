"""Limits the memory that injected tensors hold at one time in a server process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from be_serve.core.errors import OverBudget


class ByteBudget:
    """Counts the bytes in use, and refuses a claim that would exceed `capacity`.

    Each request sends a tensor [T, hidden_size] to the engine, and the tensor stays in memory while the
    request waits there. Without a limit, many short requests could use any amount of memory.
    `observe` is called with the bytes in use after every change.
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
                    f"Running requests with tokens hold {self.used} of {self.capacity} bytes in this server process; "
                    "please try again later. Operators: raise --be-inflight-bytes."
                )
            self.used += size
            self._observe(self.used)

    def give_back(self, size: int) -> None:
        """Release `size` bytes that `take` claimed."""
        with self._lock:
            self.used -= size
            self._observe(self.used)
