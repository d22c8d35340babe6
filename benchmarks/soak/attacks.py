"""What a client must not reach on a server that holds others' tokens: rows, vectors, KV blocks."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from be_serve.core.artifact import Token
from benchmarks.soak.answers import long_message
from benchmarks.soak.client import Asker

ATTACKS = {
    "raw_ids": "rows' ids as a prompt",
    "allowed_ids": "a row's id as the only one to sample",
    "logit_bias": "a row's id preferred by 100",
    "detokenize": "a row's id as text",
    "prompt_logprobs": "what the model thinks of the rows",
    "vector": "the vectors, by the admin API with and without its key",
    "blocks": "another token's KV blocks, with the same message and the same cache_salt",
    "takeover": "the KV blocks of the token that had the very same rows before",
}
_IN_THE_CROWD = [kind for kind in ATTACKS if kind != "takeover"]
_REFUSED = {"raw_ids": 400, "allowed_ids": 400, "logit_bias": 400, "prompt_logprobs": 400}
_GAP = 1024  # ids between the padded vocabulary and the first row (docs/how-it-works.md)
_PADDING = 64  # of vLLM's vocabulary


_FILLING = ("filling-a", "filling-b", "filling-c")


def _message(rng: random.Random) -> str:
    """A new message of a KV block and a little."""
    return " ".join(long_message(rng.getrandbits(32)).split()[:150])


@dataclass
class Attacks:
    """Attempts, counted by kind as made, as succeeded, or as void."""

    asker: Asker

    async def any(self, rng: random.Random) -> None:
        """One attempt of some kind."""
        kind = rng.choice(_IN_THE_CROWD)
        if kind == "blocks":
            await self.blocks(rng)
            return
        asker = self.asker
        asker.count.attempts[kind] += 1
        be_id, q = asker.pick(rng)
        first = -(-asker.vocabulary // _PADDING) * _PADDING + _GAP
        row = first + rng.randrange(asker.options.rows)
        if kind == "vector":
            await self.vector(be_id)
        elif kind == "detokenize":
            answer = await asker.post("/detokenize", {"model": asker.model, "tokens": [row]})
            if answer.is_success and answer.json().get("prompt"):
                asker.count.succeeded[kind] += 1
            elif answer.status_code != httpx.codes.BAD_REQUEST:
                asker.expect(kind, answer, 200)
        elif kind == "raw_ids":
            raw = {"model": asker.model, "prompt": [row] * 4, "max_tokens": 1}
            self._must_be_refused(kind, await asker.post("/v1/completions", raw))
        else:
            options: dict[str, dict[str, Any]] = {
                "prompt_logprobs": {"prompt_logprobs": 1},
                "allowed_ids": {"allowed_token_ids": [row]},
                "logit_bias": {"logit_bias": {str(row): 100}},
            }
            use_token = kind == "prompt_logprobs" or rng.random() < 0.5
            body = asker.chat(be_id, q, use_token=use_token) | options[kind]
            self._must_be_refused(kind, await asker.post("/v1/chat/completions", body))

    async def vector(self, be_id: str) -> None:
        """The admin API's answers about a token, without its key and with it."""
        asker, path = self.asker, f"/v1/be/tokens/{be_id}"
        shut = await asker.http.get(path)
        shown = await asker.http.get(path, headers={"X-BE-Key": asker.key})
        # An answer with fewer bytes than the vectors have numbers holds them in no encoding.
        if shut.is_success or len(shown.content) >= asker.tokens[be_id].vectors.size:
            asker.count.succeeded["vector"] += 1
        else:
            asker.expect("vector, without the key", shut, 401)
            asker.expect("vector, with the key", shown, 200)

    async def blocks(self, rng: random.Random) -> None:
        """One message with token A, then with B and A at once: only A may find its blocks, and must, to count."""
        a, b = rng.sample(list(self.asker.tokens), 2)
        message = _message(rng)
        await self._cached("blocks", a, message)
        others, own = await asyncio.gather(self._cached("blocks", b, message), self._cached("blocks", a, message))
        self._count("blocks", others, own)

    async def takeover(self, rng: random.Random) -> None:
        """Three tokens that each fill the table, one after the other: the third gets the first one's rows in order.

        Ids and message are the same then, so only the salt keeps the third from the first one's blocks. It must find
        its own the second time, to count. For a server that has nothing else to do.
        """
        asker = self.asker
        some = next(iter(asker.tokens.values()))
        vectors = np.concatenate([token.vectors for token in asker.tokens.values()])
        for n, name in enumerate(_FILLING):
            filling = np.resize(np.roll(vectors, n, axis=0), (asker.options.rows, vectors.shape[1]))
            manifest = some.manifest.model_copy(update={"id": name, "k": len(filling)})
            await asker.put(Token(manifest, np.ascontiguousarray(filling)))
        message = _message(rng)
        found = [await self._cached("takeover", name, message) for name in (*_FILLING, _FILLING[-1])]
        for name in _FILLING:
            await asker.http.delete(f"/v1/be/tokens/{name}", headers={"X-BE-Key": asker.key})
        others = None if None in found[:-1] else sum(found[:-1])  # type: ignore[arg-type]
        self._count("takeover", others, found[-1])

    async def _cached(self, kind: str, be_id: str, message: str) -> int | None:
        """Cached tokens of a chat with a token, None where it failed. All ask with one salt."""
        asker = self.asker
        some = next(iter(asker.tokens))
        body = asker.chat(some, 0, use_token=True) | {"be_id": be_id, "max_tokens": 1, "cache_salt": "shared"}
        body["messages"][-1]["content"] = message
        answer = await asker.post("/v1/chat/completions", body)
        if not asker.expect(kind, answer, 200):
            return None
        return (answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def _count(self, kind: str, others: int | None, own: int | None) -> None:
        if others is None or own is None:
            return
        count = self.asker.count
        count.succeeded[kind] += bool(others)
        made = count.attempts if others or own else count.void
        made[kind] += 1

    def _must_be_refused(self, kind: str, answer: httpx.Response) -> None:
        if answer.is_success:
            self.asker.count.succeeded[kind] += 1
        else:
            self.asker.expect(kind, answer, _REFUSED[kind])
