"""Queries for prompts that come without any: messages at the prompt's sentences, and messages of the pool."""

from __future__ import annotations

from collections.abc import Sequence

from be_serve.core.errors import InputError
from trainer.data.aimed import Writer, aimed_queries, asked
from trainer.data.pool import draw, pool
from trainer.data.queries import Query, drop_near_duplicates
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Progress

AIMED = 0.75
"""Share of aimed queries."""


def wanted(count: int) -> int:
    """How many of `count` queries a model is to write."""
    return round(AIMED * count)


def chats(count: int) -> int:
    """How many chats a model answers to write `count` queries: what a progress bar counts."""
    return asked(wanted(count))


def written(found: Sequence[Query]) -> int:
    """How many of the queries a model wrote: the others are of the pool."""
    known = {query.text for queries in pool().values() for query in queries}
    return sum(query.text not in known for query in found)


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
    made = aimed_queries(model, prompt, wanted(count), seed=seed, writer=writer, progress=progress)
    aimed = [found.query for found in made]
    # The pool makes up for what the model could not write.
    found = drop_near_duplicates([*aimed, *draw(count - len(aimed), seed)])
    if len(found) < 8:
        raise InputError("The model wrote too few usable queries; give your own with --queries.")
    return found
