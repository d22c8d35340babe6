"""With which vectors a run begins: a start, words of the prompt beside it, or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from be_serve.core.errors import InputError
from trainer.config import PROBE_RANK, TrainConfig
from trainer.data.teacher import Example
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import SoftToken, soft_token
from trainer.optim.checkpoint import Checkpoint
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Distil
from trainer.optim.places import Residue, find_literal, kept_words, queries_by_sentence
from trainer.optim.starts import Start, find_start, no_start
from trainer.telling import Telling


@dataclass(frozen=True)
class Beginning:
    """The token that is trained, and what is known of it before the first step."""

    token: SoftToken
    start: Start
    continued: bool
    """Whether a checkpoint was found."""
    training_queries: dict[str, int]
    """For sentences of the prompt, on how many training queries they bear; empty where no words were chosen."""

    def frozen(self, config: TrainConfig) -> tuple[int, ...]:
        """The words (ids) of the places that training leaves as they are."""
        return self.start.literal if config.freeze_literal else ()


class Beginner:
    """Finds the beginning of a run, and writes it as the run's first checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        model: FrozenModel,
        prompt: str,
        prompt_ids: Sequence[int],
        folder: Path,
        *,
        cache: Path,
        telling: Telling,
    ) -> None:
        """`config` is resolved for the prompt."""
        self.config = config
        self.model = model
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.folder = folder
        self.cache = cache
        self.telling = telling

    def begin(
        self,
        examples: list[Example],
        digest: str,
        distil: Callable[[list[Example]], Distil],
        optimisation: Optimisation,
    ) -> Beginning:
        """The first vectors; a checkpoint's where there is one.

        `distil` and `optimisation` are those of the learned vectors that are trained alone, to see which words they
        do not carry. Raises InputError where that diverges, Stopped after a signal.
        """
        file, note = self.folder / "checkpoint.safetensors", self.folder / "start.json"
        if file.exists():
            found = Checkpoint.load(file, digest)
            self.telling.say(f"Continuing the run in {self.folder} (stage {found.stage + 1}, step {found.step}).")
            try:
                kept = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
                literal = tuple(int(token) for token in kept.get("literal", ()))
                bearing = {str(text): int(count) for text, count in kept.get("training_queries", {}).items()}
            except (OSError, ValueError, TypeError, AttributeError) as exc:
                raise InputError(f"Damaged {note}: {exc}. Start again with --fresh.") from exc
            start = Start(found.parameters["vectors"], kept.get("text"), kept.get("kl"), literal)
            return Beginning(self._token(start), start, True, bearing)
        with self.telling.timed("start"):
            start = self._find(examples) if self.config.learned else no_start(self.model)
        bearing = {}
        if self.config.keep_text is not None:
            start = self._beside(kept_words(self.model, self.config.keep_text, self._room), start)
        elif self._room:
            start = self._probed(start, examples, digest, distil, optimisation)
            start, bearing = self._with_words(start, examples)
        told = {"text": start.text, "kl": start.kl, "literal": start.literal, "training_queries": bearing}
        note.write_text(json.dumps(told), encoding="utf-8")
        Checkpoint(digest, 0, 0, {"vectors": start.vectors_KH}, {}, torch.get_rng_state()).save(file)
        if start.text is not None:
            kl = "" if start.kl is None else f", KL {start.kl:.3f} before training"
            self.telling.say(f"Start: {start.text!r}{kl}.")
        return Beginning(self._token(start), start, False, bearing)

    @property
    def _room(self) -> int:
        """The number of literal places."""
        return self.config.k - self.config.learned

    def _find(self, examples: list[Example]) -> Start:
        with self.telling.bar("search", None) as progress:
            return find_start(
                self.config, self.model, self.prompt, self.prompt_ids, examples, cache=self.cache, progress=progress
            )

    def _probed(
        self,
        start: Start,
        examples: list[Example],
        digest: str,
        distil: Callable[[list[Example]], Distil],
        optimisation: Optimisation,
    ) -> Start:
        """The learned vectors after a few steps alone: what they carry then needs no words."""
        config = self.config
        if not (config.probe_steps and config.learned):
            return start
        token = soft_token(start.vectors_KH.to(self.model.device), PROBE_RANK, config.seed)
        stages = [(distil(examples), config.probe_steps)]
        probe = Training(token, stages, optimisation, folder=self.folder / "probe", digest=digest)
        fit(self.model, [probe], quiet=self.telling.quiet)
        if probe.fault:
            raise probe.fault
        self.telling.add("start", sum(probe.seconds))
        return replace(start, vectors_KH=probe.token.vectors.detach())

    def _with_words(self, start: Start, examples: list[Example]) -> tuple[Start, dict[str, int]]:
        """The start with the words that its vectors do not carry, and on how many examples each sentence bears."""
        config, model, say = self.config, self.model, self.telling.say
        with self.telling.timed("places"), self.telling.bar("places", None) as progress:
            residue = Residue(model, self.prompt, examples, start.vectors_KH, config.placement, progress)
            found = find_literal(residue, self.prompt, self._room, trained=not config.freeze_literal)
        bearing = dict(queries_by_sentence(self.prompt, residue.said))
        if idle := [text for text, count in bearing.items() if not count]:
            say(
                f"No training query bears on {len(idle)} of {len(bearing)} sentences of the prompt, such as "
                f"{idle[0]!r} (report.html has the counts). What a query never asks for, the token may lose: give "
                "--queries that ask."
            )
        if found.ids:
            say(
                f"{len(found.ids)} literal places (KL {found.kl_without:.3f} without them, {found.kl_with:.3f} with): "
                f"{model.tokenizer.decode(found.ids)!r}. Whoever has the token file and the model can read these "
                "words. For a secret prompt use --tokens with --init random."
            )
        else:
            say("No words were taken: none fits the places, or the learned vectors do as well without.")
        if not (found.ids or len(start.vectors_KH)):
            raise InputError(
                "The prompt has no word for a vector to begin at (what looks like a key is left out). Give --tokens 4."
            )
        if start.text is None and start.kl is None and not len(start.vectors_KH):
            start = replace(start, kl=found.kl_with)
        return self._beside(found.ids, start), bearing

    def _beside(self, literal: tuple[int, ...], start: Start) -> Start:
        """The start with words before its vectors, as vectors that are trained too or as places that stay."""
        if self.config.freeze_literal or not literal:
            return replace(start, literal=literal)
        words_LH = self.model.embed(literal).float()
        return replace(start, literal=literal, vectors_KH=torch.cat([words_LH, start.vectors_KH.to(words_LH)]))

    def _token(self, start: Start) -> SoftToken:
        config, model = self.config, self.model
        frozen_LH = model.embed(start.literal) if start.literal and config.freeze_literal else None
        return soft_token(start.vectors_KH.to(model.device), config.rank or 0, config.seed, frozen_LH)
