"""The one-step probe: a whole text from two vectors in a single forward pass (Mezentsev & Oseledets, seed paper 004).

The input is [e, m, m, ..., m], one position a token, and position i predicts token i.
`e` carries the text; `m` may be shared by all texts. How long a text can be told at
once is a second measure of what a model's input vectors hold, beside the
autoregressive one of `trainer.studies.capacity`.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from be_serve.core.errors import InputError
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import Row, SoftToken, scored_states
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.losses import hidden_reconstruction
from trainer.optim.objectives import Forgetful, Part
from trainer.studies.capacity import exact_prefix, token_bits

_WEIGHT_DECAY = 0.01
_GRID = 11


@dataclass(frozen=True)
class Told:
    """One text told in one step, by the best solution of those that several starts led to."""

    tokens: int
    accuracy: float
    mean_accuracy: float
    """Over all starts: how far one alone could be trusted to find what the vectors can hold."""
    exact_prefix: int
    """C_tokens: the longest prefix of which 99 % is right."""
    bits: float
    """H_LM: what the model itself cannot guess of that prefix, in bits."""


@dataclass(frozen=True)
class Curve:
    """Accuracy at `_GRID` points between two solutions of one text: along a line, and along a trained Bezier curve."""

    line: list[float]
    bezier: list[float]
    starts: list[float]
    """Accuracy of every solution that was found, best first; the first two are the ends."""


class OneStep(Forgetful):
    """Texts from [e_i, m, ..., m]; the parameter holds e_0, e_1, ... and, last, m."""

    name = "one-step"

    def __init__(self, model: FrozenModel, texts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.texts = texts

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        return [self.part(i, torch.stack([vectors_KH[i], vectors_KH[-1]])) for i in range(len(self.texts))]

    def part(self, i: int, pair_2H: Tensor) -> Part:
        """The part that tells text i from a pair (e, m)."""
        ids = self.texts[i]
        targets_N = torch.tensor(ids, device=self.model.device)

        def loss(states_nH: Tensor, at: slice = slice(None)) -> Tensor:
            return hidden_reconstruction(states_nH, targets_N[at], self.model.head)

        return Part("one-step", [Row((), (), ids, at_once=True)], spread(pair_2H, len(ids)), loss)


class Bezier(Forgetful):
    """The middle point pi of phi(t) = (1-t)^2 p1 + 2t(1-t) pi + t^2 p2, trained at random t."""

    name = "bezier"

    def __init__(self, stage: OneStep, ends: tuple[Tensor, Tensor], seed: int) -> None:
        self.stage = stage
        self.ends = ends
        self.seed = seed

    def parts(self, vectors_KH: Tensor, step: int) -> list[Part]:
        t = random.Random(f"{self.seed}/{step}").random()  # noqa: S311
        return [self.stage.part(0, self.at(vectors_KH, t))]

    def at(self, middle_2H: Tensor, t: float) -> Tensor:
        """phi(t)."""
        return (1 - t) ** 2 * self.ends[0] + 2 * t * (1 - t) * middle_2H + t**2 * self.ends[1]


def spread(pair_2H: Tensor, length: int) -> Tensor:
    """[e, m, m, ..., m] of the given length, [length, H]."""
    return torch.cat([pair_2H[:1], pair_2H[1:].expand(length - 1, -1)])


def probe_one_step(
    model: FrozenModel,
    texts: Sequence[Sequence[int]],
    folder: Path,
    *,
    shared: bool = False,
    restarts: int = 1,
    steps: int = 2000,
    lr: float = 1e-2,
    seed: int = 0,
    quiet: bool = False,
) -> list[Told]:
    """Train e and m for each text, or one m for all (`shared`), side by side; say how much of each is told.

    Each is trained from `restarts` starts at once, and the best is told: from one start alone the sources
    and this model miss solutions that exist. The same call continues an interrupted probe. Raises Stopped
    after a signal, InputError where training diverged.
    """
    stages = [OneStep(model, texts)] if shared else [OneStep(model, [text]) for text in texts]
    found = _solve(model, stages, folder, "m", restarts=restarts, steps=steps, lr=lr, seed=seed, quiet=quiet)
    told = []
    for stage, solutions in zip(stages, found, strict=True):
        for i in range(len(stage.texts)):
            mean = statistics.fmean(_told(stage, i, vectors_KH).accuracy for vectors_KH in solutions)
            told.append(replace(_told(stage, i, solutions[0]), mean_accuracy=mean))
    return told


def connect(
    model: FrozenModel,
    ids: Sequence[int],
    folder: Path,
    *,
    restarts: int = 2,
    steps: int = 2000,
    lr: float = 1e-2,
    seed: int = 0,
    quiet: bool = False,
) -> Curve:
    """The best two solutions of one text from `restarts` starts, and the accuracy on the way between them.

    Raises as `probe_one_step`.
    """
    if restarts < 2:
        raise InputError("Two solutions take two starts at least; give --restarts 2 or more.")
    stage = OneStep(model, [ids])
    [found] = _solve(model, [stage], folder, "end", restarts=restarts, steps=steps, lr=lr, seed=seed, quiet=quiet)
    first, second = found[:2]
    curve = Bezier(stage, (first, second), seed)
    place = folder / "curve"
    place.mkdir(parents=True, exist_ok=True)
    key = json.dumps([list(ids), restarts, steps, lr, seed, str(model.fingerprint), str(model.dtype)])
    middle = Training(
        SoftToken((first + second) / 2), [(curve, steps)], Optimisation(lr), folder=place, digest=f"curve {key}"
    )
    _run(model, [middle], quiet)
    points = [i / (_GRID - 1) for i in range(_GRID)]
    middle_2H = middle.token.vectors.detach()
    return Curve(
        [_told(stage, 0, (1 - t) * first + t * second).accuracy for t in points],
        [_told(stage, 0, curve.at(middle_2H, t)).accuracy for t in points],
        [_told(stage, 0, vectors_2H).accuracy for vectors_2H in found],
    )


def _solve(
    model: FrozenModel,
    stages: Sequence[OneStep],
    folder: Path,
    name: str,
    *,
    restarts: int,
    steps: int,
    lr: float,
    seed: int,
    quiet: bool,
) -> list[list[Tensor]]:
    """For each stage its vectors [K, H] (e of each text, then m) after training from each start, best first."""
    starts = [
        [
            _training(model, stage, folder / f"{name}-{n + r * len(stages)}", steps, lr, seed + n + r * len(stages))
            for r in range(restarts)
        ]
        for n, stage in enumerate(stages)
    ]
    _run(model, [training for own in starts for training in own], quiet)

    return [
        _best_first(stage, [training.token.vectors.detach() for training in own])
        for stage, own in zip(stages, starts, strict=True)
    ]


def _best_first(stage: OneStep, solutions: list[Tensor]) -> list[Tensor]:
    def accuracy(vectors_KH: Tensor) -> float:
        return sum(_told(stage, i, vectors_KH).accuracy for i in range(len(stage.texts)))

    return sorted(solutions, key=accuracy, reverse=True)


def _training(model: FrozenModel, stage: OneStep, folder: Path, steps: int, lr: float, seed: int) -> Training:
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(len(stage.texts) + 1, model.hidden_size, generator=rng)  # N(0, 1), as in the paper
    key = json.dumps([[list(ids) for ids in stage.texts], steps, lr, seed, str(model.fingerprint), str(model.dtype)])
    settings = Optimisation(lr, weight_decay=_WEIGHT_DECAY)
    return Training(SoftToken(start.to(model.device)), [(stage, steps)], settings, folder=folder, digest=key)


def _run(model: FrozenModel, trainings: Sequence[Training], quiet: bool) -> None:
    fit(model, trainings, quiet=quiet)
    for training in trainings:
        if training.fault:
            raise training.fault


def _told(stage: OneStep, i: int, vectors_KH: Tensor) -> Told:
    """What the i-th e and m of `vectors_KH`, e of each text and then m, tell of text i."""
    model, part = stage.model, stage.part(i, torch.stack([vectors_KH[i], vectors_KH[-1]]))
    ids = part.rows[0].response
    with torch.no_grad():
        states_NH = scored_states(model, part.rows, part.vectors_KH)
        right_N = (torch.cat([model.head(some).argmax(-1) for some in states_NH.split(256)]).cpu()) == torch.tensor(ids)
    prefix = exact_prefix(right_N)
    bits = float(token_bits(model, ids[:prefix])[0].sum()) if prefix > 1 else 0.0
    accuracy = float(right_N.float().mean())
    return Told(len(ids), accuracy, accuracy, prefix, bits)
