"""Reference answers: stock vLLM's answers to the texts, one request at a time."""

from __future__ import annotations

import itertools
import random
from typing import Any

from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from benchmarks.common.answers import Answer, Count, answer_of
from benchmarks.common.client import ServerClient
from benchmarks.common.prompts import Chat, question_text
from benchmarks.common.servers import stock_server
from benchmarks.common.tokens import make_token
from benchmarks.soak.options import SoakOptions

COMPARED = 8
"""Number of tokens in a short answer. All are compared."""
LONG, LONG_TOKENS, LONG_WORDS = 8, 96, 270
"""Number of long reference answers, tokens per answer and words per message. An answer needs a KV block of its own."""
MAX_MODEL_LEN = 1024
_ADJECTIVES = ("grumpy", "cheerful", "sleepy", "royal", "ancient", "nervous", "proud", "tiny")
_NOUNS = ("pirate", "lawyer", "cat", "wizard", "robot", "farmer", "poet", "sailor")


async def right_answers(options: SoakOptions) -> tuple[dict[str, Token], dict[tuple[str, int], Answer]]:
    """Return the tokens by id, and the reference answers by id and question. The question -1 is the long message.

    Raises InputError and ServerError.
    """
    rng = random.Random(f"soak {options.seed}")  # noqa: S311
    texts = [f"You are a {a} {n}." for a in _ADJECTIVES for n in _NOUNS]
    if options.tokens > len(texts):
        raise InputError(f"The soak has texts for {len(texts)} tokens. Use --tokens {len(texts)} or less.")
    tokens: dict[str, Token] = {}
    references: dict[tuple[str, int], Answer] = {}
    async with stock_server(options.servers, options.out, MAX_MODEL_LEN) as stock, ServerClient(stock.url) as client:
        model = await client.model_id()
        chat = Chat(client, model)
        await chat.prepare()
        if not chat.system_role:
            raise InputError("The soak needs a model whose chat template accepts a system message.")
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
    """Return a message of `LONG_WORDS` words."""
    return " ".join(question_text(seed, "long").split()[:LONG_WORDS])


def question(number: int, options: SoakOptions) -> str:
    """Return the text of a question by its number."""
    return " ".join(question_text(options.seed, f"soak {number}").split()[:24])


def request_body(model: str, token: Token) -> dict[str, Any]:
    """Return the JSON body of a compared chat, without messages and without `be_id`."""
    body: dict[str, Any] = {
        "model": model,
        "temperature": 0,
        "max_tokens": COMPARED,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 8,
        "return_tokens_as_token_ids": True,  # two tokens can have the same text
    }
    if token.manifest.template_kwargs:
        body["chat_template_kwargs"] = token.manifest.template_kwargs
    return body


def detectable_share(references: dict[tuple[str, int], Answer]) -> float:
    """Return the share of mix-ups that would count as wrong.

    A mix-up is one token's answer in place of another token's answer to the same question.
    """
    by_question: dict[int, list[Answer]] = {}
    for (_, q), answer in references.items():
        if q < 0:
            continue  # only one token gets each long message
        by_question.setdefault(q, []).append(answer)
    count = Count()
    for answers in by_question.values():
        for right, other in itertools.permutations(answers, 2):
            count.judge("mix-up", right, other, {})
    pairs = count.right.total() + count.ties.total() + len(count.wrong)
    return len(count.wrong) / pairs if pairs else 0.0
