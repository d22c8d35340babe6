"""How far a token is from the prompt it replaces: KL(full || arm) on the full arm's own greedy answers.

Arms: `none` (an empty system turn), `template_default` (no system message),
`summary` (a short text in the prompt's place), `full`, `be`, and `be_serving`
(the vectors rounded to the serving dtype). rho = KL(be) / KL(none): 0 is the
full prompt, 1 is nothing learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from be_serve.core.artifact import Placement
from trainer.data.queries import Query
from trainer.data.teacher import Example, Teacher
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm, chats, rho_interval, score_arms
from trainer.evaluation.checkers import Check
from trainer.evaluation.clauses import CLAUSE_QUERIES, MAX_CLAUSES, ClauseEffect, clause_effect, prompt_clauses
from trainer.evaluation.compliance import Compliance, measure_compliance
from trainer.evaluation.pairwise import Tally
from trainer.evaluation.signatures import signatures
from trainer.model.frozen import DTYPES
from trainer.model.generate import Progress
from trainer.text import recites


@dataclass
class Evaluation:
    """Figures of one token. `arms` maps an arm to its kl, top1, first_token_kl and nll."""

    k: int
    arms: dict[str, dict[str, float]]
    n_queries: int
    n_tokens: int
    samples: list[dict[str, str]] = field(default_factory=list)
    rho_interval: tuple[float, float] = (math.nan, math.nan)
    """95 % bootstrap interval of rho over the queries."""
    length_ratio: float = math.nan
    """Mean length of the token's sampled answers over the full prompt's, in characters."""
    signatures: dict[str, dict[str, float]] = field(default_factory=dict)
    """Failure signatures by arm: shares of the sampled answers (`trainer.evaluation.signatures`)."""
    compliance: Compliance | None = None
    """How often answers have the habits that a program can check (`trainer.evaluation.compliance`)."""
    recitals: int = 0
    """Queries to which the full prompt's answer recites the prompt: in no figure but `rho_with_recitals`."""
    recitals_be: int = 0
    """To how many of these queries the token's answer recites it, too."""
    rho_with_recitals: float = math.nan
    clauses: list[ClauseEffect] = field(default_factory=list)
    """What leaving out each clause of the prompt does, and how much of it the token keeps."""
    turns: list[dict[str, float]] = field(default_factory=list)
    """KL of each turn of a conversation (`trainer.evaluation.robustness`)."""
    off_topic: dict[str, float] = field(default_factory=dict)
    """KL on questions that have nothing to do with the prompt (`trainer.evaluation.robustness`)."""

    judged: dict[str, Tally] = field(default_factory=dict)
    """How a judge model saw the token's answers beside the full prompt's and those without one."""

    @property
    def rho(self) -> float:
        return self.arms["be"]["kl"] / self.arms["none"]["kl"]

    @property
    def rho_serving(self) -> float:
        return self.arms["be_serving"]["kl"] / self.arms["none"]["kl"]

    @property
    def gain_retained(self) -> float:
        """(BE - none) / (full - none) in the log-likelihood of the full prompt's own answers."""
        none, be, full = (self.arms[name]["nll"] for name in ("none", "be", "full"))
        return (none - be) / (none - full)

    def to_json(self) -> dict[str, Any]:
        """The object of `eval --json` (CONTRACT)."""
        found = {
            "k": self.k,
            "rho": self.rho,
            "rho_interval": list(self.rho_interval),
            "rho_serving": self.rho_serving,
            "recitals": self.recitals,
            "recitals_be": self.recitals_be,
            "rho_with_recitals": self.rho_with_recitals,
            "gain_retained": self.gain_retained,
            "arms": self.arms,
            "n_queries": self.n_queries,
            "n_tokens": self.n_tokens,
            "length_ratio": self.length_ratio,
            "signatures": self.signatures,
            "compliance": None if self.compliance is None else self.compliance.to_json(),
            "turns": self.turns,
            "off_topic": self.off_topic,
            "judged": {rival: tally.to_json() for rival, tally in self.judged.items()},
            "clauses": [effect.to_json() for effect in self.clauses],
            "samples": self.samples,
        }
        return found


