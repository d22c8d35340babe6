"""Whole answers, to their end: do they say the facts, do they end, do they go round in a loop?

The first 64 tokens, on which rho is measured, tell none of this. Answers are greedy,
those of no prompt, the full prompt and the token, at most `cap` tokens long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.data.queries import Query
from trainer.data.teacher import Example, Teacher
from trainer.evaluation.arms import Arm, score
from trainer.evaluation.signatures import ends_in_loop
from trainer.evaluation.words import Words, brought, count_words
from trainer.model.generate import Progress
from trainer.model.soft_token import Row
from trainer.text import says

ARMS = ("none", "full", "be")
FACTS_LEAST = 5
"""With fewer facts that only the full prompt says, the token's share of them says nothing."""
_SCORED = 16  # answers whose hidden states are held at once
_STEPS = 2 * len(ARMS) + 1  # an answer of each arm is written and scored; that of the arm `unmarked` is written


@dataclass(frozen=True)
class Facts:
    """Counts of the probes whose fact an answer says.

    `n` are those that the full prompt's answer says and the answer without a prompt does
    not: what the prompt brings. `be` counts those of the `n` that the token says.

    A greedy answer of a small model says many a fact by a narrow margin. `steady` are those of
    the `n` that are said, too, when the prompt has lost its punctuation, which means nothing:
    a ceiling for `be`. `be_steady` counts those of the `steady` that the token says.
    """

    probes: int = 0
    full: int = 0
    none: int = 0
    n: int = 0
    be: int = 0
    steady: int = 0
    be_steady: int = 0

    @property
    def kept(self) -> float | None:
        """The share of the `n` that the token says; None where they are too few."""
        return self.be / self.n if self.n >= FACTS_LEAST else None

    @property
    def kept_steady(self) -> float | None:
        """The share of the `steady` that the token says; None where they are too few."""
        return self.be_steady / self.steady if self.steady >= FACTS_LEAST else None

    def to_json(self) -> dict[str, Any]:
        """`facts` of `eval --json`: `full` and `none` are shares of all probes, `be` and `ceiling` of the `n`."""
        full, none = (share(count, self.probes) for count in (self.full, self.none))
        ceiling = share(self.steady, self.n) if self.n >= FACTS_LEAST else None
        return {
            "probes": self.probes,
            "n": self.n,
            "full": full,
            "none": none,
            "be": self.kept,
            "ceiling": ceiling,
            "steady": {"n": self.steady, "be": self.kept_steady},
        }


@dataclass(frozen=True)
class Stops:
    """Counts of the answers that end before the cap; `kept` counts those of the token where the full prompt's end."""

    answers: int = 0
    full: int = 0
    be: int = 0
    kept: int = 0

    def to_json(self) -> dict[str, Any]:
        """`stop` of `eval --json`: shares; `kept` is a share of the answers where the full prompt's end."""
        return {
            "full": share(self.full, self.answers),
            "be": share(self.be, self.answers),
            "kept": share(self.kept, self.full),
        }


@dataclass(frozen=True)
class KL:
    """KL(full || none) and KL(full || be) of one answer, nats, summed over its `tokens`."""

    none: float
    be: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Part of `by_query` of `eval --json`."""
        return {"none": self.none, "be": self.be, "tokens": self.tokens}


@dataclass(frozen=True)
class WholeAnswers:
    """What the answers to `answers` queries tell, each up to `cap` tokens. By default none were written."""

    cap: int = 0
    answers: int = 0
    facts: Facts = Facts()
    stops: Stops = Stops()
    loops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))
    """How many answers of an arm go round in a loop, as a whole or at their end."""
    words: Words = field(default_factory=Words)
    """Names and numbers that the prompt brings into answers (`trainer.evaluation.words`)."""
    kl: dict[int, KL] = field(default_factory=dict)
    """KL over the whole of the full prompt's answers, by the number of the query."""

    @property
    def rho(self) -> float | None:
        """KL(be) / KL(none) over the whole answers; None where there is nothing to divide by."""
        return share(sum(kl.be for kl in self.kl.values()), sum(kl.none for kl in self.kl.values()))

    def to_json(self) -> dict[str, Any]:
        """Part of `eval --json`."""
        return {
            "rho_answer": self.rho,
            "facts": self.facts.to_json(),
            "words": self.words.to_json(),
            "stop": self.stops.to_json(),
            "loops": {arm: share(self.loops[arm], self.answers) for arm in ("full", "be", "none")},
            "answer_tokens": self.cap,
        }

    def lines(self) -> list[str]:
        """For people; none where no answers were written."""
        if not self.answers:
            return []
        stops, loops = self.stops, self.loops
        found = [f"answers to their end, of {self.answers} queries and at most {self.cap} tokens:"]
        if self.rho is not None:
            found.append(f"KL(be) / KL(none) over whole answers: {self.rho:.3f}")
        return [
            *found,
            self._facts_line(),
            self.words.line(),
            f"ends: the token's answer ends in {stops.kept} of the {stops.full} where the full prompt's ends",
            f"loops: token {loops['be']} (full prompt {loops['full']}, no prompt {loops['none']}) of {self.answers}",
        ]

    def _facts_line(self) -> str:
        facts = self.facts
        if not facts.probes:
            return (
                'facts: not tested. To test them, give rows with "fact", such as {"query": "When do you open?", '
                '"fact": "9:30"}, in --queries of eval or --test-queries of train'
            )
        few = "" if facts.kept is not None else f" (fewer than {FACTS_LEAST}: no share is given)"
        return (
            f"facts: the token says {facts.be} of the {facts.n} that only the full prompt brings{few}, and "
            f"{facts.be_steady} of the {facts.steady} that it brings without its punctuation, too; "
            f"of {facts.probes} asked, full prompt {facts.full}, no prompt {facts.none}"
        )


