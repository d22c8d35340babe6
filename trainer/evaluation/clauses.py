"""The clauses of a prompt: what each does to the answers, and how much of it a token keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.text import sentences

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.evaluation.arms import Scores

MAX_CLAUSES = 16
CLAUSE_QUERIES = 16
"""Most sentences that are looked at, and queries on which: each costs a pass behind a prompt of its own."""
# Tokens of an answer on which a clause bears: leaving it out makes them this much less likely (nats).
_BEARS = 0.5
_MIN_TOKENS = 5


@dataclass(frozen=True)
class Clause:
    """One sentence of a prompt, and the prompt without it."""

    text: str
    left_out: str


@dataclass(frozen=True)
class ClauseEffect:
    """What a clause does to the full prompt's answers.

    `kl` is KL(full || without the clause) in nats a token; `tokens` counts the answer
    tokens on which it bears; `retained` is the share of its log-likelihood gain on
    those that the token keeps: 1 all, 0 or less none, None where it bears on too few.
    """

    text: str
    kl: float
    tokens: int
    retained: float | None

    def to_json(self) -> dict[str, Any]:
        """Part of `eval --json`."""
        return {"text": self.text, "kl": self.kl, "tokens": self.tokens, "retained": self.retained}


def prompt_clauses(prompt: str) -> list[Clause]:
    """The prompt's sentences in order, each with the prompt that lacks it. A sentence said twice is left out twice."""
    return [Clause(text, prompt.replace(text, "").strip()) for text in dict.fromkeys(sentences(prompt))]


def clause_answers(prompt: str, queries: int) -> int:
    """How many answers are scored to measure the clauses of a prompt: what a progress bar counts."""
    return min(queries, CLAUSE_QUERIES) * min(len(prompt_clauses(prompt)), MAX_CLAUSES)


def clause_effect(clause: Clause, full_nll_N: Tensor, without: Scores, be_nll_N: Tensor) -> ClauseEffect:
    """The effect of a clause on answer tokens [N], and what the token's likelihoods keep of it."""
    gain_N = without.nll_N - full_nll_N
    bears = gain_N > _BEARS
    count = int(bears.sum())
    retained = None
    if count >= _MIN_TOKENS:
        retained = float((without.nll_N - be_nll_N)[bears].sum() / gain_N[bears].sum())
    return ClauseEffect(clause.text, float(without.kl_N.mean()), count, retained)
