"""May this token be deployed? One word by stated thresholds, and the reasons.

    failed      the token is no better than leaving the prompt out or than a summary, or
                it shows a failure signature that the full prompt does not
    lossy       it keeps part of the behaviour: facts, ends of answers or clauses are lost
    deployable  none of these

The thresholds are a default for people who have none of their own; the figures
behind them travel in the manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.evaluation.evaluate import Evaluation

IGNORED_RHO = 0.9
"""From here on the token is hardly read: failed."""
MISLEADING_RHO = 1.1
"""Above, it is read, and leads elsewhere: failed."""
SIGNATURE_EXCESS = 0.3
"""Share of answers with a signature beyond the full prompt's own share: failed."""
SIGNATURE_ANSWERS = 8
"""Fewer answers than this say nothing about signatures."""
DEPLOYABLE_RHO = 0.25
DEPLOYABLE_GAIN = 0.85
"""Bounds on rho in the serving dtype and on gain retained; worse is lossy."""
RECITAL_SHARE = 0.05
"""Where more of the queries than this draw the prompt out, they count: rho with them decides."""
DEPLOYABLE_FACTS = 0.85
"""Share of the steady facts that only the full prompt brings; less is lossy (of `FACTS_LEAST` at least).

Facts that are lost with the prompt's punctuation show the model's margin, not the token's. Where fewer than half are
steady, all count.
"""
DEPLOYABLE_WORDS = 0.85
"""Where no fact was asked for: share of the steady words that only the prompt brings; less is lossy."""
DEPLOYABLE_STOPS = 0.9
STOP_ANSWERS = 5
"""Share of the answers that end where the full prompt's end; less is lossy (of so many of these at least)."""
DEPLOYABLE_LOOPS = 0.05
"""Share of answers that loop beyond the full prompt's own share; more is lossy (of `SIGNATURE_ANSWERS` at least)."""
DRIFT_RHO = 0.2
DRIFT_KL = 0.02
"""A token whose KL grows over a conversation by more than this, and its rho by more than that, is lossy.

Rho alone does not tell: once the history holds answers in the prompt's voice, the prompt
itself hardly changes the next one, and rho's denominator vanishes.
"""
CLAUSE_KL = 0.02
CLAUSE_RETAINED = 0.5
"""A clause with at least this effect, of which less than this share is kept, is lost."""


