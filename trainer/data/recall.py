"""Sentences of the prompt itself as answers to be distilled: stage 1, reconstruction, in the terms of stage 2.

Few answers hold a given name or number, so queries alone teach it seldom. Behind a general question, each sentence
of the prompt is an answer of which every word is the prompt's. The objective stays Eq. 3: the token learns how far
the full prompt's model would go along with the sentence, no more, so it does not recite more readily than that.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.queries import Query
from trainer.data.teacher import Example, Teacher
from trainer.text import sentences

_ASKS = (
    "Tell me more.",
    "Go on.",
    "Who are you?",
    "What should I know?",
    "Tell me something about this.",
    "And what else?",
)
EACH = 2
"""Questions before each sentence."""


def recall_queries(prompt: str) -> list[Query]:
    """General questions, each with a sentence of the prompt as its answer; every sentence behind `EACH` of them."""
    parts = list(dict.fromkeys(sentences(prompt)))
    return [
        Query(({"role": "user", "content": _ASKS[(EACH * n + i) % len(_ASKS)]},), part)
        for i in range(EACH)
        for n, part in enumerate(parts)
    ]


def with_recall(teacher: Teacher, examples: Sequence[Example], share: float, *, response_tokens: int) -> list[Example]:
    """The examples and behind them sentences of the prompt, so many that they are `share` of all.

    A prompt of few sentences has them several times, one of many only some, from all over it.
    """
    wanted = round(share / (1 - share) * len(examples))
    if not wanted:
        return list(examples)
    queries = recall_queries(teacher.prompt)
    once = len(queries) // EACH
    queries = queries[:wanted] if wanted > once else [queries[n * once // wanted] for n in range(wanted)]
    made = teacher.examples(queries, response_tokens=response_tokens, gold=True)
    return [*examples, *(made[n % len(made)] for n in range(wanted))]
