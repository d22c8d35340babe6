"""The objectives, small classes of one shape: `loss(vectors, step)` gives the loss of a step's batch.

    Autoencode    stage 0, Eq. 1   trains [AE]
    Reconstruct   stage 1, Eq. 2   trains [BE] through a frozen [AE]
    Distil        stage 2, Eq. 3   trains [BE] on the teacher's responses
    Joint         Eq. 4            stages 1 and 2 in one step

A step's batch depends on the step and the seed alone, so a resumed run sees the same data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from be_serve.core.artifact import Placement
from trainer.losses import hidden_kl, hidden_reconstruction, joint_loss
from trainer.model import FrozenModel
from trainer.queries import Query
from trainer.soft_token import Row, scored_states
from trainer.teacher import Example

_SORTED_BATCHES = 8


@dataclass(frozen=True)
class StageLoss:
    """The loss of one batch, its parts for the log, and how many positions the model was fed."""

    total: Tensor
    parts: dict[str, float]
    positions: int


class Stage(Protocol):
    """What the loop needs of an objective."""

    name: str

    def loss(self, vectors_KH: Tensor, step: int) -> StageLoss:
        """Loss of the batch of `step`, with a gradient to the vectors [k, H] alone."""
        ...


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


def student_row(model: FrozenModel, query: Query, response: Sequence[int], placement: Placement) -> Row:
    """The student's input for a query: exactly the ids that a server puts around the vectors."""
    slot = model.slots.render(query.messages, placement=placement, template_kwargs=model.template_kwargs)
    return Row(slot.before, slot.after, response)


class Distil:
    """Stage 2: KL between the teacher's and the student's distributions over the response, Eq. 3."""

    name = "distil"

    def __init__(
        self,
        model: FrozenModel,
        examples: Sequence[Example],
        *,
        placement: Placement = "system",
        tau: float = 1.0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tau = tau
        self.examples = examples
        self.rows = [student_row(model, e.query, e.response, placement) for e in examples]
        self.plan = BatchPlan([row.length(0) for row in self.rows], batch_size, seed)

    def loss(self, vectors_KH: Tensor, step: int) -> StageLoss:
        batch = self.plan(step)
        rows = [self.rows[i] for i in batch]
        student_NH = scored_states(self.model, rows, vectors_KH)
        teacher_NH = torch.cat([self.examples[i].states_TH for i in batch]).to(self.model.device)
        kl_N = hidden_kl(teacher_NH, student_NH, self.model.head, tau=self.tau)
        total = kl_N.mean()
        return StageLoss(total, {"kl": total.item()}, sum(row.length(len(vectors_KH)) for row in rows))


class Reconstruct:
    """Stage 1: the prompt from [BE][AE], without a template, Eq. 2. The [AE] stays as it is."""

    name = "reconstruct"

    def __init__(self, model: FrozenModel, prompt: str, ae_1H: Tensor) -> None:
        self.model = model
        ids = model.tokenizer.encode(prompt, add_special_tokens=False)
        self.targets_M = torch.tensor(ids, device=model.device)
        self.ae_1H = ae_1H.to(model.device)

    def loss(self, vectors_KH: Tensor, step: int) -> StageLoss:
        rows_KH = torch.cat([vectors_KH, self.ae_1H])
        row = Row((), (), self.targets_M.tolist())
        states_MH = scored_states(self.model, [row], rows_KH)
        total = hidden_reconstruction(states_MH, self.targets_M, self.model.head).mean()
        return StageLoss(total, {"reconstruction": total.item()}, row.length(len(rows_KH)))


class Joint:
    """Eq. 4: (1 - lambda) reconstruction + lambda distillation, both in every step."""

    name = "joint"

    def __init__(self, reconstruct: Stage, distil: Stage, lam: float) -> None:
        self.reconstruct = reconstruct
        self.distil = distil
        self.lam = lam

    def loss(self, vectors_KH: Tensor, step: int) -> StageLoss:
        first = self.reconstruct.loss(vectors_KH, step)
        second = self.distil.loss(vectors_KH, step)
        total = joint_loss(first.total, second.total, self.lam)
        return StageLoss(total, {**first.parts, **second.parts}, first.positions + second.positions)


class Autoencode:
    """Stage 0: a text again, behind itself and [AE], Eq. 1. `batches` gives lists of ids, without end."""

    name = "autoencode"

    def __init__(self, model: FrozenModel, batches: Iterator[list[list[int]]]) -> None:
        self.model = model
        self.batches = batches
        self._passed = 0

    def loss(self, vectors_KH: Tensor, step: int) -> StageLoss:
        for _ in range(step - self._passed):  # a resumed run passes over what it has seen
            next(self.batches)
        self._passed = step + 1
        return self.loss_of(vectors_KH, next(self.batches))

    def loss_of(self, vectors_KH: Tensor, texts: list[list[int]]) -> StageLoss:
        """Loss of the given texts."""
        rows = [Row(ids, (), ids) for ids in texts]
        states_NH = scored_states(self.model, rows, vectors_KH)
        targets_N = torch.tensor([t for row in rows for t in row.response], device=self.model.device)
        total = hidden_reconstruction(states_NH, targets_N, self.model.head).mean()
        return StageLoss(total, {"reconstruction": total.item()}, sum(r.length(len(vectors_KH)) for r in rows))
