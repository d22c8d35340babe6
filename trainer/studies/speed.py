"""How fast the trainer is beside the loop that one would write first.

    PlainLoop   Algorithm 1 of the paper as it stands: teacher and student forward in
                every step, the logits of all positions in float32
    Trained     what `be-serve train` does: teacher states from a cache, logits of the
                response alone, chunk by chunk

Both see the same batches and take the same optimiser step, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from be_serve.core.errors import InputError
from trainer.data.teacher import Example, Teacher
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import Row, SoftToken, splice
from trainer.optim.losses import kl_divergence
from trainer.optim.objectives import Distil, part_losses

ARMS = ("plain", "be-serve")


class Loop(Protocol):
    """One training step's loss and gradient on a batch of examples."""

    def loss(self, vectors_KH: Tensor, step: int) -> Tensor:
        """Mean KL of the batch of `step`."""
        ...


class PlainLoop:
    """Algorithm 1: both conditions through the whole model and head, in every step."""

    def __init__(self, teacher: Teacher, distil: Distil) -> None:
        self.model = teacher.model
        self.distil = distil
        self._full = [Row(teacher.chat_ids(e.query), (), e.response) for e in distil.examples]

    def loss(self, vectors_KH: Tensor, step: int) -> Tensor:
        batch = self.distil.plan(step)
        with torch.no_grad():
            teacher_NV = self._logits([self._full[i] for i in batch], None)
        return kl_divergence(teacher_NV, self._logits([self.distil.rows[i] for i in batch], vectors_KH)).mean()

    def _logits(self, rows: Sequence[Row], vectors_KH: Tensor | None) -> Tensor:
        inputs_BTH, scored_N = splice(self.model, rows, vectors_KH)
        logits_BTV = self.model.causal_lm(inputs_embeds=inputs_BTH, use_cache=False).logits.float()
        return logits_BTV.flatten(0, 1)[scored_N]


class Trained:
    """A step of `be-serve train`."""

    def __init__(self, model: FrozenModel, distil: Distil) -> None:
        self.model = model
        self.distil = distil

    def loss(self, vectors_KH: Tensor, step: int) -> Tensor:
        return part_losses(self.model, self.distil.parts(vectors_KH, step))[0]


@dataclass(frozen=True)
class Measured:
    """Seconds and losses of each arm's steps, and the student positions that one step feeds."""

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    positions: list[int]
    teacher_seconds: float
    """Wall time of the cached teacher states of one example."""

    def to_json(self, steps: int, batch: int, examples: int) -> dict[str, Any]:
        """Medians, their ratio, and the ratio with the cache's cost spread over a run of `steps`."""
        median = {arm: statistics.median(self.seconds[arm]) for arm in self.seconds}
        positions = statistics.mean(self.positions)
        found: dict[str, Any] = {
            "arms": {
                arm: {"step_seconds": median[arm], "tokens_per_second": positions / median[arm]} for arm in median
            },
            "positions_a_step": positions,
            "teacher_seconds_an_example": self.teacher_seconds,
        }
        if len(median) == 2:
            ratios = [a / b for a, b in zip(self.seconds["plain"], self.seconds["be-serve"], strict=True)]
            cache = self.teacher_seconds * min(examples, steps * batch) / steps
            found["speed_up"] = statistics.median(ratios)
            found["speed_up_with_cache"] = median["plain"] / (median["be-serve"] + cache)
            found["largest_loss_difference"] = max(
                abs(a - b) for a, b in zip(self.losses["plain"], self.losses["be-serve"], strict=True)
            )
        return {**found, "seconds": self.seconds}


def measure(
    teacher: Teacher,
    examples: Sequence[Example],
    start_KH: Tensor,
    *,
    steps: int,
    batch_size: int,
    arms: Sequence[str] = ARMS,
    lr: float = 1e-2,
) -> Measured:
    """Time `steps` steps of each arm in turns, each on its own copy of the vectors, after one warm-up step.

    Raises InputError for an unknown arm.
    """
    model = teacher.model
    distil = Distil(model, examples, batch_size=batch_size)
    made: dict[str, Loop] = {"plain": PlainLoop(teacher, distil), "be-serve": Trained(model, distil)}
    if unknown := [arm for arm in arms if arm not in made]:
        raise InputError(f"No arm {unknown[0]!r}; choose of {', '.join(ARMS)}.")
    tokens = {arm: SoftToken(start_KH) for arm in arms}
    optimisers = {arm: torch.optim.AdamW([tokens[arm].vectors], lr=lr) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    losses: dict[str, list[float]] = {arm: [] for arm in arms}
    positions = []
    for step in range(steps + 1):
        batch = distil.plan(step)
        for arm in arms if step % 2 else reversed(arms):
            began = time.perf_counter()
            loss = made[arm].loss(tokens[arm].vectors, step)
            loss.backward()
            optimisers[arm].step()
            optimisers[arm].zero_grad()
            value = loss.item()  # waits for the device
            if step:
                seconds[arm].append(time.perf_counter() - began)
                losses[arm].append(value)
        if step:
            positions.append(sum(distil.rows[i].length(len(start_KH)) for i in batch))
    return Measured(seconds, losses, positions, _teacher_seconds(teacher, examples[:batch_size]))


def _teacher_seconds(teacher: Teacher, examples: Sequence[Example]) -> float:
    """Time of the states of one example, given its response: what the cache costs beyond the response itself."""
    from trainer.model.generate import Prefix, common_prefix

    chats = [teacher.chat_ids(e.query) for e in examples]
    shared = common_prefix(chats)
    prefix = Prefix(teacher.model, teacher.model.embed(chats[0][:shared]))
    rows = [Row((), chat[shared:], e.response) for chat, e in zip(chats, examples, strict=True)]
    began = time.perf_counter()
    prefix.states(rows)
    return (time.perf_counter() - began) / len(examples)
