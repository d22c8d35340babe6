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
from be_serve.core.errors import InputError
from be_serve.core.slots import Message
from trainer.checkers import Check
from trainer.clauses import CLAUSE_QUERIES, MAX_CLAUSES, ClauseEffect, clause_effect, prompt_clauses
from trainer.compliance import Compliance, measure_compliance
from trainer.generate import Prefix, Progress, common_prefix
from trainer.judge import Tally
from trainer.model import DTYPES, FrozenModel
from trainer.queries import Query
from trainer.signatures import recites, signatures
from trainer.soft_token import Row
from trainer.teacher import Example, Teacher

RESPONSE_TOKENS = 64
_CHUNK = 256


@dataclass(frozen=True)
class Arm:
    """What an arm puts before each response: rows shared by all queries, then ids."""

    prefix: Prefix
    suffixes: list[list[int]]

    @classmethod
    def of_ids(cls, model: FrozenModel, chats: list[list[int]]) -> Arm:
        shared = common_prefix(chats)
        return cls(Prefix(model, model.embed(chats[0][:shared])), [chat[shared:] for chat in chats])

    @classmethod
    def of_vectors(cls, model: FrozenModel, vectors_KH: Tensor, queries: Sequence[Query], placement: Placement) -> Arm:
        slots = [
            model.slots.render(q.messages, placement=placement, template_kwargs=model.template_kwargs) for q in queries
        ]
        before = slots[0].before
        if any(slot.before != before for slot in slots):
            raise InputError("The chat template prints query text before the system turn; it cannot be evaluated.")
        rows = [model.embed(before)] if before else []
        rows.append(vectors_KH.to(model.device, model.dtype))
        return cls(Prefix(model, torch.cat(rows)), [slot.after for slot in slots])


@dataclass(frozen=True)
class Scores:
    """Figures [N] of one arm for each response token of the full prompt's answers."""

    kl_N: Tensor
    top1_N: Tensor
    nll_N: Tensor

    def of(self, chosen: Sequence[int], lengths: Sequence[int]) -> Scores:
        """The figures of the chosen answers alone; `lengths` are all answers'."""

        def pick(values_N: Tensor) -> Tensor:
            parts = values_N.split(list(lengths))
            return torch.cat([parts[i] for i in chosen])

        return Scores(pick(self.kl_N), pick(self.top1_N), pick(self.nll_N))

    def means(self, lengths: Tensor) -> dict[str, float]:
        """Means over all tokens, and over the first token of each answer; `lengths` [Q] are the answers'."""
        firsts = lengths.cumsum(0) - lengths
        return {
            "kl": float(self.kl_N.mean()),
            "top1": float(self.top1_N.mean()),
            "first_token_kl": float(self.kl_N[firsts].mean()),
            "nll": float(self.nll_N.mean()),
        }


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
    """Failure signatures by arm: shares of the sampled answers (`trainer.signatures`)."""
    compliance: Compliance | None = None
    """How often answers have the habits that a program can check (`trainer.compliance`)."""
    recitals: int = 0
    """Queries to which the full prompt's answer recites the prompt: in no figure but `rho_with_recitals`."""
    recitals_be: int = 0
    """To how many of these queries the token's answer recites it, too."""
    rho_with_recitals: float = math.nan
    clauses: list[ClauseEffect] = field(default_factory=list)
    """What leaving out each clause of the prompt does, and how much of it the token keeps."""
    turns: list[dict[str, float]] = field(default_factory=list)
    """KL of each turn of a conversation (`trainer.robustness`)."""
    off_topic: dict[str, float] = field(default_factory=dict)
    """KL on questions that have nothing to do with the prompt (`trainer.robustness`)."""

    judged: dict[str, Tally] = field(default_factory=dict)
    """How a judge model saw the token's answers beside the full prompt's and those without one (`trainer.judge`)."""

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


def rho_interval(be_N: Tensor, none_N: Tensor, lengths_Q: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of rho, from `draws` resamples of the queries."""
    sums = [torch.stack([part.sum() for part in kl_N.split(lengths_Q.tolist())]) for kl_N in (be_N, none_N)]
    drawn = torch.randint(len(lengths_Q), (draws, len(lengths_Q)), generator=torch.Generator().manual_seed(0))
    ratios = sums[0][drawn].sum(1) / sums[1][drawn].sum(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _mean_length(answers: Sequence[dict[str, str]], arm: str) -> float:
    return sum(len(answer[arm]) for answer in answers) / len(answers)


def chats(model: FrozenModel, queries: Sequence[Query], system: str | None) -> list[list[int]]:
    chats = []
    for query in queries:
        messages: list[Message] = [*query.messages]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        chats.append(model.slots.encode_chat(messages, template_kwargs=model.template_kwargs))
    return chats


def score_arms(
    model: FrozenModel, reference: Sequence[Example], arms: dict[str, Arm], progress: Progress | None = None
) -> dict[str, Scores]:
    """Figures of each arm, and of `full`, on the full prompt's answers."""
    states = {"full": [e.states_TH for e in reference]}
    for name, arm in arms.items():
        rows = [Row((), suffix, e.response) for suffix, e in zip(arm.suffixes, reference, strict=True)]
        states[name] = arm.prefix.states(rows, progress)
    return score(model, reference, states)


def score(model: FrozenModel, reference: Sequence[Example], states: dict[str, list[Tensor]]) -> dict[str, Scores]:
    """Each arm's figures a token, from float32 logits; `states` holds the arm `full`."""
    flat = {name: torch.cat(found) for name, found in states.items()}
    targets_N = torch.tensor([t for e in reference for t in e.response], device=model.device)
    found: dict[str, list[Tensor]] = {name: [] for name in states}
    with torch.no_grad():
        for at in torch.arange(len(targets_N)).split(_CHUNK):
            full_nV = model.head(flat["full"][at].to(model.device).float()).log_softmax(-1)
            p_nV, best_n = full_nV.exp(), full_nV.argmax(-1)
            for name, arm_NH in flat.items():
                # One arm at a time: an arm's logits are as large as all else together.
                arm_nV = full_nV if name == "full" else model.head(arm_NH[at].to(model.device).float()).log_softmax(-1)
                kl_n = (p_nV * (full_nV - arm_nV)).sum(-1)
                top1_n = (best_n == arm_nV.argmax(-1)).float()
                nll_n = -arm_nV.gather(1, targets_N[at, None])[:, 0]
                found[name].append(torch.stack([kl_n, top1_n, nll_n]).cpu())
    return {name: Scores(*torch.cat(parts, dim=1)) for name, parts in found.items()}


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
