"""Methods of one shape on one prompt: the same data, steps and start, trained side by side and measured alike.

kd        distillation (Eq. 3), what `train` does
joint     reconstruction through [AE] and distillation together (Eq. 4)
stages    reconstruction through [AE], then distillation (the paper's order)
memory    reconstruction of the prompt without [AE], a memory token
pt        prompt tuning: cross-entropy of the full prompt's own answers
truncate  the prompt's first k tokens, untrained
summary   a text of your own in the prompt's place, untrained
fewshot   the prompt with k questions and the model's own answers before the user's, untrained
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from be_serve.core.errors import InputError
from trainer.data.queries import Query
from trainer.data.teacher import Example, Teacher
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm, Scores, chats, rho_interval, score_arms
from trainer.model.generate import common_prefix
from trainer.model.soft_token import soft_token
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Distil, Joint, Memorise, Reconstruct, Stage, Tune
from trainer.optim.starts import Search

TRAINED = ("kd", "joint", "stages", "memory", "pt")
UNTRAINED = ("truncate", "summary", "fewshot")


@dataclass(frozen=True)
class Method:
    """A method and its number of vectors or tokens, written `kd:4`; a summary has the length of its text."""

    name: str
    k: int

    def __str__(self) -> str:
        return self.name if self.name == "summary" else f"{self.name}:{self.k}"

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read `name:k`. Raises InputError."""
        name, _, k = text.strip().partition(":")
        if name not in TRAINED + UNTRAINED or (k and not k.isdecimal()) or k == "0":
            raise InputError(f"No method {text!r}: use {', '.join(TRAINED + UNTRAINED)}, with :k behind the name.")
        return cls(name, int(k or 1))


@dataclass(frozen=True)
class Setting:
    """What all methods share. The paper's lambda is used where a loss has two parts."""

    steps: int = 240
    batch_size: int = 2
    lr: float = 1e-2
    rank: int = 64
    lam: float = 0.9
    seed: int = 0
    search_queries: int = 8


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    method: str
    k: int
    figures: dict[str, float]
    rho: float
    rho_interval: tuple[float, float]
    gain_retained: float

    def to_json(self) -> dict[str, Any]:
        """A line of `compare --json`."""
        return {
            "method": self.method,
            "k": self.k,
            **self.figures,
            "rho": self.rho,
            "rho_interval": list(self.rho_interval),
            "gain_retained": self.gain_retained,
        }


def compare(
    teacher: Teacher,
    examples: Sequence[Example],
    held_out: Sequence[Query],
    methods: Sequence[Method],
    setting: Setting,
    folder: Path,
    *,
    ae_1H: Tensor | None = None,
    summary: str | None = None,
    quiet: bool = False,
) -> list[Line]:
    """Train and measure every method; `none` and `full` frame the table.

    Queries to which the full prompt's answer recites the prompt are left out.

    Raises InputError for a method that lacks what it needs, Stopped after a signal;
    the same call then continues.
    """
    _check(methods, ae_1H, summary)
    model = teacher.model
    reference = [e for e in teacher.examples(held_out, response_tokens=RESPONSE_TOKENS) if not teacher.recites(e)]
    examples = [example for example in examples if not teacher.recites(example)]
    if not reference or not examples:
        raise InputError("Every response recites the prompt: give other queries.")
    held_out = [example.query for example in reference]
    prompt_ids = model.slots.prompt_ids(teacher.prompt, template_kwargs=model.template_kwargs)
    search = Search(model, examples[: setting.search_queries], "system")
    starts = {
        k: model.embed(search.run(prompt_ids, k)[0]).float()
        for k in sorted({m.k for m in methods if m.name in TRAINED})
    }
    trainings = {}
    for method in methods:
        if method.name in TRAINED:
            place = folder / str(method).replace(":", "-")
            place.mkdir(parents=True, exist_ok=True)
            trainings[method] = Training(
                soft_token(starts[method.k].to(model.device), setting.rank, setting.seed),
                _stages(teacher, examples, method, setting, ae_1H),
                Optimisation(setting.lr),
                folder=place,
                digest=_digest(teacher, examples, method, setting, ae_1H),
            )
    fit(model, list(trainings.values()), quiet=quiet)
    for method, training in trainings.items():
        if training.fault:
            raise InputError(f"{method}: {training.fault}")

    ks = {str(m): m.k for m in methods}
    arms: dict[str, Arm] = {"none": Arm.of_ids(model, chats(model, held_out, ""))}
    for method in methods:
        if method in trainings:
            vectors_KH = trainings[method].token.vectors.detach()
        elif method.name == "truncate":
            vectors_KH = model.embed(prompt_ids[: method.k]).float()
        elif method.name == "fewshot":
            shown = _with_examples(teacher, examples[: method.k], held_out)
            arms[str(method)], ks[str(method)] = Arm.of_ids(model, shown), common_prefix(shown)
            continue
        else:
            arms[str(method)] = Arm.of_ids(model, chats(model, held_out, summary))
            continue
        arms[str(method)] = Arm.of_vectors(model, vectors_KH, held_out, "system")
    scores = score_arms(model, reference, arms)
    lengths_Q = torch.tensor([len(example.response) for example in reference])
    if summary is not None:
        ks["summary"] = len(model.tokenizer.encode(summary, add_special_tokens=False))
    ks.update(none=0, full=len(prompt_ids))
    return [_row(name, ks[name], scores, lengths_Q) for name in ("none", *(str(m) for m in methods), "full")]


