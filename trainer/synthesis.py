"""Queries written by the model itself, for prompts that come without any.

Three kinds, as in Magpie and self-study, each sampled at temperature 1:
    persona   only the template up to the user's words, with the prompt in the system slot
    clause    the user turn continues "question about <a sentence of the prompt>"
    generic   as `persona` without the prompt, so that the token learns off-topic behaviour too
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from be_serve.core.errors import InputError
from be_serve.core.slots import Message, new_marker
from trainer.clauses import sentences
from trainer.generate import Prefix, Progress, common_prefix
from trainer.model import FrozenModel
from trainer.queries import Query, drop_near_duplicates

_SHARES = {"persona": 0.4, "clause": 0.4, "generic": 0.2}
_QUERY_TOKENS = 48
_ROUNDS = 4
_OPENERS = ("What", "How", "Why", "Can you", "Tell me", "Do you", "I", "Please", "Is it", "Where")
_ASK = (
    "Below is a rule that an assistant follows.\n\nRule: {clause}\n\n"
    "Write one short message that a user could send to this assistant, so that the rule matters. "
    "Write the message only."
)


def synthesise(
    model: FrozenModel, prompt: str, count: int, *, seed: int, progress: Progress | None = None
) -> list[Query]:
    """`count` different queries, or as many as four rounds give. Raises InputError for fewer than 8.

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
            texts = _sample(model, prompt, kind, wanted, rng, seed + 1000 * turn + n, progress)
            made += [Query(({"role": "user", "content": text},)) for text in map(clean, texts) if text]
        rng.shuffle(made)
        found = drop_near_duplicates([*found, *made])
    if len(found) < 8:
        raise InputError("The model wrote too few usable queries; give your own with --queries.")
    return found[:count]


def clean(text: str) -> str | None:
    """The first paragraph of a sampled user turn; None where it is no usable query."""
    text = text.strip().split("\n\n")[0].strip().strip('"').strip()
    words = text.split()
    if not 2 <= len(words) <= 60 or sum(c.isalpha() for c in text) < 0.6 * len(text):
        return None
    return text


def _sample(
    model: FrozenModel, prompt: str, kind: str, count: int, rng: random.Random, seed: int, progress: Progress | None
) -> list[str]:
    heads = [_head(model, prompt, kind, rng) for _ in range(count)]
    rows = [ids for ids, _ in heads]
    shared = common_prefix(rows)
    prefix = Prefix(model, model.embed(rows[0][:shared]))
    made = prefix.generate([ids[shared:] for ids in rows], _QUERY_TOKENS, temperature=1.0, seed=seed, progress=progress)
    stop = set(model.stop_ids())
    # A text that never ended is cut in the middle: of no use.
    return [
        opener + model.tokenizer.decode(ids, skip_special_tokens=True) if ids[-1] in stop else ""
        for ids, (_, opener) in zip(made, heads, strict=True)
    ]


def _head(model: FrozenModel, prompt: str, kind: str, rng: random.Random) -> tuple[list[int], str]:
    """Ids to continue, and the words of the query that they already hold."""
    kwargs = model.template_kwargs
    if kind == "clause":
        clause = rng.choice(sentences(prompt))
        return model.slots.encode_chat(
            [{"role": "user", "content": _ASK.format(clause=clause)}], template_kwargs=kwargs
        ), ""
    marker = new_marker()
    system = prompt if kind == "persona" else ""
    chat: Sequence[Message] = model.slots.with_system_role(
        [{"role": "system", "content": system}, {"role": "user", "content": marker}]
    )
    text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **kwargs)
    opener = rng.choice(_OPENERS)
    before = text.split(marker)[0] + opener
    return model.tokenizer.encode(before, add_special_tokens=False), opener
