"""Stage 0: the universal [AE] token of a model, its training on plain text and its file."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import InputError, WrongModel
from trainer.config import ae_file
from trainer.data.corpus_packing import THRESHOLD, filtered_path, packed, sample_vectors
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import SoftToken
from trainer.optim.log import Log, draw_curves
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Autoencode, part_losses

TENSOR_NAME = "ae_embedding"
_META_KEY = "be_ae"
_START = " again"


def stream_texts(files: Sequence[str]) -> Iterator[str]:
    """Texts of .txt files (paragraph by paragraph) and .jsonl files (field `text`), gzipped or not.

    Nothing but the current text is held, so a corpus may be of any size.
    Raises InputError for a file that cannot be read.
    """
    for name in files:
        path = Path(name)
        opener: Any = gzip.open if path.suffix == ".gz" else open
        lines = path.name.removesuffix(".gz").endswith(".jsonl")
        try:
            with opener(path, "rt", encoding="utf-8") as handle:
                yield from _rows(handle) if lines else _paragraphs(handle)
        except (OSError, EOFError, UnicodeDecodeError, ValueError) as exc:
            raise InputError(f"Cannot read the corpus file {path}: {exc}.") from exc


def _rows(handle: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(handle, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"line {number} has no `text`")
            yield row["text"]


def _paragraphs(handle: Iterator[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in handle:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


class TextBatches:
    """Endless batches of id lists, each of `length` ids, from a stream read again when it ends.

    A buffer of `buffer` pieces is shuffled by the seed. Raises InputError for a
    corpus without a single piece of that length.
    """

    def __init__(
        self, model: FrozenModel, files: Sequence[str], *, length: int, batch_size: int, seed: int, buffer: int = 2048
    ) -> None:
        self.model = model
        self.files = files
        self.length = length
        self.batch_size = batch_size
        self.buffer = buffer
        self.rng = random.Random(seed)  # noqa: S311
        self._held_out = self._held_texts = self._skipped = 0

    def head(self, count: int) -> list[list[int]]:
        """The first `count` pieces (of a small corpus half of them), which then belong to no batch."""
        pieces = list(itertools.islice(self._pieces(), 2 * count))
        self._held_out = min(count, len(pieces) // 2)
        self._held_texts = self._texts_of(self._held_out)
        if not self._held_out:
            raise InputError(
                f"The corpus holds too few pieces of {self.length} tokens; give more, or a smaller --length."
            )
        return pieces[: self._held_out]

    def __iter__(self) -> Iterator[list[list[int]]]:
        held: list[list[int]] = []
        batch: list[list[int]] = []
        while True:
            found = 0
            for piece in itertools.islice(self._pieces(), self._held_out, None):
                found += 1
                held.append(piece)
                if len(held) < self.buffer:
                    continue
                batch.append(self._take(held))
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            if not found:
                raise InputError(f"The corpus holds no text of {self.length} tokens; give more, or a smaller --length.")
            # A corpus smaller than the buffer: give all of it, then read it again.
            while len(held) >= self.batch_size or (found < self.batch_size and held):
                batch.append(self._take(held))
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []

    def packs(self, samples_a_pack: int, *, filtered: bool) -> Iterator[list[list[int]]]:
        """Batches of packs of shorter samples, at random or by threshold filtering (`trainer.data.corpus_packing`).

        Raises InputError for settings that leave no pack, or a corpus with no text behind those held out.
        """
        shortest, largest = 2 * samples_a_pack, self.buffer // samples_a_pack
        if self.length < shortest or self.batch_size > largest:
            raise InputError(f"Packing needs a --length of at least {shortest}, a --batch-size of at most {largest}.")
        short = TextBatches(
            self.model,
            self.files,
            length=self.length // samples_a_pack,
            batch_size=1,
            seed=self.rng.randrange(1 << 30),
            buffer=self.buffer,
        )
        short._skipped = self._held_texts  # whole texts: short pieces do not tile as long ones do
        stream, torch_rng = iter(short), torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        while True:
            samples = [next(stream)[0] for _ in range(self.buffer)]
            order = list(range(len(samples)))
            if filtered:
                vectors_SH = sample_vectors(self.model, samples).cpu()
                order = filtered_path(vectors_SH, samples_a_pack, THRESHOLD, torch_rng)
            made = packed(samples, order, samples_a_pack)
            self.rng.shuffle(made)
            for start in range(0, len(made) - self.batch_size + 1, self.batch_size):
                yield made[start : start + self.batch_size]

    def _take(self, held: list[list[int]]) -> list[int]:
        at = self.rng.randrange(len(held))
        held[at], held[-1] = held[-1], held[at]
        return held.pop()

    def _texts_of(self, pieces: int) -> int:
        """How many texts the first pieces come from."""
        texts = 0
        for text in stream_texts(self.files):
            if pieces <= 0:
                break
            pieces -= len(self.model.tokenizer.encode(text, add_special_tokens=False)) // self.length
            texts += 1
        return texts

    def _pieces(self) -> Iterator[list[int]]:
        for text in itertools.islice(stream_texts(self.files), self._skipped, None):
            ids = self.model.tokenizer.encode(text, add_special_tokens=False)
            for start in range(0, len(ids) - self.length + 1, self.length):
                yield ids[start : start + self.length]


@dataclass(frozen=True)
class AEConfig:
    """Settings of stage 0. The paper: 1 GB of text, 2 epochs, batch 32, learning rate 1e-3 (its code: 5e-2)."""

    steps: int = 200
    length: int = 64
    """Tokens of each piece of text."""
    batch_size: int = 4
    lr: float = 1e-2
    seed: int = 0
    packing: Literal["none", "random", "filtered"] = "none"
    """Each piece is a run of one text, or a pack of `samples_a_pack` short ones (`trainer.data.corpus_packing`)."""
    samples_a_pack: int = 4
    held_out: int = 16
    """Pieces from the head of the corpus that measure the loss before and after and never train."""


@dataclass(frozen=True)
class AEResult:
    """The vector [1, H] and its reconstruction loss (nats a token) on held-out pieces."""

    ae_1H: Tensor
    before: float
    after: float


def train_ae(
    model: FrozenModel, files: Sequence[str], config: AEConfig, folder: Path, *, quiet: bool = False
) -> AEResult:
    """Train [AE] by Eq. 1; a checkpoint in `folder` is continued. Raises InputError, Stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    data = TextBatches(model, files, length=config.length, batch_size=config.batch_size, seed=config.seed)
    held_out = data.head(config.held_out)
    token = SoftToken(model.embed(model.tokenizer.encode(_START, add_special_tokens=False)).float().mean(0)[None])
    packs = data.packs(config.samples_a_pack, filtered=config.packing == "filtered")
    stage = Autoencode(model, iter(data) if config.packing == "none" else packs)

    def measure() -> float:
        with torch.no_grad():
            losses = [float(part_losses(model, [stage.part_of(token.vectors, [text])])[0]) for text in held_out]
        return sum(losses) / len(losses)

    before = measure()
    sizes = [(str(Path(f).name), Path(f).stat().st_size) for f in files]
    key = json.dumps([dataclasses.asdict(config), sizes, str(model.fingerprint)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    training = Training(token, [(stage, config.steps)], Optimisation(config.lr), folder=folder, digest=digest)
    fit(model, [training], quiet=quiet)
    if training.fault:
        raise training.fault
    draw_curves(Log(folder / "log.jsonl").rows(), folder / "curves.png")
    return AEResult(token.vectors.detach().cpu(), before, measure())


def save_ae(path: str | Path, ae_1H: Tensor, model: FrozenModel, recipe: dict[str, Any]) -> None:
    """Write an [AE] file: tensor `ae_embedding` [1, H] float32, the model's fingerprint in its header."""
    meta = {
        "format_version": 1,
        "base_model": model.name,
        "fingerprint": model.fingerprint.model_dump(),
        "recipe": recipe,
    }
    tensors = {TENSOR_NAME: ae_1H.detach().to("cpu", torch.float32).contiguous()}
    write_atomically(Path(path), save(tensors, metadata={_META_KEY: json.dumps(meta), "format": "pt"}))


def load_ae(path: str | Path, model: FrozenModel) -> Tensor:
    """The [AE] vector [1, H] float32 of a file. Raises InputError, or WrongModel with both fingerprints."""
    path = ae_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})[_META_KEY])
            ae_1H = file.get_tensor(TENSOR_NAME)
        made_for = type(model.fingerprint).model_validate(meta["fingerprint"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as exc:
        raise InputError(f"{path} is no [AE] file: {exc}. Make one with `be-serve train-ae`.") from exc
    if made_for != model.fingerprint:
        raise WrongModel(
            f"The [AE] in {path} was made for {meta['base_model']} (fingerprint {made_for}), "
            f"this run uses {model.name} (fingerprint {model.fingerprint}). Train an [AE] for this model."
        )
    if ae_1H.dtype != torch.float32 or ae_1H.shape != (1, model.hidden_size) or not bool(ae_1H.isfinite().all()):
        raise InputError(f"{path} is damaged: {TENSOR_NAME} must be a finite [1, {model.hidden_size}] float32 tensor.")
    return ae_1H