def _with_examples(teacher: Teacher, examples: Sequence[Example], queries: Sequence[Query]) -> list[list[int]]:
    """Ids of chats under the prompt with earlier questions and the teacher's answers in front."""
    turns = [
        turn
        for example in examples
        for turn in (*example.query.messages, {"role": "assistant", "content": teacher.text(example.response)})
    ]
    return [teacher.chat_ids(Query((*turns, *query.messages))) for query in queries]


def _check(methods: Sequence[Method], ae_1H: Tensor | None, summary: str | None) -> None:
    for method in methods:
        if method.name in ("joint", "stages") and ae_1H is None:
            raise InputError(f"{method} needs an [AE] file (--ae); make one with `be-serve train-ae`.")
        if method.name == "summary" and not summary:
            raise InputError("The method `summary` needs its text (--summary).")


def _stages(
    teacher: Teacher, examples: Sequence[Example], method: Method, setting: Setting, ae_1H: Tensor | None
) -> list[tuple[Stage, int]]:
    model = teacher.model
    distil = Distil(model, examples, batch_size=setting.batch_size, seed=setting.seed)
    if method.name == "kd":
        return [(distil, setting.steps)]
    if method.name == "pt":
        return [(Tune(distil), setting.steps)]
    if method.name == "memory":
        return [(Memorise(model, model.tokenizer.encode(teacher.prompt, add_special_tokens=False)), setting.steps)]
    assert ae_1H is not None  # _check has seen to it
    reconstruct = Reconstruct(model, teacher.prompt, ae_1H)
    if method.name == "joint":
        return [(Joint(reconstruct, distil, setting.lam), setting.steps)]
    return [(reconstruct, setting.steps // 2), (distil, setting.steps - setting.steps // 2)]


def _digest(
    teacher: Teacher, examples: Sequence[Example], method: Method, setting: Setting, ae_1H: Tensor | None
) -> str:
    """Digest of all that decides the method's curve."""
    data = [[example.query.chat_json(), example.response] for example in examples]
    ae = ae_1H.tolist() if ae_1H is not None and method.name in ("joint", "stages") else None
    key = [str(method), dataclasses.asdict(setting), teacher.prompt, str(teacher.model.fingerprint), data, ae]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _row(name: str, k: int, scores: dict[str, Scores], lengths_Q: Tensor) -> Line:
    figures = {arm: scores[arm].means(lengths_Q) for arm in ("none", name, "full")}
    gain = figures["none"]["nll"] - figures["full"]["nll"]
    return Line(
        name,
        k,
        figures[name],
        figures[name]["kl"] / figures["none"]["kl"],
        rho_interval(scores[name].kl_N, scores["none"].kl_N, lengths_Q),
        (figures["none"]["nll"] - figures[name]["nll"]) / gain,
    )
