"""The pace of this machine: a few seconds of real work give the seconds of the pieces that all phases are made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trainer.data.teacher import Example, Teacher
from trainer.evaluation.arms import score
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, common_prefix
from trainer.model.soft_token import Row
from trainer.optim.objectives import Distil, part_losses
from trainer.optim.starts import SCREEN_TOKENS, Search
from trainer.planning.work import Work, shared_ids

BATCH = 64
_TIMED_ROWS = 32
_LONG_STEP = 2.0


@dataclass(frozen=True)
class Timing:
    """Seconds of the pieces of work that all phases are made of, on this machine."""

    decode_step: float
    """Of a decoding step, whatever the rows."""
    decode_row: float
    """Of a decoding step, for each row."""
    position: float
    """Of a position in a pass without gradient."""
    search_position: float
    """Of a position of a search row, its share of the head's work included."""
    score_token: float
    """Of a response token's figures, for each arm."""
    step_position: float
    """Of a position in a training step."""

    def decode(self, rows: int, limit: int, mean: float) -> float:
        """Seconds to decode `rows` texts of up to `limit` tokens, `mean` on average.

        A row that has ended costs until half of its batch has, and later steps read more.
        """
        return math.ceil(rows / BATCH) * limit * self.decode_step + 1.3 * rows * mean * self.decode_row


def measure(model: FrozenModel, work: Work) -> Timing:
    """Time a decoding batch, a scoring pass, a row of the search and a training step of typical length."""
    config = work.config
    queries = [work.training[i % len(work.training)] for i in range(_TIMED_ROWS)]
    chats = [Teacher(model, work.prompt).chat_ids(query) for query in queries]
    shared = min(shared_ids(model, work.prompt), common_prefix(chats))
    prefix = Prefix(model, model.embed(chats[0][:shared]))
    suffixes = [chat[shared:] for chat in chats]
    few, many = _decoding(prefix, suffixes[:4]), _decoding(prefix, suffixes)
    per_row = max(0.0, (many - few) / (_TIMED_ROWS - 4))
    answer = [*suffixes[0], *chats[0]][: round(min(work.answer, 64))] or [1]
    rows = [Row((), suffix, answer) for suffix in suffixes[:4]]
    states: list[torch.Tensor] = []
    seconds = _timed(lambda: states.extend(prefix.states(rows)))
    examples = [Example(q, list(answer), state.cpu()) for q, state in zip(queries, states, strict=False)]
    scored = _timed(lambda: score(model, examples[:2], {"full": states[:2], "be": states[:2]}))
    distil = Distil(model, examples, placement=config.placement, batch_size=min(config.batch_size, 4), tau=config.tau)
    vectors_KH = torch.zeros(work.trained, model.hidden_size, device=model.device, requires_grad=True)
    part = distil.parts(vectors_KH, 0)[0]

    def learn() -> None:
        part_losses(model, [part])[0].backward()

    first = _timed(learn)
    step = first if first > _LONG_STEP else min(first, _timed(learn))  # the first of a process is slow
    search = Search(model, examples[:1], config.placement)
    learned = max(1, config.learned)
    candidates = [[1] * learned] * 16
    tokens = min(SCREEN_TOKENS, len(answer))
    looked = _timed(lambda: search._score(candidates, search._cases, tokens))
    return Timing(
        decode_step=max(0.0, few - 4 * per_row),
        decode_row=per_row,
        position=seconds / sum(row.length(0) for row in rows),
        search_position=looked / (16 * (distil.rows[0].length(learned) - len(answer) + tokens)),
        score_token=scored / (2 * 2 * len(answer)),
        step_position=step / part.positions,
    )


def _decoding(prefix: Prefix, suffixes: Sequence[Sequence[int]]) -> float:
    """Seconds of one decoding step."""
    few, more = (_timed(lambda n=n: prefix.generate(suffixes, n, stop=[])) for n in (1, 4))  # type: ignore[misc]
    return max(0.0, (more - few) / 3)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
