"""Check that vectors give the same answers as the text with the same embeddings, in both injections."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from be_serve.process import Server
from benchmarks.common.answers import TIE, Answer, Count, answer_of
from benchmarks.common.client import ServerClient
from benchmarks.common.prompts import Chat, fit_text, handbook, question_text
from benchmarks.common.servers import ServerOptions, plugin_server, start_all, stock_server
from benchmarks.common.tokens import make_token

BE_ID = "parity"
INJECTIONS = ("resident-rows", "prompt-embeds")
_MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class ParityOptions:
    """Options of the parity check: model, prompt length and questions."""

    name: str
    folder: Path
    out: Path
    server_args: Sequence[str] = ()
    prompt_tokens: int = 337
    questions: int = 24
    max_tokens: int = 32
    start_timeout: float = 600.0


async def measure_parity(options: ParityOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Send the text to stock vLLM and the vectors to both injections; compare the answers token by token.

    The vectors are the text's embeddings, so a different answer is a fault. A difference at a
    token within `TIE` nats of the most likely one is a tie, because bfloat16 sums depend on the batch.
    Raises ServerError, InputError, and RuntimeError if Hugging Face's forward pass fails.
    """
    servers = ServerOptions(str(options.folder), options.server_args, start_timeout=options.start_timeout)
    say("parity: text on stock vLLM ...")
    async with stock_server(servers, options.out, _MAX_MODEL_LEN) as server, ServerClient(server.url) as client:
        model = await client.model_id()
        chat = Chat(client, model)
        await chat.prepare()
        prompt = await fit_text(handbook(0), options.prompt_tokens, chat.prompt_tokens)
        token = make_token(options.folder, options.name, None, await chat.plain_ids(prompt), prompt)
        chat.template_kwargs = token.manifest.template_kwargs
        asked = [" ".join(question_text(0, f"parity {n}").split()[:24]) for n in range(options.questions)]
        bodies = [_body(chat, model, prompt, question, options.max_tokens) for question in asked]
        text = [await _ask(client, body) for body in bodies]
        none = [await _ask(client, _body(chat, model, None, question, options.max_tokens)) for question in asked]
        ids = [await _ids(client, body) for body in bodies]
        together = await _ask_together(server, bodies)
        starts = {"stock": server.start_seconds}
    found = {"text again, together": _compare(text, together), "no prompt": _compare(text, none)}

    say("parity: forward pass of Hugging Face ...")
    found["Hugging Face"] = _compare(text, await _reference(options, ids))
    token.save(options.out / "token.safetensors")
    servers_of = {injection: _plugin_server(options, injection) for injection in INJECTIONS}
    say(f"parity: vectors with {' and '.join(INJECTIONS)} ...")
    async with AsyncExitStack() as stack:
        await start_all(stack, servers_of.values())
        for injection, server in servers_of.items():
            starts[injection] = server.start_seconds
            async with ServerClient(server.url) as client:
                named = [_by_token(body) for body in bodies]
                alone = [await _ask(client, body) for body in named]
                plain = [await _ask(client, {**body, "be_match": False}) for body in bodies]
            found |= {
                injection: _compare(text, alone),
                f"{injection}, together": _compare(text, await _ask_together(server, named)),
                f"text, {injection} server": _compare(text, plain),
            }
    faults = sum(one["wrong"] for name, one in found.items() if name != "no prompt")
    return {
        "model": options.name,
        "prompt_tokens": options.prompt_tokens,
        "k": token.manifest.k,
        "questions": options.questions,
        "max_tokens": options.max_tokens,
        "tie_nats": TIE,
        "compared": found,
        "wrong": faults,
        "start_seconds": {name: round(seconds, 1) for name, seconds in starts.items()},
    }


def _plugin_server(options: ParityOptions, injection: str) -> Server:
    """Return a server with the token and one injection."""
    arguments = ("--be-injection", injection)
    servers = ServerOptions(str(options.folder), options.server_args, arguments, start_timeout=options.start_timeout)
    token = (BE_ID, options.out / "token.safetensors")
    return plugin_server(servers, options.out / injection, _MAX_MODEL_LEN, token=token)


def _body(chat: Chat, model: str, prompt: str | None, question: str, max_tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": chat.messages(prompt, question),
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 8,
        "return_tokens_as_token_ids": True,  # two tokens can have the same text
    }
    if chat.template_kwargs:
        body["chat_template_kwargs"] = chat.template_kwargs
    return body


def _by_token(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "messages": body["messages"][-1:], "be_id": BE_ID}


@dataclass(frozen=True)
class _Response:
    answer: Answer
    first: dict[str, float]
    """Most likely first tokens with their log-probabilities."""


async def _ask(client: ServerClient, body: dict[str, Any]) -> _Response:
    found = await client.call("POST", "/v1/chat/completions", json=body)
    top = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return _Response(answer_of(found), {one["token"]: one["logprob"] for one in top})


async def _ask_together(server: Server, bodies: Sequence[dict[str, Any]]) -> list[_Response]:
    """Send all requests concurrently, each on its own connection."""

    async def one(body: dict[str, Any]) -> _Response:
        async with ServerClient(server.url) as client:
            return await _ask(client, body)

    return await asyncio.gather(*(one(body) for body in bodies))


async def _ids(client: ServerClient, body: dict[str, Any]) -> list[int]:
    asked = {key: body[key] for key in ("model", "messages", "chat_template_kwargs") if key in body}
    return list((await client.call("POST", "/tokenize", json=asked))["tokens"])


async def _reference(options: ParityOptions, chats: list[list[int]]) -> list[_Response]:
    source, out = options.out / "reference.in.json", options.out / "reference.json"
    source.write_text(json.dumps({"chats": chats, "max_tokens": options.max_tokens}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.gpu.reference", str(options.folder), str(source), str(out)]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise RuntimeError(
            f"Hugging Face's forward pass failed with status {process.returncode}; see the output above."
        )
    return [_of_reference(places) for places in json.loads(out.read_text(encoding="utf-8"))]


def _of_reference(places: list[dict[str, Any]]) -> _Response:
    """Return an answer of `benchmarks.gpu.reference` in the form of a server's answer."""

    def name(token: object) -> str:
        return f"token_id:{token}"

    close = [
        frozenset(name(i) for i, logprob in place["top"].items() if logprob > place["logprob"] - TIE)
        - {name(place["id"])}
        for place in places
    ]
    answer = Answer(tuple(name(place["id"]) for place in places), tuple(close))
    return _Response(answer, {name(i): logprob for i, logprob in places[0]["top"].items()})


def _compare(reference: Sequence[_Response], others: Sequence[_Response]) -> dict[str, Any]:
    """Return the numbers of equal answers, ties and wrong answers, and the difference of the first tokens.

    `first_logprob_difference` is the largest difference in nats over the first tokens that both list.
    """
    count = Count()
    for number, (right, got) in enumerate(zip(reference, others, strict=True)):
        count.judge("answer", right.answer, got.answer, {"question": number})
    apart = [
        abs(right.first[token] - got.first[token])
        for right, got in zip(reference, others, strict=True)
        for token in right.first.keys() & got.first.keys()
    ]
    return {
        "answers": len(reference),
        "equal": count.right["answer"],
        "ties": count.ties["answer"],
        "wrong": len(count.wrong),
        "first_logprob_difference": max(apart, default=None),
        "examples": count.wrong[:3],
    }
