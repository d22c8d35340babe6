"""The two servers, and for each one client per chat of a burst."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from uuid import uuid4

from be_serve.core.artifact import Token
from be_serve.core.errors import InputError, ServerError
from be_serve.process import Server
from benchmarks.common.client import ServerClient
from benchmarks.common.prompts import Chat, fit_questions, fit_text, handbook
from benchmarks.common.servers import ServerOptions, plugin_server, run_alone, stock_server
from benchmarks.common.tokens import make_token, register
from benchmarks.load.figures import HISTOGRAMS, Burst, read_histogram
from benchmarks.load.options import LoadOptions

QUESTIONS = 16


@dataclass
class Fleet:
    """Both servers by name (`plugin`, `other`), their clients and the texts of the chats."""

    options: LoadOptions
    servers: dict[str, Server]
    clients: dict[str, list[ServerClient]]
    questions: list[str]
    floor: str
    """Plain prompt of k tokens."""
    chat: Chat
    model: str
    token: Token
    """Token that holds the embedding rows of `floor`."""
    key: str
    sent: int = 0
    """Number of chats sent."""
    sent_with_token: int = 0
    """Number of chats sent with a token."""

    @classmethod
    async def start(cls, options: LoadOptions, stack: AsyncExitStack, key: str, *, other_first: bool) -> Fleet:
        """Start both servers and return the fleet. `stack` stops the servers. Raises InputError and ServerError."""
        length = _max_model_len(options)
        made = {"plugin": plugin_server(options.servers, options.out, length, admin_key=key)}
        if options.other == "stock":
            made["other"] = stock_server(options.servers, options.out, length)
        else:
            own = ServerOptions(**{**vars(options.servers), "plugin_args": (f"--be-injection={options.other}",)})
            made["other"] = plugin_server(own, options.out / "other", length, admin_key=key)
        servers = dict(reversed(made.items())) if other_first else made
        clients: dict[str, list[ServerClient]] = {}
        for name, server in servers.items():
            await stack.enter_async_context(server)
            clients[name] = [
                await stack.enter_async_context(ServerClient(server.url)) for _ in range(options.concurrency)
            ]
        first = clients["other"][0]
        model = await first.model_id()
        chat = Chat(first, model)
        await chat.prepare()
        labels = [f"load {n}" for n in range(QUESTIONS)]
        questions = await fit_questions(chat, options.question_tokens, labels, options.seed)
        floor = await fit_text(handbook(options.seed), options.k, chat.prompt_tokens)
        ids = await chat.plain_ids(floor)
        if len(ids) < options.k:
            raise InputError(f"Found no plain text of {options.k} tokens for the token. Use a smaller --k.")
        token = make_token(options.folder, options.model, None, ids[: options.k], floor)
        chat.template_kwargs = token.manifest.template_kwargs
        return cls(options, servers, clients, questions, floor, chat, model, token, key)

    async def register(self) -> None:
        """Register the token under `registered` ids on every server with the plugin. The registries keep them."""
        names = ["plugin"] if self.options.other == "stock" else ["plugin", "other"]
        for name in names:
            for i in range(max(self.options.registered, self.options.active)):
                await register(self.clients[name][0], f"bench-load-{i}", self.token, self.key)

    async def burst(self, arm: str) -> Burst:
        """Send one burst of an arm. The other server is suspended."""
        target = "other" if arm.endswith("_other") else "plugin"
        run_alone(self.servers, target)
        server, clients = self.servers[target], self.clients[target]
        await asyncio.gather(*(client.healthy() for client in clients))  # open connections
        bodies = [self._body(arm) for _ in clients]
        cpu, begin = server.cpu_seconds(), perf_counter()
        samples = await asyncio.gather(*(client.chat(body) for client, body in zip(clients, bodies, strict=True)))
        seconds, now = perf_counter() - begin, server.cpu_seconds()
        return Burst(seconds, list(samples), None if cpu is None or now is None else now - cpu)

    def _body(self, arm: str) -> dict[str, Any]:
        question = self.questions[self.sent % QUESTIONS]
        self.sent += 1
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.chat.messages(self.floor, question),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": self.options.max_tokens,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "cache_salt": uuid4().hex,
        }
        if self.chat.template_kwargs:
            body["chat_template_kwargs"] = self.chat.template_kwargs
        if arm.startswith("be"):
            body["messages"] = [{"role": "user", "content": question}]
            body["be_id"] = f"bench-load-{self.sent_with_token % self.options.active}"
            self.sent_with_token += 1
        return body

    async def injection(self) -> dict[str, Counter[str]]:
        """Return the plugin server's histograms by their keys in HISTOGRAMS; empty if the server does not answer."""
        self.servers["plugin"].thaw()
        with contextlib.suppress(ServerError):
            text = await self.clients["plugin"][0].text("/metrics")
            return {name: read_histogram(text, metric) for name, metric in HISTOGRAMS.items()}
        return {}


def _max_model_len(options: LoadOptions) -> int:
    longest = options.question_tokens + options.k + options.max_tokens + 256
    return -(-longest // 128) * 128
