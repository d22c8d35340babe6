"""What a client must not reach on a server that holds others' tokens: rows, vectors, KV blocks."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.soak.answers import long_message
from benchmarks.soak.asking import Asker

ATTACKS = {
    "raw_ids": "rows' ids as a prompt",
    "allowed_ids": "a row's id as the only one to sample",
    "logit_bias": "a row's id preferred by 100",
    "detokenize": "a row's id as text",
    "prompt_logprobs": "what the model thinks of the rows",
    "vector": "the vectors, by the admin API with and without its key",
    "blocks": "another token's KV blocks, with the same message and the same cache_salt",
}
_REFUSED = {"raw_ids": 400, "allowed_ids": 400, "logit_bias": 400, "prompt_logprobs": 400}
_GAP = 1024  # ids between the padded vocabulary and the first row (docs/operations.md)
_PADDING = 64  # of vLLM's vocabulary


@dataclass
class Attacks:
    """Attempts, counted by kind as made, as succeeded, or as void."""

    asker: Asker

    async def any(self, rng: random.Random) -> None:
        """One attempt of some kind."""
        kind = rng.choice(list(ATTACKS))
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
        asker = self.asker
        a, b = rng.sample(list(asker.tokens), 2)
        message = " ".join(long_message(rng.getrandbits(32)).split()[:150])  # a block and a little

        async def cached(be_id: str) -> int | None:
            body = asker.chat(be_id, 0, use_token=True) | {"max_tokens": 1, "cache_salt": "shared"}
            body["messages"][-1]["content"] = message
            answer = await asker.post("/v1/chat/completions", body)
            if not asker.expect("blocks", answer, 200):
                return None
            return (answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0

        await cached(a)
        others, own = await asyncio.gather(cached(b), cached(a))
        if others is None or own is None:
            return
        asker.count.succeeded["blocks"] += bool(others)
        made = asker.count.attempts if others or own else asker.count.void
        made["blocks"] += 1

    def _must_be_refused(self, kind: str, answer: httpx.Response) -> None:
        if answer.is_success:
            self.asker.count.succeeded[kind] += 1
        else:
            self.asker.expect(kind, answer, _REFUSED[kind])
