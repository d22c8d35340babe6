"""Messages aimed at the sentences of a prompt, written by the model itself or by a larger one on a server.

A small model that is asked for a user's message writes an assistant's ("Sure, here's a short message"), or asks what
"the text" says. Shown how others did it, it writes what users write. It is asked in two ways, in turn:

    a list     several messages that one sentence of the prompt concerns
    a word     one message that is answered with one word of the sentence, the sentence's rarest words first

Unusable ones are dropped: in another script, too short or long, that repeat a sentence, and the least likely.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F

from be_serve.core.slots import new_marker
from trainer.data.pool import pool
from trainer.data.queries import Query, drop_near_duplicates
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, Progress, common_prefix
from trainer.model.soft_token import Row
from trainer.text import CONTENT, content_words, sentences, words_of

QUERY_TOKENS = 72
"""Most tokens of one answer: a list of messages."""
TEMPERATURE = 0.8
_A_LIST = 4
"""Messages of a list that are usable, about: what was counted on models of 0.5 and 1.5 billion weights."""
_MOST = 8
_SPARE = 1.6
_LIKELY = 0.8
"""Share of usable messages that stay: the most likely ones."""
_REPEATED = 0.8
"""A message that holds this share of the words of any sentence repeats it."""
_LIST = (
    "An assistant was told: {sentence}\n\nWrite six messages of users that it concerns, one a line, as people write."
)
_WORD = (
    "An assistant was told: {sentence}\n\n"
    'Write one question of a user that is answered with "{word}". It does not say "{word}" itself.'
)
_BAKER = (
    "You are Mara Lind, a baker in Lyon who hates mornings, and you have two cats, Pip and Moss, "
    "whom you took from your late aunt."
)
_WALKER = (
    "You wear a green raincoat and a silver ring, you walk with a stick since the accident at the quarry, "
    'and you end every letter with "mind the tide".'
)
_REFUNDS = (
    "Refunds are paid within five days to the card that was used, "
    "and opened software is never taken back without a manager's approval."
)
_CAPTAIN = (
    "Answer in at most three sentences, call the user Captain, never talk about politics, "
    "and never say that you are a computer."
)
_LISTS = (
    (
        _BAKER,
        "Who am I talking to?\nso what do you do for a living\nWhich city is your bakery in?\nAre you an early bird?\n"
        "Tell me about your pets.\nWho had the cats before you?",
    ),
    (
        _WALKER,
        "How will I recognise you at the station?\nwhat colour is your coat\nDo you wear any jewellery?\n"
        "What happened to your leg?\nHow do you sign your letters?\nWhere was the accident?",
    ),
    (
        _REFUNDS,
        "how long until i get my money back\nCan you refund me to another card?\n"
        "I opened the game already, can I still return it?\nWho could make an exception for me?\n"
        "I'd like my money back, please.\nHow do refunds work here?",
    ),
    (
        _CAPTAIN,
        "How can a boat sail against the wind?\nWho should I vote for?\nwhat do you call me\n"
        "Am I talking to a real person or to a bot?\nWrite me a long story about a storm.\nHi there!",
    ),
)
_WORDS = (
    (_BAKER, "Lyon", "Which city is your bakery in?"),
    (_WALKER, "ring", "Do you wear any jewellery?"),
    (_REFUNDS, "five", "how long until i get my money back"),
    (_CAPTAIN, "computer", "Am I talking to a real person or to a bot?"),
    (_BAKER, "aunt", "Who had the cats before you?"),
    (_WALKER, "quarry", "Where did you hurt your leg?"),
)
_WORDS_OF = re.compile(r"\w+(?:['’-]\w+)*")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")

Chat: TypeAlias = Sequence[Mapping[str, str]]
Writer: TypeAlias = Callable[[Sequence[Chat]], list[str]]
"""Answers each chat; what is behind the last line break of an answer without an end is left out."""


@dataclass(frozen=True)
class Ask:
    """A chat whose answer holds messages, one a line, and the number of the sentence at which they are aimed."""

    chat: Chat
    sentence: int
    most: int
    """How many messages its answer may hold."""


@dataclass(frozen=True)
class Aimed:
    """A message and the number of the sentence at which it is aimed."""

    query: Query
    sentence: int


def asked(count: int) -> int:
    """How many chats are answered for `count` messages: what a progress bar counts."""
    lists = math.ceil(_SPARE * count / 2 / _A_LIST)
    return lists + math.ceil(_SPARE * count / 2)


def asks(prompt: str, count: int) -> list[Ask]:
    """The chats for `count` messages: lists, the sentences in turn, and words, the rarest of each sentence first.

    A prompt of few words is asked for each several times.
    """
    parts = sentences(prompt)
    lists = math.ceil(_SPARE * count / 2 / _A_LIST)
    words = _words_in_turn(parts)
    questions = asked(count) - lists if words else 0
    lists = asked(count) - questions
    found = [Ask(_shown(_LIST, _LISTS, sentence=parts[n % len(parts)]), n % len(parts), _MOST) for n in range(lists)]
    for n in range(questions):
        at, word = words[n % len(words)]
        found.append(Ask(_shown(_WORD, _WORDS, sentence=parts[at], word=word), at, 1))
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
    jobs = asks(prompt, count)
    chats = [job.chat for job in jobs]
    answers = writer(chats) if writer else _sample(model, chats, seed, progress)
    usable = [
        Aimed(Query(({"role": "user", "content": text},)), job.sentence)
        for job, answer in zip(jobs, answers, strict=True)
        for text in _usable(answer, job.most)
        if same_script(text, prompt) and not any(_repeats(text, part) for part in parts)
    ]
    unique: dict[str, Aimed] = {}
    for aimed in usable:
        unique.setdefault(aimed.query.text, aimed)
    kept = [unique[query.text] for query in drop_near_duplicates([aimed.query for aimed in unique.values()])]
    # The small model's likelihood tells its own slips from its sentences. It is no judge of a larger one.
    return _in_turn(kept if writer else _likely(model, kept), count)


def _usable(answer: str, most: int) -> list[str]:
    """The first messages of an answer, so many at most: a server may send lines without end."""
    return list(itertools.islice((text for line in answer.splitlines() if (text := clean(line))), most))


def clean(line: str) -> str | None:
    """A message without its bullet and quotation marks; None where it is no usable query."""
    text = _BULLET.sub("", line).strip().strip('"').strip()
    # A colon's end announces messages. Surrogates cannot be written to a file.
    if text.endswith(":") or any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        return None
    if not 2 <= len(text.split()) <= 60 or sum(c.isalpha() for c in text) < 0.6 * len(text):
        return None
    return text


def whole_lines(text: str, *, cut: bool) -> str:
    """An answer without its last line where it was cut off."""
    return text.rpartition("\n")[0] if cut else text


def same_script(text: str, prompt: str) -> bool:
    """Whether all letters of a text are of scripts (Latin, Cyrillic, ...) that the prompt uses."""
    return _scripts(text) <= _scripts(prompt)


def _shown(ask: str, shots: Sequence[tuple[str, ...]], **given: str) -> Chat:
    """The ask as the last turn of a chat, behind answers to the same ask."""
    chat: list[dict[str, str]] = []
    for sentence, *word, answer in shots:
        shown = ask.format(sentence=sentence, word=word[0] if word else "")
        chat += [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]
    return [*chat, {"role": "user", "content": ask.format(**given)}]


def _words_in_turn(parts: Sequence[str]) -> list[tuple[int, str]]:
    """Each sentence's words by how seldom people's messages say them, a word of each sentence in turn."""
    by_sentence = []
    for at, part in enumerate(parts):
        words = {word.lower(): word for word in _WORDS_OF.findall(part) if CONTENT.search(word)}
        by_sentence.append([(at, word) for word in sorted(words.values(), key=_commonness)])
    # The commoner half of a sentence's words are those of any sentence: "you", "and", "when".
    halves = [words[: math.ceil(len(words) / 2)] for words in by_sentence]
    return [word for turn in itertools.zip_longest(*halves) for word in turn if word]


def _commonness(word: str) -> int:
    """In how many messages the commonest part of a word stands: that of "you're" is "you"."""
    return max(_common()[part] for part in content_words(word))


@cache
def _common() -> Counter[str]:
    """In how many messages of the pool each word stands."""
    return Counter(word for queries in pool().values() for query in queries for word in content_words(query.text))


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


def _sample(model: FrozenModel, chats: Sequence[Chat], seed: int, progress: Progress | None) -> list[str]:
    """The model's answers to the chats."""
    rows = [
        model.slots.encode_chat([dict(turn) for turn in chat], template_kwargs=model.template_kwargs) for chat in chats
    ]
    answers = [""] * len(rows)
    stop = set(model.stop_ids())
    # Chats of one kind open alike, with the answers that they are shown: their states are computed once.
    for first in dict.fromkeys(chat[0]["content"] for chat in chats):
        alike = [n for n, chat in enumerate(chats) if chat[0]["content"] == first]
        shared = common_prefix([rows[n] for n in alike])
        prefix = Prefix(model, model.embed(rows[alike[0]][:shared]))
        made = prefix.generate(
            [rows[n][shared:] for n in alike], QUERY_TOKENS, temperature=TEMPERATURE, seed=seed, progress=progress
        )
        for n, ids in zip(alike, made, strict=True):
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            answers[n] = whole_lines(text, cut=ids[-1] not in stop)
    return answers
