"""The objectives, small classes of one shape: `parts(vectors, step)` says what a step feeds and how it is scored.

    Autoencode    stage 0, Eq. 1   trains [AE]
    Reconstruct   stage 1, Eq. 2   trains [BE] through a frozen [AE]
    Distil        stage 2, Eq. 3   trains [BE] on the teacher's responses
    Joint         Eq. 4            stages 1 and 2 in one step
    Tune          baseline         prompt tuning: cross-entropy of the responses
    Memorise      baseline, probe  a text from the vectors alone

A step's batch depends on the step, the seed and the losses of the steps before, which the log keeps: a resumed run
sees the same data.
Parts are data: the parts of many tokens go through the model in one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from be_serve.core.artifact import Placement
from trainer.data.queries import Query
from trainer.data.teacher import Example
from trainer.model.frozen import FrozenModel
from trainer.model.memory import Limit
from trainer.model.soft_token import Context, Row, scored_states
from trainer.optim.batches import BatchPlan, FocusedPlan
from trainer.optim.losses import hidden_kl, hidden_reconstruction

_ALL = slice(None)


class Loss(Protocol):
    """What a part asks of the states that its rows give."""

    def __call__(self, states_nH: Tensor, at: slice = _ALL) -> Tensor:
        """Losses [n] in nats a token of final hidden states [n, H], those of the part's response tokens `at`."""
        ...


@dataclass(frozen=True)
class Part:
    """Rows that one objective feeds in a step, with the vectors that stand in them."""

    name: str
    rows: Sequence[Row]
    vectors_KH: Tensor
    loss: Loss
    """Its mean over the tokens of all rows' responses is the part's loss."""
    weight: float = 1.0
    context: Context | None = None
    """What stands before every row. The rows' `before` is empty then."""
    origin_KH: Tensor | None = None
    """What the vectors' gradient is passed on to, where the vectors are a leaf that only collects it."""

    @property
    def positions(self) -> int:
        """How many positions the model is fed."""
        return sum(row.length(len(self.vectors_KH)) for row in self.rows)

    @property
    def width(self) -> int:
        """Length of the longest row."""
        return max(row.length(len(self.vectors_KH)) for row in self.rows)


@dataclass(frozen=True)
class Piece:
    """Rows of a part that go through the model together."""

    part: Part
    rows: Sequence[Row]
    tokens: slice
    """Which of the part's response tokens these rows hold."""

    @property
    def positions(self) -> int:
        """How many positions the model is fed."""
        return sum(row.length(len(self.part.vectors_KH)) for row in self.rows)

    @property
    def width(self) -> int:
        """Length of the longest row."""
        return max(row.length(len(self.part.vectors_KH)) for row in self.rows)


def split(part: Part, limit: Limit | None) -> list[Piece]:
    """A part in pieces of at most `limit` positions, its rows in their order; a longer row is a piece alone."""
    pieces: list[Piece] = []
    rows: list[Row] = []
    width = before = 0
    for row in part.rows:
        length = row.length(len(part.vectors_KH))
        wider = max(width, length)
        # Padding counts: without packing it is fed, and with packing the attention unfolds it.
        if rows and limit and (len(rows) + 1) * wider > limit(wider):
            pieces.append(_piece(part, rows, before))
            before, rows, wider = pieces[-1].tokens.stop, [], length
        rows.append(row)
        width = wider
    return [*pieces, _piece(part, rows, before)]


def _piece(part: Part, rows: Sequence[Row], before: int) -> Piece:
    return Piece(part, rows, slice(before, before + sum(len(row.response) for row in rows)))


class Stage(Protocol):
    """What the loop needs of an objective."""

    name: str

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        """The parts of `step`; the step's loss is the weighted sum of their means."""
        ...

    def told(self) -> dict[str, Any]:
        """What the log keeps of the last step, so that `recall` can go on from there."""
        ...

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take up the steps that an interrupted run has done, from the rows of its log."""
        ...


class Forgetful:
    """A stage whose batches do not depend on the steps before."""

    def told(self) -> dict[str, Any]:
        return {}

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass


def part_losses(model: FrozenModel, parts: Sequence[Part]) -> list[Tensor]:
    """Mean loss of each part, with a gradient to its vectors alone, from one forward pass."""
    return piece_losses(model, [piece for part in parts for piece in split(part, None)])


def piece_losses(model: FrozenModel, pieces: Sequence[Piece], *, checkpointed: bool = False) -> list[Tensor]:
    """What each piece adds to its part's mean loss, from one forward pass. All pieces have the same context.

    `checkpointed`: the layers keep their inputs alone, for a single row that is too long otherwise.
    """
    rows = [row for piece in pieces for row in piece.rows]
    vectors = [piece.part.vectors_KH for piece in pieces for _ in piece.rows]
    context = pieces[0].part.context
    states_NH = scored_states(model, rows, vectors, context=context, checkpointed=checkpointed)
    counts = [sum(len(row.response) for row in piece.rows) for piece in pieces]
    return [
        piece.part.loss(states_nH, piece.tokens).sum() / sum(len(row.response) for row in piece.part.rows)
        for piece, states_nH in zip(pieces, states_NH.split(counts), strict=True)
    ]


def student_row(model: FrozenModel, query: Query, response: Sequence[int], placement: Placement) -> Row:
    """The student's input for a query: exactly the ids that a server puts around the vectors."""
    slot = model.slots.render(query.messages, placement=placement, template_kwargs=model.template_kwargs)
    return Row(slot.before, slot.after, response)


