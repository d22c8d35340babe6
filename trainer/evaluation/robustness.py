"""Does a token hold where it was not trained: over the turns of a conversation, and off topic?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from be_serve.core.artifact import Placement
from be_serve.core.errors import InputError
from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm, chats, score_arms

CONVERSATIONS = 8
OFF_TOPIC = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the derivative of x squared times sin x?",
    "Translate 'Where is the train station?' into Spanish.",
    "Summarise the causes of the First World War in two sentences.",
    "Give me a SQL query that counts the orders of each customer.",
    "How does photosynthesis work?",
    "Write a polite e-mail that moves a meeting to Friday.",
    "What is the difference between TCP and UDP?",
    "List three uses of baking soda.",
    "Explain recursion to a child.",
    "What should I check before I buy a used car?",
    "Convert 72 degrees Fahrenheit to Celsius.",
    "Suggest a name for a small coffee shop.",
    "Who wrote Pride and Prejudice, and when?",
    "Correct this sentence: 'He don't knows the answer.'",
    "What is a balanced breakfast?",
)
"""Questions of no domain, written for this project. A token must treat them as its prompt does."""


def measure_off_topic(teacher: Teacher, vectors_KH: Tensor, placement: Placement) -> dict[str, float]:
    """KL(full || none) and KL(full || be) on `OFF_TOPIC`, nats a token, and rho."""
    queries = [Query(({"role": "user", "content": text},)) for text in OFF_TOPIC]
    found, _ = _kl(teacher, queries, vectors_KH, placement)
    return found


def measure_turns(
    teacher: Teacher, queries: Sequence[Query], vectors_KH: Tensor, placement: Placement, *, turns: int = 6
) -> list[dict[str, float]]:
    """The same for each turn of up to eight conversations, held under the full prompt.

    Each asks `turns` of the queries one after the other; the history of every arm is
    the full prompt's own, so a turn tells how far the token's hold reaches, not where
    its own words would have led. Raises InputError for fewer queries than turns.
    """
    singles = [query for query in queries if len(query.messages) == 1]
    count = min(CONVERSATIONS, len(singles) // turns)
    if not count:
        raise InputError(f"Conversations of {turns} turns need at least {turns} single-turn queries.")
    histories: list[tuple[dict[str, str], ...]] = [() for _ in range(count)]
    found = []
    for turn in range(turns):
        asked = [Query((*history, *singles[turn * count + i].messages)) for i, history in enumerate(histories)]
        figures, answers = _kl(teacher, asked, vectors_KH, placement)
        found.append({"turn": turn + 1, **figures})
        histories = [
            (*query.messages, {"role": "assistant", "content": answer})
            for query, answer in zip(asked, answers, strict=True)
        ]
    return found


def _kl(
    teacher: Teacher, queries: Sequence[Query], vectors_KH: Tensor, placement: Placement
) -> tuple[dict[str, float], list[str]]:
    """Mean KL of the arms none and be, their ratio, and the full prompt's answers."""
    model = teacher.model
    reference = teacher.examples(queries, response_tokens=RESPONSE_TOKENS)
    arms = {
        "none": Arm.of_ids(model, chats(model, queries, "")),
        "be": Arm.of_vectors(model, vectors_KH, queries, placement),
    }
    scores = score_arms(model, reference, arms)
    kl = {name: float(torch.mean(scores[name].kl_N)) for name in arms}
    return {**kl, "rho": kl["be"] / kl["none"]}, [teacher.text(e.response) for e in reference]
