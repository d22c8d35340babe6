"""Actions of the concurrent clients."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from be_serve.core.artifact import Token
from be_serve.core.redaction import hide
from benchmarks.common.answers import Answer, answer_of
from benchmarks.soak.answers import LONG, LONG_TOKENS, long_message
from benchmarks.soak.attacks import Attacks
from benchmarks.soak.client import SoakClient

ACTIONS = {"token": 50, "plain": 12, "long": 12, "abort": 12, "churn": 6, "attack": 8}
"""Actions with their relative frequency."""


@dataclass
class Workload:
    """Performs the actions of the clients and counts the outcomes."""

    client: SoakClient
    references: dict[tuple[str, int], Answer]
    """Reference answers by token id and question number."""
    fresh: itertools.count[int] = field(default_factory=itertools.count)

    async def work(self, number: int, until: float) -> None:
        """Perform random actions of client `number` until the monotonic time `until`."""
        client = self.client
        rng = random.Random(f"client {client.options.seed} {number}")  # noqa: S311
        names, weights = list(ACTIONS), list(ACTIONS.values())
        do: dict[str, Callable[[random.Random], Awaitable[None]]] = {name: getattr(self, name) for name in names}
        while time.monotonic() < until:
            (name,) = rng.choices(names, weights)
            client.count.asked[name] += 1
            try:
                await do[name](rng)
            except Exception as exc:  # any error counts as a failure; the client goes on
                client.count.failures[f"{name}: {type(exc).__name__}: {hide(str(exc))}"[:200]] += 1
                if isinstance(exc, httpx.ConnectError):
                    return  # the server has ended; the failure is counted

    async def token(self, rng: random.Random) -> None:
        """Chat with a token; compare the answer."""
        await self._ask("token", *self.client.pick(rng), use_token=True)

    async def plain(self, rng: random.Random) -> None:
        """Chat with a token's text as a plain system prompt; compare the answer."""
        await self._ask("plain", *self.client.pick(rng), use_token=False)

    async def long(self, rng: random.Random) -> None:
        """Send a message of several KV blocks; compare the long answer, whose blocks other requests evict."""
        client = self.client
        n = rng.randrange(min(LONG, len(client.tokens)))
        be_id = list(client.tokens)[n]
        use_token = rng.random() < 0.7
        body = client.chat(be_id, 0, use_token=use_token) | {"max_tokens": LONG_TOKENS}
        body["messages"][-1]["content"] = long_message(client.options.seed + n)
        await self._compare("long" if use_token else "long, plain", be_id, -1, body)

    async def abort(self, rng: random.Random) -> None:
        """Open a stream with a token and close it after the first event."""
        client = self.client
        be_id, q = client.pick(rng)
        body = client.chat(be_id, q, use_token=True) | {"stream": True, "max_tokens": 200}
        async with client.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                client.expect("abort", answer, 200)
                return
            async for line in answer.aiter_lines():
                if "choices" not in json.loads(line.removeprefix("data:")):
                    client.count.failures[f"abort: the stream starts with {line}"[:200]] += 1
                return
        client.count.failures["abort: an empty stream"] += 1

    async def churn(self, rng: random.Random) -> None:
        """Register a token, chat with it (compared), remove it and check that it is gone."""
        client = self.client
        be_id, q = client.pick(rng)
        token = client.tokens[be_id]
        own = Token(token.manifest.model_copy(update={"id": f"churn-{next(self.fresh)}"}), token.vectors)
        await client.put(own)
        await self._ask("churn", be_id, q, use_token=True, named=own.manifest.id)
        gone = await client.http.delete(f"/v1/be/tokens/{own.manifest.id}", headers={"X-BE-Key": client.key})
        client.expect("churn, remove", gone, 200)
        body = client.chat(be_id, q, use_token=True) | {"be_id": own.manifest.id}
        client.expect("churn, removed", await client.post("/v1/chat/completions", body), 404)

    async def attack(self, rng: random.Random) -> None:
        """Make one random attack."""
        await Attacks(self.client).random_attack(rng)

    async def _ask(self, name: str, be_id: str, q: int, *, use_token: bool, named: str | None = None) -> None:
        body = self.client.chat(be_id, q, use_token=use_token)
        if named:
            body["be_id"] = named
        await self._compare(name, be_id, q, body)

    async def _compare(self, name: str, be_id: str, q: int, body: dict[str, Any]) -> None:
        answer = await self.client.post("/v1/chat/completions", body)
        if self.client.expect(name, answer, 200):
            what = {"action": name, "token": be_id, "question": q}
            self.client.count.judge(name, self.references[be_id, q], answer_of(answer.json()), what)