@dataclass(frozen=True)
class Verdict:
    """`status` and, for people, why; `lost` are sentences of the prompt, with the share that is kept."""

    status: Literal["deployable", "lossy", "failed"]
    reasons: list[str]
    lost: list[tuple[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What the manifest holds under `quality.verdict`: no word of the prompt, which may be secret."""
        count = len(self.lost)
        lost = [f"{count} sentence{'s' * (count > 1)} of the prompt lost"] if count else []
        return {"status": self.status, "reasons": [*self.reasons, *lost]}

    def named(self) -> list[str]:
        """All reasons, the lost sentences word for word."""
        return [*self.reasons, *(f"keeps {max(kept, 0.0):.0%} of {text!r}" for text, kept in self.lost)]

    def __str__(self) -> str:
        return f"{self.status}: {'; '.join(self.named())}" if self.named() else self.status


def judge(evaluation: Evaluation) -> Verdict:
    """The verdict on an evaluated token."""
    figures = [
        _rho(evaluation)[0],
        evaluation.rho_serving,
        evaluation.gain_retained,
        *(arm["kl"] for arm in evaluation.arms.values()),
    ]
    if not all(map(math.isfinite, figures)):
        return Verdict("failed", ["its figures are not finite: try --dtype bfloat16 or float32"])
    failures = _failures(evaluation)
    if failures:
        return Verdict("failed", failures)
    losses = _losses(evaluation)
    lost = [
        (c.text, c.retained)
        for c in evaluation.clauses
        if c.kl >= CLAUSE_KL and c.retained is not None and c.retained < CLAUSE_RETAINED
    ]
    return Verdict("lossy" if losses or lost else "deployable", losses, lost)


def _rho(evaluation: Evaluation) -> tuple[float, str]:
    """The rho that decides, and words about it for a reason.

    Leaving out the recitals is right where they are an accident. Where they are many, a
    prompt is one that answers are meant to quote, and without them rho flatters the token.
    """
    if evaluation.recital_share > RECITAL_SHARE:
        return evaluation.rho_with_recitals, " with the answers that recite the prompt"
    return evaluation.rho_serving, ""


def _failures(evaluation: Evaluation) -> list[str]:
    found = []
    rho, told = _rho(evaluation)
    kl = {name: arm["kl"] for name, arm in evaluation.arms.items()}
    if rho > MISLEADING_RHO:
        found.append(f"further from the full prompt than no prompt at all (rho {rho:.2f}{told})")
    elif rho >= IGNORED_RHO:
        found.append(f"the model hardly reads the token (rho {rho:.2f}{told})")
    elif "summary" in kl and kl["be_serving"] >= kl["summary"]:
        found.append(f"the summary does as well (KL {kl['summary']:.3f} against {kl['be_serving']:.3f})")
    if len(evaluation.samples) >= SIGNATURE_ANSWERS:
        ours, full = evaluation.signatures["be"], evaluation.signatures["full"]
        found += [
            f"{name.replace('_', ' ')} in {ours[name]:.0%} of the answers (full prompt: {full[name]:.0%})"
            for name in ours
            if ours[name] - full[name] >= SIGNATURE_EXCESS
        ]
    return found


def _losses(evaluation: Evaluation) -> list[str]:
    found = _answer_losses(evaluation)
    rho, told = _rho(evaluation)
    if rho > DEPLOYABLE_RHO:
        found.append(f"rho {rho:.2f}{told}, above {DEPLOYABLE_RHO}")
    if evaluation.gain_retained < DEPLOYABLE_GAIN:
        found.append(f"gain retained {evaluation.gain_retained:.2f}, below {DEPLOYABLE_GAIN}")
    if not evaluation.answers.answers:
        found.append("no whole answers were written: facts, ends and loops are unknown (--answer-tokens)")
    if not evaluation.samples:
        found.append("no answers were looked at for failure signatures (--samples)")
    if evaluation.turns:
        first, worst = evaluation.turns[0], max(evaluation.turns[1:], key=lambda turn: turn["be"])
        if worst["be"] - first["be"] > DRIFT_KL and worst["rho"] - first["rho"] > DRIFT_RHO:
            found.append(
                f"persona drift: KL {first['be']:.3f} (rho {first['rho']:.2f}) in turn 1, "
                f"{worst['be']:.3f} (rho {worst['rho']:.2f}) in turn {worst['turn']}"
            )
    return found


def _answer_losses(evaluation: Evaluation) -> list[str]:
    """What a user would see in whole answers, where they were written."""
    answers = evaluation.answers
    facts, stops, loops = answers.facts, answers.stops, answers.loops
    found = []
    if answers.answers and not facts.probes:
        words = answers.words
        if words.kept is None:
            found.append("no fact was asked for: give rows with `fact` (--test-queries)")
        elif words.kept < DEPLOYABLE_WORDS:
            found.append(f"says {words.be_steady} of the {words.steady} words that the prompt brings into answers")
    if facts.kept_steady is not None and 2 * facts.steady >= facts.n:
        if facts.kept_steady < DEPLOYABLE_FACTS:
            found.append(f"says {facts.be_steady} of the {facts.steady} facts that the full prompt says steadily")
    elif facts.kept is not None and facts.kept < DEPLOYABLE_FACTS:
        found.append(f"says {facts.be} of the {facts.n} facts that the full prompt says")
    if stops.full >= STOP_ANSWERS and stops.kept / stops.full < DEPLOYABLE_STOPS:
        found.append(f"{stops.full - stops.kept} of {stops.full} answers never end where the full prompt's end")
    if answers.answers >= SIGNATURE_ANSWERS and (loops["be"] - loops["full"]) / answers.answers > DEPLOYABLE_LOOPS:
        found.append(
            f"{loops['be']} of {answers.answers} answers go round in a loop (of the full prompt's: {loops['full']})"
        )
    return found