def evaluate(
    teacher: Teacher,
    queries: Sequence[Query],
    vectors_KH: Tensor,
    *,
    placement: Placement = "system",
    summary: str | None = None,
    serving_dtype: str = "bfloat16",
    samples: int = 3,
    clauses: bool = False,
    checks: Sequence[Check] = (),
    check_tokens: int = 256,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the vectors [k, H] float32 with the full prompt, no prompt and the other arms.

    With `clauses` each sentence of the prompt is left out in turn, on `CLAUSE_QUERIES`
    queries, to see what it does and how much of that the token keeps. `checks` are held
    against answers of up to `check_tokens` tokens of no prompt, the full prompt and the
    token. `progress` is called with the number of answers done.
    """
    model = teacher.model
    reference = teacher.examples(queries, response_tokens=RESPONSE_TOKENS, progress=progress)
    rounded_KH = vectors_KH.to(DTYPES[serving_dtype]).to(torch.float32)
    arms = {
        "none": Arm.of_ids(model, chats(model, queries, "")),
        "template_default": Arm.of_ids(model, chats(model, queries, None)),
    }
    if summary:
        arms["summary"] = Arm.of_ids(model, chats(model, queries, summary))
    arms["be"] = Arm.of_vectors(model, vectors_KH, queries, placement)
    # A model that itself runs in the serving dtype rounds the vectors anyway: one arm, measured once.
    same = torch.equal(rounded_KH.to(model.dtype), vectors_KH.to(model.dtype))
    if not same:
        arms["be_serving"] = Arm.of_vectors(model, rounded_KH, queries, placement)
    parts = prompt_clauses(teacher.prompt)[:MAX_CLAUSES] if clauses else []

    everything = score_arms(model, reference, arms, progress)
    recited = [i for i, example in enumerate(reference) if teacher.recites(example)]
    kept = [i for i in range(len(reference)) if i not in recited] or list(range(len(reference)))
    told = arms["be"].prefix.generate([arms["be"].suffixes[i] for i in recited], RESPONSE_TOKENS) if recited else []
    lengths = [len(example.response) for example in reference]
    scores = {name: found.of(kept, lengths) for name, found in everything.items()}
    asked = kept[:CLAUSE_QUERIES]
    without = {
        f"without {i}": Arm.of_ids(model, chats(model, [queries[n] for n in asked], part.left_out))
        for i, part in enumerate(parts)
    }
    effects = score_arms(model, [reference[n] for n in asked], without, progress) if parts else {}
    if same:
        scores["be_serving"] = scores["be"]
        if progress:
            progress(len(queries))
    lengths_Q = torch.tensor([lengths[i] for i in kept])
    order = [name for name in ("none", "template_default", "summary", "full", "be", "be_serving") if name in scores]
    shown = [name for name in ("none", "summary", "be") if name in arms]
    answers = _samples(teacher, reference, kept[:samples], {name: arms[name] for name in shown})
    compliance = None
    if checks:
        full = Arm.of_ids(model, [teacher.chat_ids(query) for query in queries])
        compared = {"none": arms["none"], "full": full, "be": arms["be"]}
        compliance = measure_compliance(
            checks,
            {
                name: [teacher.text(ids) for ids in arm.prefix.generate(arm.suffixes, check_tokens)]
                for name, arm in compared.items()
            },
        )
    return Evaluation(
        k=len(vectors_KH),
        arms={name: scores[name].means(lengths_Q) for name in order},
        n_queries=len(kept),
        n_tokens=int(lengths_Q.sum()),
        recitals=len(recited),
        recitals_be=sum(recites(teacher.text(ids), teacher.prompt) for ids in told),
        rho_with_recitals=float(everything["be"].kl_N.mean() / everything["none"].kl_N.mean()),
        samples=answers,
        compliance=compliance,
        rho_interval=rho_interval(scores["be"].kl_N, scores["none"].kl_N, lengths_Q),
        length_ratio=_mean_length(answers, "be") / max(_mean_length(answers, "full"), 1.0) if answers else math.nan,
        signatures={name: signatures([a[name] for a in answers], teacher.prompt) for name in [*shown, "full"]},
        clauses=[
            clause_effect(
                part, effects["full"].nll_N, effects[f"without {i}"], everything["be"].of(asked, lengths).nll_N
            )
            for i, part in enumerate(parts)
        ],
    )


def _mean_length(answers: Sequence[dict[str, str]], arm: str) -> float:
    return sum(len(answer[arm]) for answer in answers) / len(answers)


def _samples(
    teacher: Teacher, reference: Sequence[Example], chosen: Sequence[int], arms: dict[str, Arm]
) -> list[dict[str, str]]:
    """Greedy answers to the chosen queries side by side."""
    if not chosen:
        return []
    answers = {
        name: arm.prefix.generate([arm.suffixes[i] for i in chosen], RESPONSE_TOKENS) for name, arm in arms.items()
    }
    return [
        {
            "query": reference[i].query.text,
            "full": teacher.text(reference[i].response),
            **{name: teacher.text(made[n]) for name, made in answers.items()},
        }
        for n, i in enumerate(chosen)
    ]
