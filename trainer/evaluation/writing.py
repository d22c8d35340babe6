"""Whole answers are written here: greedy, all arms side by side, to their end, a loop or a cap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm
from trainer.evaluation.signatures import ends_in_loop, goes_round
from trainer.model.generate import Progress, generate_beside
from trainer.model.memory import MemoryModel, free_bytes

Written: TypeAlias = dict[str, dict[int, list[int]]]
"""Ids of answers, by arm and number of the query."""
_LOOP_LEAST = 4 * RESPONSE_TOKENS
"""Tokens of an answer from which on a loop with small changes (a list that counts up) is one that never ends."""
MOST_ROWS = 192
"""Answers that are written side by side: more gain nothing, for the last to end are shared by as many as that."""
_SHARE = 0.5
"""Of the free memory, at most, that they take."""


def chosen_queries(queries: Sequence[Query], most: int | None) -> list[int]:
    """The numbers of the queries that are answered to their end: at most `most`, probes before others."""
    order = sorted(range(len(queries)), key=lambda i: not queries[i].facts)
    return sorted(order[:most])


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
    progress: Progress | None = None,
) -> Written:
    """Greedy answers (ids) of arms to the chosen queries, to their end, a loop or `cap` tokens; by arm and query.

    Answers that are twice as long as the full prompt's, those of the arm `full`, are written no further:
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
        batch = _Batch(teacher, made, rows, cap)
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
    """How many queries' answers are written in one batch: batches alike, of as many rows as the free memory holds."""
    model = arms[0].prefix.model
    memory, free = MemoryModel.of(model.causal_lm), free_bytes(model.device)
    asked = max((len(arm.suffixes[i]) for arm in arms for i in chosen), default=0)
    before = sum(arm.prefix.length for arm in arms)
    shared = all(arm.prefix.shared for arm in arms)
    most = max(1, MOST_ROWS // len(arms))
    while (
        most > 1
        and free is not None
        and memory.decoding(most * len(arms), prefix=before, width=asked, new=cap, shared=shared) > _SHARE * free
    ):
        most = most * 3 // 4
    batches = math.ceil(len(chosen) / most)
    return math.ceil(len(chosen) / max(batches, 1)) or 1


class _Batch:
    """Answers, by arm and query, that are written side by side, and when each is long enough."""

    def __init__(
        self,
        teacher: Teacher,
        made: Written,
        rows: Sequence[tuple[str, int]],
        cap: int,
    ) -> None:
        """`made` holds what stands before the ids of this batch, or whole answers of rows that are not in it."""
        self._teacher = teacher
        self._made = made
        self._rows = rows
        self._numbers = {row: number for number, row in enumerate(rows)}
        self._cap = cap

    def enough(self, number: int, ids: Sequence[Sequence[int]]) -> bool:
        """Whether a row needs no more ids; `ids` are those that all rows of the batch have so far."""
        name, i = self._rows[number]
        answer = self._so_far(name, i, ids)
        return len(answer) >= self.limit(name, i, ids) or _done(self._teacher, answer)

    def limit(self, name: str, i: int, ids: Sequence[Sequence[int]]) -> int:
        """The largest length of an answer; without `ids`, all of the arm `full` are taken to be whole."""
        if name == "full" or "full" not in self._made:
            return self._cap
        return min(self._cap, 2 * max(RESPONSE_TOKENS, len(self._so_far("full", i, ids))))

    def _so_far(self, name: str, i: int, ids: Sequence[Sequence[int]]) -> list[int]:
        number = self._numbers.get((name, i))
        return self._made[name][i] if number is None or not ids else [*self._made[name][i], *ids[number]]


def _done(teacher: Teacher, ids: list[int]) -> bool:
    """Whether an answer is at its end, or goes round and round: a greedy one does so to the cap, and costs as much."""
    return teacher.ended(ids) or goes_round(ids) or (len(ids) >= _LOOP_LEAST and ends_in_loop(teacher.text(ids)))
