"""What a training run would work on: its queries, and how long its rows are."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from be_serve.core.prompts import read_prompt_file
from trainer.config import TrainConfig
from trainer.data.queries import Query, drop_near_duplicates, read_queries, split_held_out
from trainer.data.teacher import Teacher
from trainer.evaluation.clauses import MAX_CLAUSES, prompt_clauses
from trainer.model.frozen import FrozenModel
from trainer.model.generate import common_prefix
from trainer.optim.starts import Search
from trainer.text import sentences

SAMPLED = 64
"""Queries whose lengths stand for all."""
# The share of its limit that an answer fills on average, measured with instruct models of 0.1 to 0.6 billion weights.
ANSWER_FILL = 0.8
_LONG_ANSWER = 150
# A query that stands for those that the model would write.
_SAMPLE = "What should I know about this before I begin, and what do you advise me to do first?"


@dataclass(frozen=True)
class Work:
    """What one run would work on."""

    config: TrainConfig
    prompt: str
    prompt_tokens: int
    training: list[Query]
    held_out: int
    written: int
    """Queries that the model would write; 0 with a file of queries."""
    suffix: int
    """Mean tokens of a chat behind the prompt."""
    answer: float
    """Mean tokens of an answer to a training query."""
    sentence: float
    """Mean tokens of a sentence of the prompt."""
    words: int
    """Distinct tokens of the prompt that a search would screen."""
    clauses: int

    @property
    def answers_key(self) -> tuple[Any, ...]:
        """Runs of a batch with the same key share the teacher's answers."""
        config = self.config
        return (self.prompt, config.queries, config.max_queries, config.response_tokens, config.temperature)

    def row(self, answer: float, k: int) -> float:
        """Mean positions of a student's row with k vectors."""
        return self.suffix + k + 4 + answer

    @property
    def trained(self) -> int:
        """Vectors that a training step feeds: places that stay are computed once."""
        return min(self.config.trained, self.prompt_tokens)


def survey(config: TrainConfig, model: FrozenModel, prompt: str | None = None) -> Work:
    """What a run of these settings would work on. Raises InputError as the run itself would."""
    prompt = read_prompt_file(config.prompt_file) if prompt is None else prompt
    ids = model.slots.prompt_ids(prompt, template_kwargs=model.template_kwargs)
    config = config.resolved(len(ids))
    test = read_queries(config.test_queries) if config.test_queries else []
    if config.queries:
        found = drop_near_duplicates(read_queries(config.queries), beside=test)
        training, held_out = split_held_out(found, config.held_out, latest=True)
        training, held = training[: config.max_queries], len(held_out)
        written = 0
    else:
        written = config.synthesise
        held = max(1, min(config.held_out, written // 5))
        training = [Query(({"role": "user", "content": _SAMPLE},))] * (written - held)
        training = training[: config.max_queries]
    chats = [Teacher(model, prompt).chat_ids(query) for query in training[:SAMPLED]]
    shared = shared_ids(model, prompt)
    return Work(
        config=config,
        prompt=prompt,
        prompt_tokens=len(ids),
        training=training,
        held_out=len(test) or held,
        written=written,
        suffix=round(statistics.mean(max(1, len(chat) - shared) for chat in chats)),
        answer=min(ANSWER_FILL * config.response_tokens, _LONG_ANSWER),
        sentence=len(ids) / max(len(sentences(prompt)), 1),
        words=len(Search(model, [], config.placement)._words(ids)),
        clauses=0 if config.scores_only else len(prompt_clauses(prompt)[:MAX_CLAUSES]),
    )


def shared_ids(model: FrozenModel, prompt: str) -> int:
    """Ids that all chats under a prompt begin with."""
    chats = [Teacher(model, prompt).chat_ids(Query(({"role": "user", "content": text},))) for text in ("1", "Why?")]
    return common_prefix(chats)
