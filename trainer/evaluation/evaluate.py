"""How far a token is from the prompt it replaces: KL(full || arm) on the full arm's own greedy answers.

Arms: `none` (an empty system turn), `template_default` (no system message),
`summary` (a short text in the prompt's place), `full`, `be`, and `be_serving`
(the vectors rounded to the serving dtype). rho = KL(be) / KL(none): 0 is the
full prompt, 1 is nothing learned. These figures stand on the first 64 tokens of an
answer; `trainer.evaluation.answers` goes to the answers' end.
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
from trainer.data.teacher import Teacher
from trainer.evaluation.answers import (
    KL,
    WholeAnswers,
    answer_steps,
    kl_sums,
    share,
    whole_answers,
)
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm, chats, rho_interval, score_arms
from trainer.evaluation.checkers import Check
from trainer.evaluation.clauses import (
    CLAUSE_QUERIES,
    MAX_CLAUSES,
    ClauseEffect,
    clause_answers,
    clause_effect,
    prompt_clauses,
)
from trainer.evaluation.compliance import Compliance, measure_compliance
from trainer.evaluation.pairwise import Tally
from trainer.evaluation.signatures import signatures
from trainer.evaluation.writing import Written, chosen_queries, room, write_answers
from trainer.model.frozen import DTYPES
from trainer.model.generate import Progress
from trainer.text import recites, without_marks


@dataclass
class Evaluation:
    """Figures of one token. `arms` maps an arm to its kl, top1, first_token_kl and nll."""

    k: int
    arms: dict[str, dict[str, float]]
    n_queries: int
    n_tokens: int
    samples: list[dict[str, str]] = field(default_factory=list)
    """Query and answers side by side, as far as they were written: to their end, or `RESPONSE_TOKENS`."""
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
    answers: WholeAnswers = field(default_factory=WholeAnswers)
    """Facts, ends, loops and KL of whole answers (`trainer.evaluation.answers`)."""
    training_queries: dict[str, int] = field(default_factory=dict)
    """For sentences of the prompt, on how many training queries they bear (`trainer.optim.places`)."""
    by_query: dict[int, KL] = field(default_factory=dict)
    """KL on the first 64 tokens, of which rho is the ratio, by the number of each query that is scored."""

    @property
    def rho(self) -> float:
        return _ratio(self.arms["be"]["kl"], self.arms["none"]["kl"])

    @property
    def rho_serving(self) -> float:
        return _ratio(self.arms["be_serving"]["kl"], self.arms["none"]["kl"])

    @property
    def rho_default(self) -> float | None:
        """KL(be) / KL(template_default); None where that arm was not measured, or is the full prompt."""
        default = self.arms.get("template_default")
        return share(self.arms["be"]["kl"], default["kl"]) if default else None

    @property
    def recital_share(self) -> float:
        """The share of the queries to which the full prompt's answer recites the prompt."""
        return self.recitals / max(self.n_queries + self.recitals, 1)

    @property
    def gain_retained(self) -> float:
        """(BE - none) / (full - none) in the log-likelihood of the full prompt's own answers."""
        none, be, full = (self.arms[name]["nll"] for name in ("none", "be", "full"))
        return _ratio(none - be, none - full)

    def to_json(self) -> dict[str, Any]:
        """The object of `eval --json`. A figure that is no finite number is null."""
        found: dict[str, Any] = {
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
            "training_queries": [{"text": text, "queries": n} for text, n in self.training_queries.items()],
            "clauses": [effect.to_json() for effect in self.clauses],
            "samples": self.samples,
            "rho_default": self.rho_default,
            **self.answers.to_json(),
            "by_query": [self._query_json(i, kl) for i, kl in self.by_query.items()],
        }
        return {name: finite(value) for name, value in found.items()}

    def _query_json(self, number: int, kl: KL) -> dict[str, Any]:
        whole = self.answers.kl.get(number)
        return {**kl.to_json(), **({"answer": whole.to_json()} if whole else {})}


def _ratio(part: float, whole: float) -> float:
    """part / whole; NaN where the prompt moves nothing, so that there is nothing to divide by."""
    return part / whole if whole else math.nan


