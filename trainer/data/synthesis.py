"""Queries for prompts that come without any: messages at the prompt's sentences, and messages of the pool."""

from __future__ import annotations

from be_serve.core.errors import InputError
from trainer.data.aimed import Writer, aimed_queries, asked
from trainer.data.pool import draw
from trainer.data.queries import Query, drop_near_duplicates
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Progress

AIMED = 0.75
"""Share of aimed queries."""


def chats(count: int) -> int:
    """How many chats a model answers to write `count` queries: what a progress bar counts."""
    return asked(round(AIMED * count))


def synthesise(
    model: FrozenModel,
    prompt: str,
    count: int,
    *,
    seed: int,
    writer: Writer | None = None,
    progress: Progress | None = None,
) -> list[Query]:
    """`count` different queries: `AIMED` of them aimed at the prompt's sentences in turn, the others from the pool.

    `progress` is called with the number of chats that the model answers; a `writer` in its place counts for itself.
    Raises InputError where fewer than 8 are usable.
    """
    wanted = round(AIMED * count)
    aimed = [found.query for found in aimed_queries(model, prompt, wanted, seed=seed, writer=writer, progress=progress)]
    # The pool makes up for what the model could not write.
    found = drop_near_duplicates([*aimed, *draw(count - len(aimed), seed)])
    if len(found) < 8:
        raise InputError("The model wrote too few usable queries; give your own with --queries.")
    return found