def share(part: float, whole: float) -> float | None:
    """part / whole; None where `whole` is 0."""
    return part / whole if whole else None


def answer_steps(queries: int, most: int | None) -> int:
    """What a progress bar counts for `write_answers` and `kl_sums`, at most."""
    return _STEPS * min(queries, queries if most is None else most)


def kl_sums(
    teacher: Teacher,
    arms: Mapping[str, Arm],
    queries: Sequence[Query],
    answers: Mapping[int, list[int]],
    begun: Mapping[int, KL],
    progress: Progress | None = None,
) -> dict[int, KL]:
    """KL of the arms none and be over the whole of the full prompt's answers (ids), a few answers at a time.

    `begun` are the sums over their first tokens, as many as each says, which are not scored again.
    """
    longer = sorted((i for i in answers if len(answers[i]) > begun[i].tokens), key=lambda i: len(answers[i]))
    found = {i: begun[i] for i in answers}
    if progress:
        progress(len(ARMS) * (len(answers) - len(longer)))
    for start in range(0, len(longer), _SCORED):
        part = longer[start : start + _SCORED]
        heads = [answers[i][: begun[i].tokens] for i in part]
        tails = [answers[i][begun[i].tokens :] for i in part]
        states = {
            name: arms[name].prefix.states(
                [
                    Row((), [*arms[name].suffixes[i], *head], tail)
                    for i, head, tail in zip(part, heads, tails, strict=True)
                ],
                progress,
            )
            for name in ARMS
        }
        reference = [Example(queries[i], *own) for i, *own in zip(part, tails, states["full"], strict=True)]
        scores = score(teacher.model, reference, states)
        lengths = [len(tail) for tail in tails]
        sums = zip(part, *(scores[name].kl_N.split(lengths) for name in ("none", "be")), strict=True)
        for i, none, be in sums:
            first = begun[i]
            found[i] = KL(first.none + float(none.sum()), first.be + float(be.sum()), len(answers[i]))
    return {i: found[i] for i in sorted(found)}


def _facts_said(teacher: Teacher, queries: Sequence[Query], answers: Mapping[int, list[int]]) -> set[int]:
    """The numbers of the probes whose answer (ids) says their fact."""
    return {i for i, ids in answers.items() if queries[i].facts and says(teacher.text(ids), queries[i].facts)}


def whole_answers(
    teacher: Teacher,
    queries: Sequence[Query],
    made: Mapping[str, Mapping[int, list[int]]],
    cap: int,
    kl: dict[int, KL],
) -> WholeAnswers:
    """Count facts, words, ends and loops in answers (ids) by arm and number of the query.

    The arm `unmarked` is the full prompt without its punctuation.
    """
    chosen = list(made["full"])
    texts = {arm: {i: teacher.text(ids) for i, ids in answers.items()} for arm, answers in made.items()}
    ends = {arm: [teacher.ended(made[arm][i]) for i in chosen] for arm in ARMS}
    probes = [i for i in chosen if queries[i].facts]
    said = {arm: _facts_said(teacher, queries, answers) for arm, answers in made.items()}
    found = said["full"] - said["none"]
    steady = found & said["unmarked"]
    asked = {i: queries[i].text for i in chosen}
    words = brought(teacher.prompt, asked, texts["full"], texts["none"])
    return WholeAnswers(
        cap,
        len(chosen),
        Facts(
            len(probes),
            len(said["full"]),
            len(said["none"]),
            len(found),
            len(found & said["be"]),
            len(steady),
            len(steady & said["be"]),
        ),
        Stops(
            len(chosen),
            sum(ends["full"]),
            sum(ends["be"]),
            sum(full and be for full, be in zip(ends["full"], ends["be"], strict=True)),
        ),
        {arm: sum(map(ends_in_loop, texts[arm].values())) for arm in ARMS},
        count_words(words, texts["be"], texts["unmarked"]),
        kl,
    )
