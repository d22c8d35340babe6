"""Responses that a server writes for a run (`teacher_url`), kept so that nothing is asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.endpoint import answered
from trainer.generate import Progress
from trainer.model import FrozenModel
from trainer.provenance import digest_of
from trainer.queries import Query, read_queries, write_queries

_ASKED_AT_ONCE = 64


def served_answers(
    config: TrainConfig, model: FrozenModel, prompt: str, queries: Sequence[Query], folder: Path, progress: Progress
) -> list[Query]:
    """The queries with the server's answers. Raises InputError where it cannot be reached or refuses."""
    assert config.teacher_url is not None
    asked_as: dict[str, Any] = {
        "url": config.teacher_url,
        "model": config.teacher_model or config.model,
        "max_tokens": config.response_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "stop": config.stop,
        "template_kwargs": model.template_kwargs,
    }
    found: list[Query] = []
    for start in range(0, len(queries), _ASKED_AT_ONCE):
        asked = queries[start : start + _ASKED_AT_ONCE]
        key = [prompt, asked_as, str(model.fingerprint), [query.to_json() for query in asked]]
        kept = folder / f"answers-{digest_of(key)}.jsonl"
        if kept.exists():
            found += read_queries(kept)
            progress(len(asked))
            continue
        made = answered(asked, prompt, **asked_as, progress=progress)
        write_queries(kept, made)
        found += made
    return found
