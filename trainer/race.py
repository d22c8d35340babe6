"""Which start trains best? Several are trained side by side for a few steps on the same batches.

The start with the lowest loss before training is often not the one with the lowest
after it: sixteen tokens of a description in the prompt's words began lower than sixteen
of its instructions, and ended 50 % higher. The first steps tell (docs/training.md), so
the field is cut to its best after one heat, and a second decides.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.loop import Optimisation, Training, fit
from trainer.model import FrozenModel
from trainer.report import Log
from trainer.soft_token import soft_token
from trainer.stages import Stage
from trainer.starts import Start

HEAT_STEPS = 8
FINALISTS = 3


def race(
    model: FrozenModel,
    starts: Sequence[Start],
    stage: Stage,
    settings: Optimisation,
    *,
    rank: int,
    seed: int,
    folder: Path,
    quiet: bool = False,
) -> list[float]:
    """Each start's mean loss over the second heat of `stage`; inf where it diverged or was not among the finalists.

    Nothing is kept of the training but these figures. Raises Stopped after a signal.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="race-") as scratch:
        lanes = [Path(scratch) / str(i) for i in range(len(starts))]
        for lane in lanes:
            lane.mkdir()

        def heat(entered: Sequence[int], steps: int) -> dict[int, float]:
            """Train on to `steps`; the mean losses of the last heat."""
            trainings = {
                i: Training(
                    soft_token(starts[i].vectors_KH.to(model.device), rank, seed),
                    [(stage, steps)],
                    settings,
                    folder=lanes[i],
                    digest="race",
                )
                for i in entered
            }
            fit(model, list(trainings.values()), quiet=quiet)
            return {i: math.inf if run.fault else _late_mean(lanes[i]) for i, run in trainings.items()}

        first = heat(range(len(starts)), HEAT_STEPS)
        second = heat(sorted(first, key=first.__getitem__)[:FINALISTS], 2 * HEAT_STEPS)
        return [second.get(i, math.inf) for i in range(len(starts))]


def _late_mean(lane: Path) -> float:
    losses = [float(row["loss"]) for row in Log(lane / "log.jsonl").rows()][-HEAT_STEPS:]
    return sum(losses) / len(losses)
