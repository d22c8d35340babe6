"""The first vectors of a run, as its settings say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from be_serve.core.artifact import write_atomically
from trainer.config import TrainConfig
from trainer.generate import Progress
from trainer.model import FrozenModel
from trainer.provenance import digest_of
from trainer.starts import (
    Search,
    Start,
    file_start,
    found_start,
    mean_start,
    random_start,
    text_start,
    written_texts,
)
from trainer.teacher import Example


def find_start(
    config: TrainConfig,
    model: FrozenModel,
    prompt: str,
    prompt_ids: Sequence[int],
    examples: Sequence[Example],
    *,
    cache: Path,
    progress: Progress,
) -> Start:
    """The start that `init` names, or the best that a search finds on the first `search_queries` examples.

    What was found is kept in `cache`, for runs that differ elsewhere. Raises InputError.
    """
    if config.init == "random":
        return random_start(model, config.tokens, config.seed)
    if config.init == "mean":
        return mean_start(model, config.tokens, prompt_ids)
    if config.init.startswith("file:"):
        return file_start(model, config.tokens, config.init.removeprefix("file:"))
    if config.init.startswith("text:"):
        return text_start(model, config.tokens, config.init.removeprefix("text:"))
    searched = examples[: config.search_queries]
    cases = [[example.query.to_json(), example.response] for example in searched]
    key = [prompt, config.placement, config.tokens, config.summary, str(model.fingerprint), str(model.dtype)]
    kept = cache / f"start-{digest_of([*key, cases])}.json"
    if kept.exists():
        return found_start(model, **json.loads(kept.read_text(encoding="utf-8")))
    texts = [] if config.tokens == 1 else written_texts(model, prompt, seed=config.seed)
    if config.summary:
        texts.append(model.slots.prompt_ids(config.summary, template_kwargs=model.template_kwargs))
    ids, kl = Search(model, searched, config.placement, progress).run(prompt_ids, config.tokens, texts)
    write_atomically(kept, json.dumps({"ids": ids, "kl": kl}).encode())
    return found_start(model, ids, kl)
