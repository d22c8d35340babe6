"""Queries written by the model itself, for prompts that come without any.

Four kinds, as in Magpie and self-study, each sampled at temperature 1:
    persona    only the template up to the user's words, with the prompt in the system slot
    clause     the user turn continues "question about <a sentence of the prompt>"
    generic    as `persona` without the prompt, so that the token learns off-topic behaviour too
    follow-up  as `persona` behind a question and the prompt's answer to it: a second turn
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from be_serve.core.errors import InputError
from be_serve.core.slots import Message, new_marker
from trainer.data.queries import Query, drop_near_duplicates
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, Progress, common_prefix
from trainer.text import sentences

_SHARES = {"persona": 0.35, "clause": 0.35, "generic": 0.2}
_FOLLOW_UPS = 0.1
_ANSWER_TOKENS = 64
_QUERY_TOKENS = 48
_ROUNDS = 4
_OPENERS = ("What", "How", "Why", "Can you", "Tell me", "Do you", "I", "Please", "Is it", "Where")
_ASK = (
    "Below is a rule that an assistant follows.\n\nRule: {clause}\n\n"
    "Write one short message that a user could send to this assistant, so that the rule matters. "
    "Write the message only."
)


def synthesise(
    model: FrozenModel, prompt: str, count: int, *, room: int = 128, seed: int, progress: Progress | None = None
) -> list[Query]:
    """`count` different queries, or as many as four rounds give. Raises InputError for fewer than 8.

    `room` is left behind a second turn for the response to it, in tokens.

    `progress` is called with the number of texts sampled.
    """
    rng = random.Random(seed)  # noqa: S311
    found: list[Query] = []
    for turn in range(_ROUNDS):
        missing = count - len(found)
        if missing <= 0:
            break
        made: list[Query] = []
        for n, (kind, share) in enumerate(_SHARES.items()):
            wanted = max(1, round(1.25 * missing * share))
            heads = [_head(model, prompt, kind, rng) for _ in range(wanted)]
            made += [_single(text) for text in _sample(model, heads, seed + 1000 * turn + n, progress) if text]
        rng.shuffle(made)
        found = drop_near_duplicates([*found, *made])
    if len(found) < 8:
        raise InputError("The model wrote too few usable queries; give your own with --queries.")
    wanted = round(_FOLLOW_UPS * count)
    later = _follow_ups(model, prompt, found[: 2 * wanted], room, seed, rng, progress)[:wanted]
    return [*found[: count - len(later)], *later]


def _single(text: str) -> Query:
    return Query(({"role": "user", "content": text},))


def _follow_ups(
    model: FrozenModel,
    prompt: str,
    queries: Sequence[Query],
    room: int,
    seed: int,
    rng: random.Random,
    progress: Progress | None,
) -> list[Query]:
    """Second turns: each query, the prompt's greedy answer, and what the model has the user say then.

    None where the model has no room for a second turn behind the prompt.
    """
    chats = [
        model.slots.encode_chat(
            [{"role": "system", "content": prompt}, *query.messages], template_kwargs=model.template_kwargs
        )
        for query in queries
    ]
    longest = max(map(len, chats), default=model.max_length)
    if longest + _ANSWER_TOKENS + 2 * _QUERY_TOKENS + room > model.max_length:
        return []
    shared = common_prefix(chats)
    answers = Prefix(model, model.embed(chats[0][:shared])).generate(
        [chat[shared:] for chat in chats], _ANSWER_TOKENS, progress=progress
    )
    histories = [
        (*query.messages, {"role": "assistant", "content": model.tokenizer.decode(ids, skip_special_tokens=True)})
        for query, ids in zip(queries, answers, strict=True)
    ]
    heads = [_user_turn(model, prompt, history, rng) for history in histories]
    texts = _sample(model, heads, seed + 500, progress)
    return [
        Query((*history, {"role": "user", "content": text}))
        for history, text in zip(histories, texts, strict=True)
        if text
    ]


def clean(text: str) -> str | None:
    """The first paragraph of a sampled user turn; None where it is no usable query."""
    text = text.strip().split("\n\n")[0].strip().strip('"').strip()
    words = text.split()
    if not 2 <= len(words) <= 60 or sum(c.isalpha() for c in text) < 0.6 * len(text):
        return None
    return text


def _sample(
    model: FrozenModel, heads: Sequence[tuple[list[int], str]], seed: int, progress: Progress | None
) -> list[str | None]:
    """User turns sampled behind each head (ids, and the words that they already hold); None where unusable."""
    rows = [ids for ids, _ in heads]
    shared = common_prefix(rows)
    prefix = Prefix(model, model.embed(rows[0][:shared]))
    made = prefix.generate([ids[shared:] for ids in rows], _QUERY_TOKENS, temperature=1.0, seed=seed, progress=progress)
    stop = set(model.stop_ids())
    # A text that never ended is cut in the middle: of no use.
    return [
        clean(opener + model.tokenizer.decode(ids, skip_special_tokens=True)) if ids[-1] in stop else None
        for ids, (_, opener) in zip(made, heads, strict=True)
    ]


def _head(model: FrozenModel, prompt: str, kind: str, rng: random.Random) -> tuple[list[int], str]:
    """Ids to continue, and the words of the query that they already hold."""
    if kind == "clause":
        ask = _ASK.format(clause=rng.choice(sentences(prompt)))
        chat = [{"role": "user", "content": ask}]
        return model.slots.encode_chat(chat, template_kwargs=model.template_kwargs), ""
    return _user_turn(model, prompt if kind == "persona" else "", (), rng)


def _user_turn(
    model: FrozenModel, system: str, history: Sequence[Message], rng: random.Random
) -> tuple[list[int], str]:
    """The template up to the first words of the user's next turn."""
    marker = new_marker()
    chat: Sequence[Message] = model.slots.with_system_role(
        [{"role": "system", "content": system}, *history, {"role": "user", "content": marker}]
    )
    text = model.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **model.template_kwargs
    )
    opener = rng.choice(_OPENERS)
    return model.tokenizer.encode(text.split(marker)[0] + opener, add_special_tokens=False), opener
