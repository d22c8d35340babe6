"""Whole answers, to their end: do they say the facts, do they end, do they go round in a loop?

The first 64 tokens, on which rho is measured, tell none of this. Answers are greedy,
those of no prompt, the full prompt and the token, at most `cap` tokens long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from trainer.data.queries import Query
from trainer.data.teacher import Example, Teacher
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm, score
from trainer.evaluation.signatures import ends_in_loop, goes_round
from trainer.evaluation.words import Words, brought, count_words
from trainer.model.generate import Progress, generate_beside
from trainer.model.soft_token import Row
from trainer.text import says

ARMS = ("none", "full", "be")
FACTS_LEAST = 5
"""With fewer facts that only the full prompt says, the token's share of them says nothing."""
_LOOP_LEAST = 4 * RESPONSE_TOKENS
"""Tokens of an answer from which on a loop with small changes (a list that counts up) is one that never ends."""
POSITIONS = 64_000
"""Of answers that are written side by side, did none end before the cap."""
_SCORES = 50_000_000  # of attention, for each head, while the questions are read
_SCORED = 16  # answers whose hidden states are held at once
_STEPS = 2 * len(ARMS)  # an answer of each arm is written and scored
Written: TypeAlias = dict[str, dict[int, list[int]]]
"""Ids of answers, by arm and number of the query."""


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


def chosen_queries(queries: Sequence[Query], most: int | None) -> list[int]:
    """The numbers of the queries that are answered to their end: at most `most`, probes before others."""
    order = sorted(range(len(queries)), key=lambda i: not queries[i].facts)
    return sorted(order[:most])


def answer_steps(queries: int, most: int | None) -> int:
    """What a progress bar counts for `write_answers` and `kl_sums`, at most."""
    return _STEPS * min(queries, queries if most is None else most)


def room(teacher: Teacher, arms: Mapping[str, Arm], cap: int) -> int:
    """`cap`, or less where the model's context leaves less behind the longest chat of an arm."""
    longest = max(arm.prefix.length + max(map(len, arm.suffixes)) for arm in arms.values())
    return max(1, min(cap, teacher.model.max_length - longest))


