"""The optimisation loop: AdamW on the vectors, warm-up and cosine, progress, and a clean stop at any time."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from be_serve.core.errors import InputError
from trainer.checkpoint import Checkpoint
from trainer.report import Log
from trainer.soft_token import SoftToken
from trainer.stages import Stage


class Stopped(KeyboardInterrupt):
    """The run was told to stop; its state is on disk."""


@dataclass(frozen=True)
class Optimisation:
    """Settings of AdamW and its schedule."""

    lr: float
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.9)
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_every: int = 20

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then a cosine to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def fit(
    token: SoftToken,
    stages: Sequence[tuple[Stage, int]],
    optimisation: Optimisation,
    *,
    folder: Path,
    digest: str,
    resume: bool = True,
    quiet: bool = False,
) -> list[float]:
    """Train `token` through the stages, each for its number of steps; return seconds a step.

    The state is written to `folder` every few steps and on SIGINT or SIGTERM, after
    which Stopped is raised. With `resume`, a checkpoint found there is continued:
    the curve is the one that an uninterrupted run would have had.
    Raises InputError where the loss stops being finite.
    """
    file, log = folder / "checkpoint.safetensors", Log(folder / "log.jsonl")
    found = Checkpoint.load(file, digest) if resume and file.exists() else None
    stage_done, step_done = (found.stage, found.step) if found else (0, 0)
    log.keep(stage_done, step_done)
    seconds: list[float] = []
    for index, (stage, steps) in enumerate(stages):
        if index < stage_done:
            continue
        optimiser = torch.optim.AdamW(
            [token.vectors], lr=optimisation.lr, betas=optimisation.betas, weight_decay=optimisation.weight_decay
        )
        first = step_done if index == stage_done else 0
        if found and index == stage_done:
            _restore(found, token, optimiser)
        with _stop_flag() as stopped, tqdm(total=steps, initial=first, desc=stage.name, disable=quiet) as bar:
            for step in range(first, steps):
                began = time.perf_counter()
                row = _step(stage, token, optimiser, optimisation, step, steps)
                took = time.perf_counter() - began
                seconds.append(took)
                log.append({"stage_index": index, "stage": stage.name, **row, "seconds": round(took, 4)})
                bar.set_postfix({**_shown(row), "tok/s": f"{row['positions'] / took:.0f}"}, refresh=False)
                bar.update()
                if (step + 1) % optimisation.checkpoint_every == 0 or step + 1 == steps or stopped():
                    _snapshot(digest, index, step + 1, token, optimiser).save(file)
                if stopped() and (step + 1 < steps or index + 1 < len(stages)):
                    raise Stopped
    return seconds


def _step(
    stage: Stage, token: SoftToken, optimiser: torch.optim.Optimizer, settings: Optimisation, step: int, steps: int
) -> dict[str, float]:
    for group in optimiser.param_groups:
        group["lr"] = settings.rate(step, steps)
    optimiser.zero_grad(set_to_none=True)
    loss = stage.loss(token.vectors, step)
    value = loss.total.item()
    if not math.isfinite(value):
        raise InputError(
            f"The loss of step {step + 1} is {value}: training diverged. Use a lower --lr, or --dtype float32."
        )
    loss.total.backward()
    norm = torch.nn.utils.clip_grad_norm_([token.vectors], settings.clip)
    optimiser.step()
    rate = optimiser.param_groups[0]["lr"]
    return {
        "step": step + 1,
        "loss": value,
        **loss.parts,
        "lr": rate,
        "gradient": float(norm),
        "positions": loss.positions,
    }


def _shown(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{row[name]:.3f}" for name in ("loss", "kl", "reconstruction") if name in row}


def _snapshot(digest: str, stage: int, step: int, token: SoftToken, optimiser: torch.optim.Optimizer) -> Checkpoint:
    state = optimiser.state[token.vectors]
    return Checkpoint(digest, stage, step, token.vectors, state["exp_avg"], state["exp_avg_sq"], torch.get_rng_state())


def _restore(found: Checkpoint, token: SoftToken, optimiser: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        token.vectors.copy_(found.vectors_KH)
    if found.step:
        device = token.vectors.device
        optimiser.state[token.vectors] = {
            "step": torch.tensor(float(found.step)),
            "exp_avg": found.exp_avg_KH.to(device),
            "exp_avg_sq": found.exp_avg_sq_KH.to(device),
        }
    torch.set_rng_state(found.rng)


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that a step is never cut in half; a second one ends at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
