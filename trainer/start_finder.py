"""The first vectors of a run, as its settings say; for `search` the candidates race."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from be_serve.core.artifact import write_atomically
from trainer.config import TrainConfig
from trainer.generate import Progress
from trainer.loop import Optimisation
from trainer.model import FrozenModel
from trainer.provenance import digest_of
from trainer.race import FINALISTS, HEAT_STEPS, race
from trainer.stages import Stage
from trainer.starts import (
    Search,
    Start,
    file_start,
    found_start,
    mean_start,
    random_start,
    spread_runs,
    text_start,
    written_texts,
)
from trainer.teacher import Example

if TYPE_CHECKING:
    from trainer.run import Say


class StartFinder:
    """Finds a run's start. `cache` keeps what a search scored, `folder` is the run's own."""

    def __init__(
        self,
        config: TrainConfig,
        model: FrozenModel,
        prompt: str,
        prompt_ids: Sequence[int],
        *,
        cache: Path,
        folder: Path,
        say: Say,
    ) -> None:
        self.config = config
        self.model = model
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.cache = cache
        self.folder = folder
        self.say = say

    def candidates(self, examples: Sequence[Example], progress: Progress) -> list[Start]:
        """The one start that `init` names, or the search's best on the first `search_queries` examples.

        For more than one vector, runs of the prompt stand beside it, for `best` to choose from.
        """
        config, model = self.config, self.model
        if config.init == "random":
            return [random_start(model, config.tokens, config.seed)]
        if config.init == "mean":
            return [mean_start(model, config.tokens, self.prompt_ids)]
        if config.init.startswith("file:"):
            return [file_start(model, config.tokens, config.init.removeprefix("file:"))]
        if config.init.startswith("text:"):
            return [text_start(model, config.tokens, config.init.removeprefix("text:"))]
        found = self._scored(examples[: config.search_queries], progress)
        best = found_start(model, *found[0])
        if config.tokens == 1 or config.starts == 1:
            return [best]
        # What the search ranks by, the loss before training, says little of the loss after it.
        runs = spread_runs(self.prompt_ids, config.tokens, config.starts - 1)
        return [best, *(found_start(model, ids) for ids in runs if ids != found[0][0])]

    def best(self, starts: Sequence[Start], stage: Stage, settings: Optimisation, *, quiet: bool) -> Start:
        """The start that trains best in its first steps of `stage`. Raises Stopped after a signal."""
        if len(starts) == 1:
            return starts[0]
        self.say(f"{len(starts)} starts race for {HEAT_STEPS} steps, the best {FINALISTS} for as many again.")
        losses = race(
            self.model,
            starts,
            stage,
            settings,
            rank=self.config.rank,
            seed=self.config.seed,
            folder=self.folder,
            quiet=quiet,
        )
        for start, loss in sorted(zip(starts, losses, strict=True), key=lambda entry: entry[1]):
            if math.isfinite(loss):
                self.say(f"  {start.text!r}: {loss:.3f}")
        return starts[losses.index(min(losses))]

    def _scored(self, examples: Sequence[Example], progress: Progress) -> list[tuple[list[int], float]]:
        """What the search scored, best first; kept beside the teacher's responses for runs that differ elsewhere."""
        config, model = self.config, self.model
        cases = [[example.query.to_json(), example.response] for example in examples]
        key = [self.prompt, config.placement, config.tokens, config.summary, str(model.fingerprint), str(model.dtype)]
        kept = self.cache / f"starts-{digest_of([*key, cases])}.json"
        if kept.exists():
            return [(ids, kl) for ids, kl in json.loads(kept.read_text(encoding="utf-8"))]
        texts = [] if config.tokens == 1 else written_texts(model, self.prompt, seed=config.seed)
        if config.summary:
            texts.append(model.slots.prompt_ids(config.summary, template_kwargs=model.template_kwargs))
        search = Search(model, examples, config.placement, progress)
        found = search.ranked(self.prompt_ids, config.tokens, texts)
        write_atomically(kept, json.dumps(found).encode())
        return found
