"""Which start trains best? Several are trained side by side for a few steps on the same batches.

The start with the lowest loss before training is often not the one with the lowest
after it: sixteen tokens of a description in the prompt's words began lower than sixteen
of its instructions, and ended 50 % higher. The first steps tell (docs/training.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.loop import Optimisation, Training, fit
from trainer.model import FrozenModel
from trainer.report import Log
from trainer.soft_token import soft_token
from trainer.stages import Stage
from trainer.starts import Start

RACE_STEPS = 16


def race(
    model: FrozenModel,
    starts: Sequence[Start],
    stage: Stage,
    settings: Optimisation,
    *,
    rank: int,
    seed: int,
    folder: Path,
    steps: int = RACE_STEPS,
    quiet: bool = False,
) -> list[float]:
    """Each start's mean loss over the second half of `steps` steps of `stage`; inf where it diverged.

    Nothing is kept of the training but these figures. Raises Stopped after a signal.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="race-") as scratch:
        folders = [Path(scratch) / str(i) for i in range(len(starts))]
        for one in folders:
            one.mkdir()
        trainings = [
            Training(
                soft_token(start.vectors_KH.to(model.device), rank, seed),
                [(stage, steps)],
                settings,
                folder=own,
                digest="race",
            )
            for start, own in zip(starts, folders, strict=True)
        ]
        fit(model, trainings, quiet=quiet)
        return [
            float("inf") if training.fault else _late_mean([row["loss"] for row in Log(own / "log.jsonl").rows()])
            for training, own in zip(trainings, folders, strict=True)
        ]


def _late_mean(losses: Sequence[float]) -> float:
    late = losses[len(losses) // 2 :]
    return sum(late) / len(late)
