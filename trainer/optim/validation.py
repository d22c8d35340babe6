"""Which step's vectors are the best: divergence on queries that train nothing and that no report is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.optim.objectives import Distil, part_losses

CHECKS = 8
"""How often the vectors are measured over the last stage."""
LEAST = 8
"""Fewer queries than this would choose a step by chance."""
_ROWS = 4
"""Answers in one forward pass."""


@dataclass(frozen=True)
class Best:
    """The vectors [k, H] of the step with the lowest divergence (nats a token) on the validation queries."""

    kl: float
    step: int
    """Steps of its stage that were done."""
    vectors_KH: Tensor


class Validation:
    """KL(full || vectors) on validation queries, so many times over the last stage."""

    def __init__(self, distil: Distil, *, checks: int = CHECKS) -> None:
        """`distil` holds the validation examples; its batches are not used."""
        self.distil = distil
        self._checks = checks

    def due(self, step: int, steps: int) -> bool:
        """Whether the vectors are measured after step 1, 2, ... of `steps`: at equal distances, and at the end."""
        return step % max(1, steps // self._checks) == 0 or step == steps

    def divergence(self, vectors_KH: Tensor) -> float:
        """Mean KL, nats a token."""
        total, count, rows = 0.0, 0, range(len(self.distil.examples))
        with torch.no_grad():
            for begin in rows[::_ROWS]:
                batch = rows[begin : begin + _ROWS]
                [kl] = part_losses(self.distil.model, [self.distil.part(vectors_KH, batch)])
                tokens = sum(len(self.distil.examples[i].response) for i in batch)
                total, count = total + float(kl) * tokens, count + tokens
        return total / count
