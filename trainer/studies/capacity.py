"""How much a prompt asks for, and how much the vectors of a model hold: both in bits.

The demand of a text is what the model itself cannot guess of it: the sum of
-log2 p over its tokens. The capacity of a vector is what one trained vector, fed
before a text, saves of that sum (information gain, Kuratov et al., arXiv
2502.13063). A prompt's behaviour is less than its text, so demand above capacity
is a warning, not a proof.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import InputError
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import Row, SoftToken, scored_states
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.losses import hidden_reconstruction
from trainer.optim.objectives import Memorise
from trainer.optim.starts import random_start
from trainer.text import sentences

FITS, LOSES = 0.3, 0.7
"""Demand over capacity: below the first the wording should fit, above the second it is lost. Guesses."""
_ACCURATE = 0.99


@dataclass(frozen=True)
class Probed:
    """One text: bits without and with the vectors, and the longest prefix told back with 99 % of its tokens right."""

    tokens: int
    bits_alone: float
    bits_with: float
    exact_prefix: int

    @property
    def gain(self) -> float:
        """Bits that the vectors hold of the text."""
        return self.bits_alone - self.bits_with


@dataclass(frozen=True)
class Capacity:
    """What k trained vectors of a model hold, from texts that they were made to repeat."""

    k: int
    steps: int
    texts: list[Probed]

    @property
    def bits_a_vector(self) -> float:
        """Mean information gain, divided by k."""
        return statistics.mean(text.gain for text in self.texts) / self.k


def token_bits(model: FrozenModel, ids: Sequence[int], vectors_KH: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-log2 p [N] of each token, and whether it was the likeliest, under teacher forcing.

    Without vectors the first token, which nothing precedes, is left out.
    """
    row = Row((), (), ids) if vectors_KH is not None else Row((), ids[:1], ids[1:])
    targets_N = torch.tensor(row.response, device=model.device)
    with torch.no_grad():
        states_NH = scored_states(model, [row], vectors_KH)
        nats_N = hidden_reconstruction(states_NH, targets_N, model.head)
        right_N = torch.cat([model.head(part).argmax(-1) for part in states_NH.split(256)]) == targets_N
    return (nats_N / math.log(2)).cpu(), right_N.cpu()


def probe(
    model: FrozenModel,
    texts: Sequence[Sequence[int]],
    folder: Path,
    *,
    k: int = 1,
    steps: int = 600,
    lr: float = 1e-2,
    seed: int = 0,
    quiet: bool = False,
) -> Capacity:
    """Train k vectors for each text (ids), all side by side, to repeat it; say what they hold.

    The same call continues an interrupted probe. Raises Stopped after a signal,
    InputError where training diverged or the vectors learned nothing.
    """
    trainings = []
    for n, ids in enumerate(texts):
        place = folder / f"text-{n}"
        place.mkdir(parents=True, exist_ok=True)
        key = json.dumps([list(ids), k, steps, lr, seed, str(model.fingerprint), str(model.dtype)])
        trainings.append(
            Training(
                SoftToken(random_start(model, k, seed + n).vectors_KH.to(model.device)),
                [(Memorise(model, ids), steps)],
                Optimisation(lr, weight_decay=0.01),
                folder=place,
                digest=key,
            )
        )
    fit(model, trainings, quiet=quiet)
    for training in trainings:
        if training.fault:
            raise training.fault
    found = []
    for ids, training in zip(texts, trainings, strict=True):
        alone, _ = token_bits(model, ids)
        within, right = token_bits(model, ids, training.token.vectors.detach())
        # The first token counts with the vectors alone: without them nothing says what it costs.
        found.append(Probed(len(ids), float(alone.sum()), float(within[1:].sum()), exact_prefix(right)))
    capacity = Capacity(k, steps, found)
    if capacity.bits_a_vector <= 0:
        raise InputError("The vectors hold nothing of the texts: train them for more --steps, or with another --lr.")
    return capacity


def exact_prefix(right_N: Tensor) -> int:
    """Length of the longest prefix of which 99 % is right."""
    shares = right_N.float().cumsum(0) / torch.arange(1, len(right_N) + 1)
    good = (shares >= _ACCURATE).nonzero()
    return int(good[-1]) + 1 if len(good) else 0


def save_capacity(folder: Path, model: FrozenModel, capacity: Capacity) -> Path:
    """Keep a measured capacity in `folder`, one for each model; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model.fingerprint}.json"
    write_atomically(path, json.dumps(asdict(capacity), indent=1).encode())
    return path


def load_capacity(folder: Path, model: FrozenModel) -> Capacity | None:
    """The capacity kept by `save_capacity`, or None."""
    try:
        data = json.loads((folder / f"{model.fingerprint}.json").read_text(encoding="utf-8"))
        return Capacity(data["k"], data["steps"], [Probed(**text) for text in data["texts"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Fit:
    """Will a prompt fit into the vectors of a model?"""

    demand_bits: float
    bits_a_vector: float
    clauses: list[tuple[str, float]]
    """Each sentence with its own share of the demand, in bits."""

    def share(self, k: int) -> float:
        """Demand over the capacity of k vectors."""
        return self.demand_bits / (k * self.bits_a_vector)

    def recommended_k(self, largest: int = 16) -> int | None:
        """The fewest vectors that hold the wording too, or None where `largest` do not."""
        return next((k for k in range(1, largest + 1) if self.share(k) <= LOSES), None)


def will_it_fit(model: FrozenModel, prompt: str, capacity: Capacity) -> Fit:
    """Compare a prompt's demand with a measured capacity. Raises InputError for a prompt of one token."""
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    if len(ids) < 2:
        raise InputError("The prompt has a single token: keep it as text.")
    bits, _ = token_bits(model, ids)
    costs = [0.0, *bits.tolist()]
    clauses, at = [], 0
    for text in sentences(prompt):
        start = prompt.find(text, at)
        first = len(model.tokenizer.encode(prompt[:start], add_special_tokens=False))
        at = start + len(text)
        last = len(model.tokenizer.encode(prompt[:at], add_special_tokens=False))
        clauses.append((text, sum(costs[first:last])))
    return Fit(sum(costs), capacity.bits_a_vector, clauses)
