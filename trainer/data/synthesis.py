"""Queries for prompts that come without any.

    pool     messages written for this project, which fit any prompt (`trainer.data.pool`)
    aimed    written at one sentence of the prompt, by the model or by a larger one on a server: a
             message at which the sentence matters, or a question that the sentence answers

A small model's own messages are poor, so those in another script, without an end, too short or
long, that repeat the sentence, and the least likely ones are dropped.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from be_serve.core.errors import InputError
from be_serve.core.slots import new_marker
from trainer.data.pool import draw
from trainer.data.queries import Query, drop_near_duplicates
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, Progress, common_prefix
from trainer.model.soft_token import Row
from trainer.text import sentences, words_of

AIMED = 0.4
"""Share of aimed queries."""
QUERY_TOKENS = 48
_SPARE = 1.6
"""How many messages are written for each that is wanted."""
_LIKELY = 0.8
"""Share of usable messages that stay: the most likely ones."""
_REPEATED = 0.8
"""A message that holds this share of the words of any sentence repeats it."""
TEMPERATURE = 0.8
_ASKS = (
    "Below is a rule that an assistant follows.\n\nRule: {sentence}\n\n"
    "Write one short message that a user could send to this assistant, so that the rule matters. "
    "Write the message only.",
    "Below is something that an assistant knows.\n\nText: {sentence}\n\n"
    "Write one short question of a user that this text answers. Do not repeat the text. Write the question only.",
)


Writer: TypeAlias = Callable[[Sequence[str]], list[str | None]]
"""Writes a message for each ask, None where it came to no end."""


@dataclass(frozen=True)
class Aimed:
    """A message and the number of the sentence at which it is aimed."""

    query: Query
    sentence: int


def messages(count: int) -> int:
    """How many messages the model writes for `count` queries: what a progress bar counts."""
    return math.ceil(_SPARE * round(AIMED * count))


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

    `progress` is called with the number of messages that the model writes; a `writer` in its place counts for itself.
    Raises InputError where fewer than 8 are usable.
    """
    wanted = round(AIMED * count)
    aimed = [found.query for found in aimed_queries(model, prompt, wanted, seed=seed, writer=writer, progress=progress)]
    # The pool makes up for what the model could not write.
    found = drop_near_duplicates([*aimed, *draw(count - len(aimed), seed)])
    if len(found) < 8:
        raise InputError("The model wrote too few usable queries; give your own with --queries.")
    return found


def aimed_queries(
    model: FrozenModel,
    prompt: str,
    count: int,
    *,
    seed: int,
    writer: Writer | None = None,
    progress: Progress | None = None,
) -> list[Aimed]:
    """At most `count` messages of the model, or of `writer`, the sentences of the prompt in turn."""
    if not count:
        return []
    parts = sentences(prompt)
    jobs = [(n % len(parts), _ASKS[n // len(parts) % len(_ASKS)]) for n in range(math.ceil(_SPARE * count))]
    asks = [ask.format(sentence=parts[at]) for at, ask in jobs]
    texts = writer(asks) if writer else _sample(model, asks, seed, progress)
    usable = [
        Aimed(Query(({"role": "user", "content": text},)), at)
        for (at, _), made in zip(jobs, texts, strict=True)
        if made
        and (text := clean(made))
        and same_script(text, prompt)
        and not any(_repeats(text, part) for part in parts)
    ]
    unique = {query.text: aimed for aimed in usable if (query := aimed.query)}
    kept = [unique[query.text] for query in drop_near_duplicates([aimed.query for aimed in unique.values()])]
    # The small model's likelihood tells its own slips from its sentences. It is no judge of a larger one.
    return _in_turn(kept if writer else _likely(model, kept), count)


def clean(text: str) -> str | None:
    """The first paragraph of a sampled message; None where it is no usable query."""
    text = text.strip().split("\n\n")[0].strip().strip('"').strip()
    words = text.split()
    if not 2 <= len(words) <= 60 or sum(c.isalpha() for c in text) < 0.6 * len(text):
        return None
    return text


def same_script(text: str, prompt: str) -> bool:
    """Whether all letters of a text are of scripts (Latin, Cyrillic, ...) that the prompt uses."""
    return _scripts(text) <= _scripts(prompt)


def _scripts(text: str) -> set[str]:
    return {unicodedata.name(c, "").partition(" ")[0] for c in set(text) if c.isalpha()}


def _repeats(text: str, sentence: str) -> bool:
    words = set(words_of(sentence))
    return len(words & set(words_of(text))) >= _REPEATED * len(words)


def _in_turn(found: Sequence[Aimed], count: int) -> list[Aimed]:
    """`count` of the messages, the sentences in turn."""
    by_sentence: dict[int, list[Aimed]] = {}
    for aimed in found:
        by_sentence.setdefault(aimed.sentence, []).append(aimed)
    rounds = itertools.zip_longest(*(by_sentence[at] for at in sorted(by_sentence)))
    return [aimed for turn in rounds for aimed in turn if aimed][:count]


def _likely(model: FrozenModel, found: Sequence[Aimed]) -> list[Aimed]:
    """The messages without the least likely ones, by the model's mean log-likelihood of the user's turn."""
    if len(found) < 8:
        return list(found)
    marker = new_marker()
    chat = [{"role": "user", "content": marker}]
    text = str(
        model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **model.template_kwargs)
    )
    head = model.tokenizer.encode(text.split(marker)[0], add_special_tokens=False)
    ids = [model.tokenizer.encode(aimed.query.text, add_special_tokens=False) for aimed in found]
    prefix = Prefix(model, model.embed(head[:-1]))
    states = prefix.states([Row((), head[-1:], own) for own in ids])
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(model.head(state).float(), torch.tensor(own, device=state.device)))
            for state, own in zip(states, ids, strict=True)
        ]
    limit = sorted(losses)[math.ceil(_LIKELY * len(losses)) - 1]
    return [aimed for aimed, loss in zip(found, losses, strict=True) if loss <= limit]


def _sample(model: FrozenModel, asks: Sequence[str], seed: int, progress: Progress | None) -> list[str | None]:
    """The model's answers to the asks; None where an answer has no end."""
    rows = [
        model.slots.encode_chat([{"role": "user", "content": ask}], template_kwargs=model.template_kwargs)
        for ask in asks
    ]
    shared = common_prefix(rows)
    prefix = Prefix(model, model.embed(rows[0][:shared]))
    made = prefix.generate(
        [ids[shared:] for ids in rows], QUERY_TOKENS, temperature=TEMPERATURE, seed=seed, progress=progress
    )
    stop = set(model.stop_ids())
    return [model.tokenizer.decode(ids, skip_special_tokens=True) if ids[-1] in stop else None for ids in made]