class Distil:
    """Stage 2: KL between the teacher's and the student's distributions over the response, Eq. 3.

    `focused`: batches by `FocusedPlan`.
    """

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
        literal_LH: Tensor | None = None,
        focused: bool = False,
    ) -> None:
        """`literal_LH` are the first of the vectors that `parts` gets, which stay as they are."""
        self.model = model
        self.tau = tau
        self.examples = examples
        self.rows = [student_row(model, e.query, e.response, placement) for e in examples]
        self._context: Context | None = None
        self._literal = 0
        before = self.rows[0].before
        if literal_LH is not None and model.packs_rows() and all(row.before == before for row in self.rows):
            rows_PH = torch.cat(
                [model.embed(torch.tensor(list(before), dtype=torch.long)), literal_LH.to(model.device)]
            )
            self._context, self._literal = Context.of(model, rows_PH), len(literal_LH)
            self.rows = [replace(row, before=()) for row in self.rows]
        lengths = [row.length(0) for row in self.rows]
        self.plan: BatchPlan | FocusedPlan = (FocusedPlan if focused else BatchPlan)(lengths, batch_size, seed)
        self._batch: list[int] = []

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        self._batch = self.plan(step)
        return [self.part(vectors_KH, self._batch)]

    def told(self) -> dict[str, Any]:
        if not isinstance(self.plan, FocusedPlan):
            return {}
        return {"examples": [[i, self.plan.divergence[i]] for i in self._batch]}

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(self.plan, FocusedPlan):
            for row in rows:
                self.plan(row["step"] - 1)  # a batch is drawn by the divergences of its time
                for i, divergence in row.get("examples", ()):
                    self.plan.divergence[i] = divergence

    def part(self, vectors_KH: Tensor, batch: Sequence[int]) -> Part:
        """The part that feeds the examples of these numbers."""
        teacher_NH = torch.cat([self.examples[i].states_TH for i in batch])
        kl_N = torch.zeros(len(teacher_NH))

        def loss(states_nH: Tensor, at: slice = _ALL) -> Tensor:
            kl_n = hidden_kl(teacher_NH[at].to(states_nH.device), states_nH, self.model.head, tau=self.tau)
            if isinstance(self.plan, FocusedPlan):
                kl_N[at] = kl_n.detach().float().cpu()
                counts = [len(self.examples[i].response) for i in batch]
                for i, own in zip(batch, kl_N.split(counts), strict=True):
                    self.plan.divergence[i] = float(own.sum())
            return kl_n

        name = "kl" if self.tau == 1 else "softened kl"  # what stands in the log as kl is KL
        rows = [self.rows[i] for i in batch]
        return Part(name, rows, vectors_KH[self._literal :], loss, context=self._context)


class Tune(Forgetful):
    """Prompt tuning (Lester et al., arXiv 2104.08691): cross-entropy of the responses. A baseline."""

    name = "tune"

    def __init__(self, distil: Distil) -> None:
        self.distil = distil

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        rows = [self.distil.rows[i] for i in self.distil.plan(step)]
        return [replace(_reconstruction(self.distil.model, rows, vectors_KH), name="nll")]


class Reconstruct(Forgetful):
    """Stage 1: the prompt from [BE][AE], without a template, Eq. 2. The [AE] stays as it is."""

    name = "reconstruct"

    def __init__(self, model: FrozenModel, prompt: str, ae_1H: Tensor) -> None:
        self.model = model
        self.row = Row((), (), model.tokenizer.encode(prompt, add_special_tokens=False))
        self.ae_1H = ae_1H.to(model.device)

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        return [_reconstruction(self.model, [self.row], torch.cat([vectors_KH, self.ae_1H]))]


class Memorise(Forgetful):
    """A text from the vectors alone: the memory token of Kuratov et al. (arXiv 2502.13063). Baseline and probe."""

    name = "memorise"

    def __init__(self, model: FrozenModel, ids: Sequence[int]) -> None:
        self.model = model
        self.row = Row((), (), list(ids))

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        return [_reconstruction(self.model, [self.row], vectors_KH)]


def _reconstruction(model: FrozenModel, rows: Sequence[Row], vectors_KH: Tensor) -> Part:
    targets_N = torch.tensor([t for row in rows for t in row.response], device=model.device)

    def loss(states_nH: Tensor, at: slice = _ALL) -> Tensor:
        return hidden_reconstruction(states_nH, targets_N[at], model.head)

    return Part("reconstruction", rows, vectors_KH, loss)


class Joint:
    """Eq. 4: (1 - lambda) reconstruction + lambda distillation, both in every step."""

    name = "joint"

    def __init__(self, reconstruct: Stage, distil: Stage, lam: float) -> None:
        self.reconstruct = reconstruct
        self.distil = distil
        self.lam = lam

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        first = [replace(p, weight=(1 - self.lam) * p.weight) for p in self.reconstruct.parts(vectors_KH, step)]
        second = [replace(p, weight=self.lam * p.weight) for p in self.distil.parts(vectors_KH, step)]
        return first + second

    def told(self) -> dict[str, Any]:
        return self.distil.told()

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.distil.recall(rows)


class Autoencode(Forgetful):
    """Stage 0: a text again, behind itself and [AE], Eq. 1. `batches` gives lists of ids, without end."""

    name = "autoencode"

    def __init__(self, model: FrozenModel, batches: Iterator[list[list[int]]]) -> None:
        self.model = model
        self.batches = batches
        self._passed = 0

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        for _ in range(step - self._passed):  # a resumed run passes over what it has seen
            next(self.batches)
        self._passed = step + 1
        return [self.part_of(vectors_KH, next(self.batches))]

    def part_of(self, vectors_KH: Tensor, texts: list[list[int]]) -> Part:
        """The part that feeds the given texts."""
        return _reconstruction(self.model, [Row(ids, (), ids) for ids in texts], vectors_KH)
