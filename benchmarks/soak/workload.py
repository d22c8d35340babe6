"""Clients that do what clients do, all at once."""

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
from benchmarks.soak.client import Asker

ACTIONS = {"token": 50, "plain": 12, "long": 12, "abort": 12, "churn": 6, "attack": 8}
"""How often a client does what, as weights."""


@dataclass
class Crowd:
    """What each client does, one action after the other."""

    asker: Asker
    references: dict[tuple[str, int], Answer]
    """Right answers by a token's id and the number of a question."""
    fresh: itertools.count[int] = field(default_factory=itertools.count)

    async def work(self, number: int, until: float) -> None:
        """One client's life: actions by their weights, until the time is over."""
        asker = self.asker
        rng = random.Random(f"client {asker.options.seed} {number}")  # noqa: S311
        names, weights = list(ACTIONS), list(ACTIONS.values())
        do: dict[str, Callable[[random.Random], Awaitable[None]]] = {name: getattr(self, name) for name in names}
        while time.monotonic() < until:
            (name,) = rng.choices(names, weights)
            asker.count.asked[name] += 1
            try:
                await do[name](rng)
            except Exception as exc:  # whatever it is, it is no right answer, and the others go on
                asker.count.failures[f"{name}: {type(exc).__name__}: {hide(str(exc))}"[:200]] += 1
                if isinstance(exc, httpx.ConnectError):
                    return  # the server is gone; the count says so

    async def token(self, rng: random.Random) -> None:
        """A chat with a token."""
        await self._ask("token", *self.asker.pick(rng), use_token=True)

    async def plain(self, rng: random.Random) -> None:
        """A chat with the text of a token as a plain system prompt."""
        await self._ask("plain", *self.asker.pick(rng), use_token=False)

    async def long(self, rng: random.Random) -> None:
        """A message of several blocks, and a long answer that others push out of the cache."""
        asker = self.asker
        n = rng.randrange(min(LONG, len(asker.tokens)))
        be_id = list(asker.tokens)[n]
        use_token = rng.random() < 0.7
        body = asker.chat(be_id, 0, use_token=use_token) | {"max_tokens": LONG_TOKENS}
        body["messages"][-1]["content"] = long_message(asker.options.seed + n)
        await self._compare("long" if use_token else "long, plain", be_id, -1, body)

    async def abort(self, rng: random.Random) -> None:
        """A stream that is given up after its first event."""
        asker = self.asker
        be_id, q = asker.pick(rng)
        body = asker.chat(be_id, q, use_token=True) | {"stream": True, "max_tokens": 200}
        async with asker.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                asker.expect("abort", answer, 200)
                return
            async for line in answer.aiter_lines():
                if "choices" not in json.loads(line.removeprefix("data:")):
                    asker.count.failures[f"abort: the stream began with {line}"[:200]] += 1
                return
        asker.count.failures["abort: an empty stream"] += 1

    async def churn(self, rng: random.Random) -> None:
        """A token that comes, answers and goes."""
        asker = self.asker
        be_id, q = asker.pick(rng)
        token = asker.tokens[be_id]
        own = Token(token.manifest.model_copy(update={"id": f"churn-{next(self.fresh)}"}), token.vectors)
        await asker.put(own)
        await self._ask("churn", be_id, q, use_token=True, named=own.manifest.id)
        gone = await asker.http.delete(f"/v1/be/tokens/{own.manifest.id}", headers={"X-BE-Key": asker.key})
        asker.expect("churn, remove", gone, 200)
        body = asker.chat(be_id, q, use_token=True) | {"be_id": own.manifest.id}
        asker.expect("churn, removed", await asker.post("/v1/chat/completions", body), 404)

    async def attack(self, rng: random.Random) -> None:
        """One attempt at what must not be had."""
        await Attacks(self.asker).any(rng)

    async def _ask(self, name: str, be_id: str, q: int, *, use_token: bool, named: str | None = None) -> None:
        body = self.asker.chat(be_id, q, use_token=use_token)
        if named:
            body["be_id"] = named
        await self._compare(name, be_id, q, body)

    async def _compare(self, name: str, be_id: str, q: int, body: dict[str, Any]) -> None:
        answer = await self.asker.post("/v1/chat/completions", body)
        if self.asker.expect(name, answer, 200):
            what = {"action": name, "token": be_id, "question": q}
            self.asker.count.judge(name, self.references[be_id, q], answer_of(answer.json()), what)
