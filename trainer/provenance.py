"""Where a token comes from: digests of what decides a run, and the figures and versions that travel with it."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers
from torch import Tensor

import be_serve
from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token, file_digest, read_limited
from be_serve.core.digests import digest_of, file_sha256
from be_serve.core.prompts import prompt_sha256
from trainer.config import TrainConfig, ae_file
from trainer.data.queries import Query
from trainer.evaluation.evaluate import Evaluation, finite
from trainer.evaluation.verdict import Verdict, judge
from trainer.model.frozen import FrozenModel
from trainer.optim.starts import Start

_ANSWERS = ("rho_answer", "facts", "words", "stop", "loops", "answer_tokens")
"""Figures of whole answers, where these were written."""


def run_digest(config: TrainConfig, model: FrozenModel, prompt: str, training: list[Query]) -> str:
    """Digest of all that decides a run's curve; where files lie does not."""
    elsewhere = {"prompt_file", "output", "queries", "model", "id", "with_prompt", "ae", "summary"}
    measured = {"scores_only", "test_queries", "answer_tokens", "answer_queries"}
    servers = {"teacher", "teacher_url", "teacher_model", "writer_url", "writer_model"}  # what they wrote counts
    shaping = config.model_dump(exclude=elsewhere | measured | servers)
    if config.init == "search" and config.learned > 1:
        shaping["summary"] = config.summary  # one of the texts that the search compares
    if config.init_files():
        shaping["init"] = [file_digest(read_limited(file)) for file in config.init_files()]
    file = ae_file(config.ae) if config.ae else None
    ae = file_sha256(file) if file and file.exists() else None
    key = {
        **shaping,
        "ae": ae,
        "plan": "focused" if config.words_trained else "epochs",
        "served": config.teacher_url is not None or config.teacher == "vllm",
        "prompt": prompt,
        "model": str(model.fingerprint),
        "queries": [query.chat_json() for query in training],
    }
    return digest_of(key)


def quality(evaluation: Evaluation, verdict: Verdict) -> dict[str, Any]:
    """The figures that travel in the manifest; null where a figure is no finite number."""
    answers = evaluation.answers.to_json()
    found = {
        "verdict": verdict.to_json(),
        "rho": round(evaluation.rho, 4),
        "rho_interval": [round(bound, 4) for bound in evaluation.rho_interval],
        "rho_serving": round(evaluation.rho_serving, 4),
        "kl": {name: round(figures["kl"], 4) for name, figures in evaluation.arms.items()},
        "gain_retained": round(evaluation.gain_retained, 4),
        "top1": round(evaluation.arms["be"]["top1"], 4),
        "n_queries": evaluation.n_queries,
        "n_tokens": evaluation.n_tokens,
        **({name: answers[name] for name in _ANSWERS} if evaluation.answers.answers else {}),
    }
    return {name: finite(value) for name, value in found.items()}


def make_token(
    config: TrainConfig,
    model: FrozenModel,
    prompt: str,
    prompt_tokens: int,
    vectors_KH: Tensor,
    start: Start,
    evaluation: Evaluation,
    readable: int,
) -> Token:
    """The token of trained vectors [k, H] float32, with all that its manifest tells."""
    recipe = config.recipe()
    recipe["lr"] = config.peak_lr(model.embedding_rms)
    if start.text is not None and config.with_prompt:
        recipe["start"] = start.text  # words of the prompt
    manifest = Manifest(
        id=config.id,
        base_model=BaseModelRef.of(model.name, model.revision, model.fingerprint),
        hidden_size=model.hidden_size,
        k=len(vectors_KH),
        literal=len(start.literal),
        placement=config.placement,
        template_digest=model.fingerprint.chat_template,
        template_kwargs=model.template_kwargs,
        prompt=PromptRef(
            sha256=prompt_sha256(prompt), tokens=prompt_tokens, text=prompt if config.with_prompt else None
        ),
        recipe=recipe,
        seed=config.seed,
        quality={**quality(evaluation, judge(evaluation)), "readable": readable},
        versions=versions(),
    )
    return Token(manifest, vectors_KH.numpy())


def versions() -> dict[str, str]:
    """Versions of what made a token."""
    return {
        "be-serve": be_serve.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
