"""The optimisation loop: AdamW on the vectors, warm-up and cosine, progress, and a clean stop at any time."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from be_serve.core.errors import InputError
from trainer.model.frozen import FrozenModel
from trainer.model.memory import Limit, training_limit
from trainer.model.soft_token import SoftToken
from trainer.optim.checkpoint import Checkpoint
from trainer.optim.log import Log
from trainer.optim.objectives import Part, Piece, Stage, piece_losses, split
from trainer.optim.validation import Best, Validation

# Parts join one pass up to this many positions: they keep the cores, or a small GPU, busy; more only costs memory.
_FEED_POSITIONS = 4096
# Parts of such different lengths that less than this share of a padded batch is text go separately.
_FEED_FILLED = 0.75


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


class Training:
    """One token on its way through its stages: optimiser, log and checkpoint.

    Stage i is run for `stages[i][1]` steps. A checkpoint in `folder` is continued: the
    curve is the one that an uninterrupted training would have had.
    """

    def __init__(
        self,
        token: SoftToken,
        stages: Sequence[tuple[Stage, int]],
        settings: Optimisation,
        *,
        folder: Path,
        digest: str,
        resume: bool = True,
        validation: Validation | None = None,
    ) -> None:
        self.token = token
        self.stages = [(stage, steps) for stage, steps in stages if steps]
        self.settings = settings
        self.digest = digest
        self.seconds: list[float] = []
        """Wall time of each step done here, shared with the tokens trained beside this one."""
        self.fault: InputError | None = None
        self.best: Best | None = None
        """The best step of the last stage on the validation queries."""
        self.validation_seconds = 0.0
        """Wall time of the validation done here, which no step's time holds."""
        self._validation = validation
        self.index = self.step = 0
        self._fed: Tensor
        self._file = folder / "checkpoint.safetensors"
        self._log = Log(folder / "log.jsonl")
        found = Checkpoint.load(self._file, digest) if resume and self._file.exists() else None
        if found:
            self.index, self.step = found.stage, found.step
        self._log.keep(self.index, self.step)
        rows = self._log.rows()
        self.seconds_before = [float(row["seconds"]) for row in rows]
        """The same of the steps that an interrupted run had done."""
        self._optimiser = self._new_optimiser()
        if found and self.live:
            self.stages[self.index][0].recall([row for row in rows if row["stage_index"] == self.index])
        if found:
            _restore(found, token, self._optimiser)
            self.best = Best(*found.best) if found.best else None
        if self.live and self.step == self.stages[self.index][1]:
            self._next_stage()

    @property
    def live(self) -> bool:
        """Whether steps are left."""
        return self.fault is None and self.index < len(self.stages)

    @property
    def vectors(self) -> Tensor:
        """The vectors [k, H] that the training made: those of its best step, or of its last."""
        return self.best.vectors_KH if self.best else self.token.vectors.detach()

    @property
    def name(self) -> str:
        """Name of the current stage."""
        return self.stages[self.index][0].name

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(steps for _, steps in self.stages)

    @property
    def steps_done(self) -> int:
        return sum(steps for _, steps in self.stages[: self.index]) + self.step

    def parts(self) -> list[Part]:
        """What the next step feeds."""
        # A leaf of its own: the parts may go through the model in several passes, each with its own graph.
        self._fed = self.token.vectors.detach().requires_grad_()
        return self.stages[self.index][0].parts(self._fed, self.step)

    def update(self, total: float, losses: dict[str, float], positions: int, seconds: float) -> None:
        """One step of AdamW on the gradient that the backward pass left; then the log and the checkpoint."""
        stage, steps = self.stages[self.index]
        if not math.isfinite(total):
            self.fault = InputError(
                f"The loss of step {self.step + 1} is {total}: training diverged. Use a lower --lr, or --dtype float32."
            )
            return
        self.token.vectors.backward(self._fed.grad)
        rate = self.settings.rate(self.step, steps)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.token.parameters.values(), self.settings.clip)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds.append(seconds)
        self._log.append(
            {
                "stage_index": self.index,
                "stage": stage.name,
                "step": self.step,
                "loss": total,
                **losses,
                "lr": rate,
                "gradient": float(norm),
                "positions": positions,
                "seconds": round(seconds, 4),
                **stage.told(),
                **self._validated(steps),
            }
        )
        if self.step % self.settings.checkpoint_every == 0 or self.step == steps:
            self.save()
        if self.step == steps:
            self._next_stage()

    def _validated(self, steps: int) -> dict[str, float]:
        """The divergence on the validation queries where it is due, for the log; the best step is kept."""
        check = self._validation
        if check is None or self.index < len(self.stages) - 1 or not check.due(self.step, steps):
            return {}
        began = time.perf_counter()
        vectors_KH = self.token.vectors.detach().clone()
        kl = check.divergence(vectors_KH)
        self.validation_seconds += time.perf_counter() - began
        if math.isfinite(kl) and (self.best is None or kl < self.best.kl):
            self.best = Best(kl, self.step, vectors_KH)
        return {"validation": kl}

    def save(self) -> None:
        """Write the checkpoint, once the first step is done."""
        parameters, states = self.token.parameters, self._optimiser.state
        if all(states[parameter] for parameter in parameters.values()):
            moments = {name: (states[p]["exp_avg"], states[p]["exp_avg_sq"]) for name, p in parameters.items()}
            best = (self.best.kl, self.best.step, self.best.vectors_KH) if self.best else None
            rng = torch.get_rng_state()
            Checkpoint(self.digest, self.index, self.step, parameters, moments, rng, best).save(self._file)

    def _new_optimiser(self) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.AdamW(
            self.token.parameters.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def _next_stage(self) -> None:
        self.index, self.step = self.index + 1, 0
        self._optimiser = self._new_optimiser()


def fit(model: FrozenModel, trainings: Sequence[Training], *, quiet: bool = False, limit: Limit | None = None) -> None:
    """Train tokens side by side, their batches in common forward passes.

    A pass is bounded by `limit`, which is what fits the memory that is free at the start where none is
    given. A larger batch goes through the model in several passes, a longer row with checkpointed layers.

    Each keeps its own loss, schedule, log and checkpoint, and its neighbours' rows do
    not enter its loss. A loss that stops being finite ends that training alone
    (`fault`). On SIGINT or SIGTERM all states are written and Stopped is raised.
    """
    limit = limit or training_limit(model.causal_lm)
    total, done = sum(t.steps for t in trainings), sum(t.steps_done for t in trainings)
    with _stop_flag() as stopped, tqdm(total=total, initial=done, disable=quiet) as bar:
        while live := [t for t in trainings if t.live]:
            bar.set_description(" ".join(dict.fromkeys(t.name for t in live)), refresh=False)
            bar.set_postfix(_step(model, live, limit), refresh=False)
            bar.update(len(live))
            if stopped() and any(t.live for t in live):
                for training in live:
                    training.save()
                raise Stopped


def _step(model: FrozenModel, trainings: Sequence[Training], limit: Limit | None) -> dict[str, str]:
    """One step of each training; returns what the progress bar shows."""
    began = time.perf_counter()
    parts = [[_with_leaf(part) for part in training.parts()] for training in trainings]
    everything = [part for own in parts for part in own]
    losses = {id(part): 0.0 for part in everything}
    for feed in _feeds(everything, limit):
        # Only a single row can be longer than a pass may be.
        checkpointed = limit is not None and feed[0].positions > limit(feed[0].width)
        found = piece_losses(model, feed, checkpointed=checkpointed)
        # Gradients add up on the leaf: with each piece's share of the mean, to that of one pass.
        torch.stack([piece.part.weight * loss for piece, loss in zip(feed, found, strict=True)]).sum().backward()
        for piece, loss in zip(feed, found, strict=True):
            losses[id(piece.part)] += loss.item()
    made = [(part.origin_KH, part.vectors_KH.grad) for part in everything if part.origin_KH is not None]
    if made:
        torch.autograd.backward(*zip(*made, strict=True))
    took = time.perf_counter() - began
    for training, own in zip(trainings, parts, strict=True):
        values = {part.name: losses[id(part)] for part in own}
        total = sum(part.weight * losses[id(part)] for part in own)
        training.update(total, values, sum(part.positions for part in own), took)
    fed = sum(part.positions for own in parts for part in own)
    names = sorted({part.name for own in parts for part in own})
    means = {n: [losses[id(p)] for own in parts for p in own if p.name == n] for n in names}
    return {**{n: f"{sum(v) / len(v):.3f}" for n, v in means.items()}, "tok/s": f"{fed / took:.0f}"}


def _with_leaf(part: Part) -> Part:
    """The part with a leaf of its own: several passes cannot go back through one graph that made its vectors."""
    if part.vectors_KH.is_leaf:
        return part
    return replace(part, vectors_KH=part.vectors_KH.detach().requires_grad_(), origin_KH=part.vectors_KH)


def _feeds(parts: Sequence[Part], limit: Limit | None) -> Iterator[list[Piece]]:
    """Pieces that go through the model together: of similar length, as many as one pass should hold."""
    feed: list[Piece] = []
    pieces = [piece for part in parts for piece in split(part, limit)]
    for piece in sorted(pieces, key=lambda piece: (id(piece.part.context), piece.width)):
        rows = len(piece.rows) + sum(len(p.rows) for p in feed)
        used = piece.positions + sum(p.positions for p in feed)
        padded = rows * piece.width
        most = min(_FEED_POSITIONS, limit(piece.width)) if limit else _FEED_POSITIONS
        other = bool(feed) and feed[0].part.context is not piece.part.context
        if feed and (other or padded > most or used < _FEED_FILLED * padded):
            yield feed
            feed = []
        feed.append(piece)
    if feed:
        yield feed


def _restore(found: Checkpoint, token: SoftToken, optimiser: torch.optim.Optimizer) -> None:
    for name, parameter in token.parameters.items():
        if name not in found.parameters:
            continue  # before the first step there is the start alone
        with torch.no_grad():
            parameter.copy_(found.parameters[name])
        if found.step:
            first, second = found.moments[name]
            optimiser.state[parameter] = {
                "step": torch.tensor(float(found.step)),
                "exp_avg": first.to(parameter.device),
                "exp_avg_sq": second.to(parameter.device),
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
