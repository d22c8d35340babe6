"""Which examples make the batch of each step. Plans know lengths and divergences, and nothing of models."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_SORTED_BATCHES = 8
_REDRAWN = 4
"""A quarter of the examples are drawn at a time, by the divergences that are known then."""
_FOCUS = 0.7
_AT_LEAST = 1.0
"""Nats that every example is taken to have: none is forgotten."""


class BatchPlan:
    """Which examples make the batch of a step: shuffled by the seed, of similar length, nothing twice an epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._size = min(batch_size, len(lengths))
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __call__(self, step: int) -> list[int]:
        """Indices of the examples of step 0, 1, ..."""
        epoch, at = divmod(step, len(self._lengths) // self._size)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, list(self._shuffle(epoch))
        return self._batches[at]

    def _shuffle(self, epoch: int) -> Iterator[list[int]]:
        rng = random.Random(f"{self._seed}/{epoch}")  # noqa: S311
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        order = order[: len(order) // self._size * self._size]
        batches = []
        pool = self._size * _SORTED_BATCHES
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda i: self._lengths[i])
            batches += [part[i : i + self._size] for i in range(0, len(part), self._size)]
        rng.shuffle(batches)
        yield from batches


class FocusedPlan:
    """Each example once, then those more often on which the token is farthest from the teacher.

    On many a message a prompt bears little, and a token is right after one look. A later batch is drawn without
    replacement, by the divergence [nats] that an example had when it was last seen.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.divergence: list[float | None] = [None] * len(lengths)
        """KL of each example's whole response when it was last seen, in nats."""
        self._lengths = lengths
        self._size = min(batch_size, len(lengths))
        self._rng = random.Random(f"focused {seed}")  # noqa: S311
        self._first = BatchPlan(lengths, batch_size, seed)
        self._steps: list[list[int]] = []
        self._queue: list[list[int]] = []

    def __call__(self, step: int) -> list[int]:
        """Indices of the examples of a step: one that was planned already, or the next."""
        if step < len(self._lengths) // self._size:
            return self._first(step)
        planned = step - len(self._lengths) // self._size
        while planned >= len(self._steps):
            self._queue = self._queue or self._draw()
            self._steps.append(self._queue.pop())
        return self._steps[planned]

    def _draw(self) -> list[list[int]]:
        count = max(self._size, len(self._lengths) // _REDRAWN // self._size * self._size)
        # What no batch had room for yet counts as the farthest.
        farthest = max((found for found in self.divergence if found is not None), default=0.0)
        known = [farthest if found is None else found for found in self.divergence]
        weights = [(divergence + _AT_LEAST) ** _FOCUS for divergence in known]
        # Efraimidis and Spirakis, 2006: the largest u^(1/w) are a sample without replacement by weight.
        keys = [self._rng.random() ** (1 / weight) for weight in weights]
        drawn = sorted(range(len(keys)), key=lambda i: -keys[i])[:count]
        drawn.sort(key=lambda i: self._lengths[i])
        batches = [drawn[i : i + self._size] for i in range(0, count, self._size)]
        self._rng.shuffle(batches)
        return batches