def finite(value: Any) -> Any:
    """A JSON value with None in place of NaN and infinities, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def evaluation_steps(
    prompt: str,
    queries: int,
    *,
    summary: bool,
    clauses: bool,
    answer_tokens: int = 0,
    answer_queries: int | None = None,
) -> int:
    """How often `evaluate` calls its `progress` with 1, about: the total of a progress bar."""
    arms = 7 if summary else 6
    whole = answer_steps(queries, answer_queries) if answer_tokens else 0
    return queries * arms + (clause_answers(prompt, queries) if clauses else 0) + whole


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
    answer_tokens: int = 0,
    answer_queries: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the vectors [k, H] float32 with the full prompt, no prompt and the other arms.

    With `clauses` each sentence of the prompt is left out in turn, on `CLAUSE_QUERIES`
    queries, to see what it does and how much of that the token keeps. `checks` are held
    against answers of up to `check_tokens` tokens of no prompt, the full prompt and the
    token. With `answer_tokens`, answers of these arms are written to their end or to so many
    tokens, on at most `answer_queries` of the queries, probes first. Facts, ends and loops
    are counted on all of these, recitals among them: a user reads those answers, too.
    `progress` is called with the number of answers done.
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
    compared = {}
    if checks or answer_tokens:
        full = Arm.of_ids(model, [teacher.chat_ids(query) for query in queries])
        compared = {"none": arms["none"], "full": full, "be": arms["be"]}
    none_kl, be_kl = (scores[name].kl_N.split(lengths_Q.tolist()) for name in ("none", "be"))
    by_query = {i: KL(float(none_kl[n].sum()), float(be_kl[n].sum()), lengths[i]) for n, i in enumerate(kept)}
    made: Written = {}
    whole = WholeAnswers()
    if answer_tokens:
        answer_tokens = room(teacher, compared, answer_tokens)
        chosen = chosen_queries(queries, answer_queries)
        begun = {i: reference[i].response for i in chosen}
        unmarked = Arm.of_ids(model, chats(model, queries, without_marks(teacher.prompt)))
        written = {**compared, "unmarked": unmarked}
        made = write_answers(teacher, written, chosen, answer_tokens, begun=begun, progress=progress)
        scored = {i: made["full"][i] for i in by_query if i in chosen}
        sums = kl_sums(teacher, compared, queries, scored, by_query, progress)
        whole = whole_answers(teacher, queries, made, answer_tokens, sums)

    def ids_of(name: str, arm: Arm, wanted: Sequence[int], limit: int) -> list[list[int]]:
        """Greedy answers, from the whole ones where these reach as far."""
        whole = made.get(name, {})
        if all(i in whole and (len(whole[i]) >= limit or teacher.ended(whole[i])) for i in wanted):
            return [whole[i][:limit] for i in wanted]
        return arm.prefix.generate([arm.suffixes[i] for i in wanted], limit)

    # A summary's answers are not written to their end; they may get as long as the longest of the full prompt.
    whole_of = made if answer_tokens >= RESPONSE_TOKENS else {}
    longest = max((len(ids) for ids in whole_of.get("full", {}).values()), default=RESPONSE_TOKENS)

    def shown(name: str, wanted: Sequence[int]) -> list[str]:
        """Answers as texts, to their end where that was written."""
        found = dict(whole_of.get(name, {}))
        missing = [i for i in wanted if i not in found]
        if name == "full":
            found |= {i: reference[i].response for i in missing}
        elif missing:
            limit = RESPONSE_TOKENS if found else longest
            found |= zip(missing, ids_of(name, arms[name], missing, limit), strict=True)
        return [teacher.text(found[i]) for i in wanted]

    sampled = kept[:samples]
    beside = ["full", *(name for name in ("none", "summary", "be") if name in arms)]
    texts = {name: shown(name, sampled) for name in beside}
    answers = [{"query": queries[i].text, **{name: texts[name][n] for name in beside}} for n, i in enumerate(sampled)]
    compliance = None
    if checks:
        everyone = range(len(queries))
        compliance = measure_compliance(
            checks,
            {
                name: [teacher.text(ids) for ids in ids_of(name, arm, everyone, check_tokens)]
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
        signatures={name: signatures([a[name] for a in answers], teacher.prompt) for name in beside},
        clauses=[
            clause_effect(
                part, effects["full"].nll_N, effects[f"without {i}"], everything["be"].of(asked, lengths).nll_N
            )
            for i, part in enumerate(parts)
        ],
        answers=whole,
        by_query=by_query,
    )


def _mean_length(answers: Sequence[dict[str, str]], arm: str) -> float:
    return sum(len(answer[arm]) for answer in answers) / len(answers)