def write_answers(
    teacher: Teacher,
    arms: Mapping[str, Arm],
    chosen: Sequence[int],
    cap: int,
    *,
    begun: Mapping[int, list[int]] | None = None,
    beside: Mapping[int, list[int]] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Greedy answers (ids) of arms to the chosen queries, to their end, a loop or `cap` tokens; by arm and query.

    Answers that are twice as long as the full prompt's, those of the arm `full` or `beside`, are written no further:
    they do not end where that ends. A few answers that never end would cost more than all others.

    `begun` are the first tokens of the arm `full`, the reference of rho: the answers go on from there, so that the
    teacher's cache keeps its keys, rho its figure to the last digit, and nothing is decoded twice.
    """
    made = {name: {i: list(begun[i][:cap]) if begun and name == "full" else [] for i in chosen} for name in arms}
    order = sorted(arms, key=lambda name: name != "full")  # what the others' length hangs on comes first
    size = _side_by_side(list(arms.values()), chosen, cap)
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        unfinished = {
            name: [i for i in part if len(made[name][i]) < cap and not _done(teacher, made[name][i])] for name in order
        }
        names = [name for name in order if unfinished[name]]
        rows = [(name, i) for name in names for i in unfinished[name]]
        if progress:
            progress(len(order) * len(part) - len(rows))
        if not rows:
            continue
        batch = _Batch(teacher, made, rows, cap, beside)
        more = generate_beside(
            [arms[name].prefix for name in names],
            [[[*arms[name].suffixes[i], *made[name][i]] for i in unfinished[name]] for name in names],
            [[cap - len(made[name][i]) for i in unfinished[name]] for name in names],
            batch.enough,
            progress,
        )
        for (name, i), ids in zip(rows, more, strict=True):
            made[name][i] = teacher.cut([*made[name][i], *ids])[: batch.limit(name, i, ())]
    return made


def _side_by_side(arms: Sequence[Arm], chosen: Sequence[int], cap: int) -> int:
    """How many queries' answers are written in one batch."""
    asked = max((len(arm.suffixes[i]) for arm in arms for i in chosen), default=0)
    scores = sum(asked * (arm.prefix.length + asked) for arm in arms)
    fitting = [POSITIONS // (len(arms) * (asked + cap)), _SCORES // max(scores, 1)]
    copied = [arm.prefix.batch_size(asked + cap) for arm in arms if not arm.prefix.shared]
    return max(1, min(fitting + copied))


class _Batch:
    """Answers, by arm and query, that are written side by side, and when each is long enough."""

    def __init__(
        self,
        teacher: Teacher,
        made: Written,
        rows: Sequence[tuple[str, int]],
        cap: int,
        beside: Mapping[int, list[int]] | None,
    ) -> None:
        """`made` holds what stands before the ids of this batch, or whole answers of rows that are not in it."""
        self._teacher = teacher
        self._made = made
        self._rows = rows
        self._numbers = {row: number for number, row in enumerate(rows)}
        self._cap = cap
        self._beside = beside

    def enough(self, number: int, ids: Sequence[Sequence[int]]) -> bool:
        """Whether a row needs no more ids; `ids` are those that all rows of the batch have so far."""
        name, i = self._rows[number]
        answer = self._so_far(name, i, ids)
        return len(answer) >= self.limit(name, i, ids) or _done(self._teacher, answer)

    def limit(self, name: str, i: int, ids: Sequence[Sequence[int]]) -> int:
        """The largest length of an answer; without `ids`, all of the arm `full` are taken to be whole."""
        if name == "full" or (self._beside is None and "full" not in self._made):
            return self._cap
        full = self._so_far("full", i, ids) if self._beside is None else self._beside[i]
        return min(self._cap, 2 * max(RESPONSE_TOKENS, len(full)))

    def _so_far(self, name: str, i: int, ids: Sequence[Sequence[int]]) -> list[int]:
        number = self._numbers.get((name, i))
        return self._made[name][i] if number is None or not ids else [*self._made[name][i], *ids[number]]


def _done(teacher: Teacher, ids: list[int]) -> bool:
    """Whether an answer is at its end, or goes round and round: a greedy one does so to the cap, and costs as much."""
    return teacher.ended(ids) or goes_round(ids) or (len(ids) >= _LOOP_LEAST and ends_in_loop(teacher.text(ids)))


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


def facts_said(teacher: Teacher, queries: Sequence[Query], answers: Mapping[int, list[int]]) -> set[int]:
    """The numbers of the probes whose answer (ids) says their fact."""
    return {i for i, ids in answers.items() if queries[i].facts and says(teacher.text(ids), queries[i].facts)}


def words_brought(teacher: Teacher, queries: Sequence[Query], made: Written) -> dict[int, set[str]]:
    """The words that only the prompt brings into answers (ids) of the arms full and none, by number of the query."""
    full, none = ({i: teacher.text(ids) for i, ids in made[arm].items()} for arm in ("full", "none"))
    return brought(teacher.prompt, {i: queries[i].text for i in full}, full, none)


def whole_answers(
    teacher: Teacher,
    queries: Sequence[Query],
    made: Mapping[str, Mapping[int, list[int]]],
    cap: int,
    kl: dict[int, KL],
    words: Mapping[int, set[str]],
) -> WholeAnswers:
    """Count facts, words, ends and loops in answers (ids) by arm and number of the query.

    The arm `unmarked` is the full prompt without its punctuation. It answers only what brings a fact, or one of the
    `words` that `words_brought` found.
    """
    chosen = list(made["full"])
    texts = {arm: {i: teacher.text(made[arm][i]) for i in chosen} for arm in ARMS}
    ends = {arm: [teacher.ended(made[arm][i]) for i in chosen] for arm in ARMS}
    probes = [i for i in chosen if queries[i].facts]
    said = {arm: facts_said(teacher, queries, answers) for arm, answers in made.items()}
    found = said["full"] - said["none"]
    steady = found & said.get("unmarked", set())
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
        count_words(words, texts["be"], {i: teacher.text(ids) for i, ids in made.get("unmarked", {}).items()}),
        kl,
    )
