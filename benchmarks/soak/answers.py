"""Right answers, and answers judged by them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from benchmarks.client import ServerClient
from benchmarks.prompts import Chat, question_text
from benchmarks.servers import stock_server
from benchmarks.soak.options import SoakOptions
from benchmarks.tokens import make_token

COMPARED = 8
"""Tokens of a short answer; all are compared."""
LONG, LONG_TOKENS, LONG_WORDS = 8, 96, 270
"""Long answers with a reference, their tokens, and the words of their messages: they grow into a block of their own."""
TIE = 0.35
"""Nats behind the likeliest token within which another order of sums may bring a token to the front (bfloat16)."""
MAX_MODEL_LEN = 1024
_ADJECTIVES = ("grumpy", "cheerful", "sleepy", "royal", "ancient", "nervous", "proud", "tiny")
_NOUNS = ("pirate", "lawyer", "cat", "wizard", "robot", "farmer", "poet", "sailor")


@dataclass(frozen=True)
class Answer:
    """The tokens of a greedy answer, and how clear each choice was."""

    tokens: tuple[str, ...]
    close: tuple[frozenset[str], ...]
    """The other tokens within `TIE` of the likeliest, at each place."""


@dataclass
class Count:
    """What became of the requests."""

    right: Counter[str] = field(default_factory=Counter)
    """By action, as are ties: those of `plain` have nothing to do with tokens."""
    ties: Counter[str] = field(default_factory=Counter)
    """Answers that took another token within `TIE` of the likeliest; what follows cannot be compared."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Errors that are not the client's, and answers that tell nothing."""
    attempts: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    void: Counter[str] = field(default_factory=Counter)
    """Attempts on blocks that had left the cache by then: they count as not made."""

    def judge(self, action: str, reference: Answer, got: Answer, what: dict[str, Any]) -> None:
        """Compare an answer with the right one, token by token."""
        for n, right in enumerate(reference.tokens):
            ours = got.tokens[n] if n < len(got.tokens) else None
            if ours == right:
                continue
            if ours in reference.close[n]:
                self.ties[action] += 1
            else:
                self.wrong.append({**what, "at": n, "got": got.tokens, "right": reference.tokens})
            return
        if len(got.tokens) == len(reference.tokens):
            self.right[action] += 1
        else:
            self.wrong.append({**what, "at": len(reference.tokens), "got": got.tokens, "right": reference.tokens})


async def right_answers(options: SoakOptions) -> tuple[dict[str, Token], dict[tuple[str, int], Answer]]:
    """The tokens by id, and stock vLLM's answers by id and question, asked one after the other."""
    rng = random.Random(f"soak {options.seed}")  # noqa: S311
    texts = [f"You are a {a} {n}." for a in _ADJECTIVES for n in _NOUNS]
    if options.tokens > len(texts):
        raise InputError(f"At most {len(texts)} tokens can be made.")
    tokens: dict[str, Token] = {}
    references: dict[tuple[str, int], Answer] = {}
    async with stock_server(options.servers, options.out, MAX_MODEL_LEN) as stock, ServerClient(stock.url) as client:
        model = await client.model_id()
        chat = Chat(client, model)
        await chat.prepare()
        if not chat.system_role:
            raise InputError("The soak needs a model whose template takes a system message.")
        for n, text in enumerate(rng.sample(texts, options.tokens)):
            ids = await chat.plain_ids(text)
            token = make_token(options.folder, options.model, None, ids, text)
            chat.template_kwargs = token.manifest.template_kwargs
            be_id = f"soak-{n}"
            manifest = token.manifest.model_copy(update={"id": be_id})
            tokens[be_id] = Token(manifest, token.vectors)
            for q in range(options.questions):
                body = request_body(model, token) | {"messages": chat.messages(text, question(q, options))}
                references[be_id, q] = answer_of(await client.call("POST", "/v1/chat/completions", json=body))
        for n, (be_id, token) in enumerate(itertools.islice(tokens.items(), LONG)):
            messages = chat.messages(str(token.manifest.prompt.text), long_message(options.seed + n))
            body = request_body(model, token) | {"messages": messages, "max_tokens": LONG_TOKENS}
            references[be_id, -1] = answer_of(await client.call("POST", "/v1/chat/completions", json=body))
    return tokens, references


def long_message(seed: int) -> str:
    return " ".join(question_text(seed, "long").split()[:LONG_WORDS])


def question(number: int, options: SoakOptions) -> str:
    return " ".join(question_text(options.seed, f"soak {number}").split()[:24])


def request_body(model: str, token: Token) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "temperature": 0,
        "max_tokens": COMPARED,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 8,
        "return_tokens_as_token_ids": True,  # two tokens may have one text
    }
    if token.manifest.template_kwargs:
        body["chat_template_kwargs"] = token.manifest.template_kwargs
    return body


def answer_of(body: dict[str, Any]) -> Answer:
    places = body["choices"][0]["logprobs"]["content"]
    close = [
        frozenset(one["token"] for one in place["top_logprobs"] if one["logprob"] > place["logprob"] - TIE)
        - {place["token"]}
        for place in places
    ]
    return Answer(tuple(place["token"] for place in places), tuple(close))


def shown(references: dict[tuple[str, int], Answer]) -> float:
    """Share of mix-ups, one token's answer in place of another's to the same question, that would count as wrong."""
    by_question: dict[int, list[Answer]] = {}
    for (_, q), answer in references.items():
        if q < 0:
            continue  # each long message is asked of one token
        by_question.setdefault(q, []).append(answer)
    count = Count()
    for answers in by_question.values():
        for right, other in itertools.permutations(answers, 2):
            count.judge("mixed up", right, other, {})
    pairs = count.right.total() + count.ties.total() + len(count.wrong)
    return len(count.wrong) / pairs if pairs else 0.0
