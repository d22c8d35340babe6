"""Attacks: a client tries to read other tokens' rows, vectors and KV blocks."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from be_serve.core.artifact import Token
from benchmarks.soak.answers import long_message
from benchmarks.soak.client import SoakClient

ATTACKS = {
    "raw_ids": "row ids as a prompt",
    "allowed_ids": "a row id as the only id that may be sampled",
    "logit_bias": "a row id with a bias of 100",
    "detokenize": "a row id, converted to text",
    "prompt_logprobs": "log-probabilities of the rows in a prompt",
    "vector": "the vectors from the admin API, with and without its key",
    "blocks": "another token's KV blocks, by the same message and the same cache_salt",
    "takeover": "the KV blocks of the token that owned the same rows before",
}
_CONCURRENT = [kind for kind in ATTACKS if kind != "takeover"]
_REFUSED = {"raw_ids": 400, "allowed_ids": 400, "logit_bias": 400, "prompt_logprobs": 400}
_GAP = 1024  # number of ids between the padded vocabulary and the first row (docs/how-it-works.md)
_PADDING = 64  # vLLM pads the vocabulary to a multiple of this
_FILLING_IDS = ("filling-a", "filling-b", "filling-c")


def _message(rng: random.Random) -> str:
    """Return a new message that is slightly longer than one KV block."""
    return " ".join(long_message(rng.getrandbits(32)).split()[:150])


@dataclass
class Attacks:
    """Makes attacks and counts them by kind: made, succeeded or void."""

    client: SoakClient

    async def random_attack(self, rng: random.Random) -> None:
        """Make one attack of a random kind."""
        kind = rng.choice(_CONCURRENT)
        if kind == "blocks":
            await self.blocks(rng)
            return
        client = self.client
        client.count.attempts[kind] += 1
        be_id, q = client.pick(rng)
        first = -(-client.vocabulary // _PADDING) * _PADDING + _GAP
        row = first + rng.randrange(client.options.rows)
        if kind == "vector":
            await self.vector(be_id)
        elif kind == "detokenize":
            answer = await client.post("/detokenize", {"model": client.model, "tokens": [row]})
            if answer.is_success and answer.json().get("prompt"):
                client.count.succeeded[kind] += 1
            elif answer.status_code != httpx.codes.BAD_REQUEST:
                client.expect(kind, answer, 200)
        elif kind == "raw_ids":
            raw = {"model": client.model, "prompt": [row] * 4, "max_tokens": 1}
            self._must_be_refused(kind, await client.post("/v1/completions", raw))
        else:
            options: dict[str, dict[str, Any]] = {
                "prompt_logprobs": {"prompt_logprobs": 1},
                "allowed_ids": {"allowed_token_ids": [row]},
                "logit_bias": {"logit_bias": {str(row): 100}},
            }
            use_token = kind == "prompt_logprobs" or rng.random() < 0.5
            body = client.chat(be_id, q, use_token=use_token) | options[kind]
            self._must_be_refused(kind, await client.post("/v1/chat/completions", body))

    async def vector(self, be_id: str) -> None:
        """Ask the admin API for a token, without and with its key. A response that can hold the vectors succeeds."""
        client, path = self.client, f"/v1/be/tokens/{be_id}"
        without_key = await client.http.get(path)
        with_key = await client.http.get(path, headers={"X-BE-Key": client.key})
        # Every encoding of the vectors has at least one byte per number.
        if without_key.is_success or len(with_key.content) >= client.tokens[be_id].vectors.size:
            client.count.succeeded["vector"] += 1
        else:
            client.expect("vector, without the key", without_key, 401)
            client.expect("vector, with the key", with_key, 200)

    async def blocks(self, rng: random.Random) -> None:
        """Send a message with token A, then with B and A concurrently. B must find no cached blocks.

        The attack counts only if A finds its own blocks.
        """
        a, b = rng.sample(list(self.client.tokens), 2)
        message = _message(rng)
        await self._cached("blocks", a, message)
        others, own = await asyncio.gather(self._cached("blocks", b, message), self._cached("blocks", a, message))
        self._count("blocks", others, own)

    async def takeover(self, rng: random.Random) -> None:
        """Use three tokens in succession that each fill the table. The third token gets the first token's rows.

        Row ids and message are then equal, so only the server's own cache salt separates the two. The third token
        must not find the first token's blocks. The attack counts only if the third token finds its own blocks the
        second time. The server must be idle.
        """
        client = self.client
        some = next(iter(client.tokens.values()))
        vectors = np.concatenate([token.vectors for token in client.tokens.values()])
        for n, name in enumerate(_FILLING_IDS):
            filling = np.resize(np.roll(vectors, n, axis=0), (client.options.rows, vectors.shape[1]))
            manifest = some.manifest.model_copy(update={"id": name, "k": len(filling)})
            await client.put(Token(manifest, np.ascontiguousarray(filling)))
        message = _message(rng)
        found = [await self._cached("takeover", name, message) for name in (*_FILLING_IDS, _FILLING_IDS[-1])]
        for name in _FILLING_IDS:
            await client.http.delete(f"/v1/be/tokens/{name}", headers={"X-BE-Key": client.key})
        others = None if None in found[:-1] else sum(found[:-1])  # type: ignore[arg-type]
        self._count("takeover", others, found[-1])

    async def _cached(self, kind: str, be_id: str, message: str) -> int | None:
        """Return the number of cached tokens of a chat with a token; None for a failure. All use one cache_salt."""
        client = self.client
        some = next(iter(client.tokens))
        body = client.chat(some, 0, use_token=True) | {"be_id": be_id, "max_tokens": 1, "cache_salt": "shared"}
        body["messages"][-1]["content"] = message
        answer = await client.post("/v1/chat/completions", body)
        if not client.expect(kind, answer, 200):
            return None
        return (answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def _count(self, kind: str, others: int | None, own: int | None) -> None:
        if others is None or own is None:
            return
        count = self.client.count
        count.succeeded[kind] += bool(others)
        made = count.attempts if others or own else count.void
        made[kind] += 1

    def _must_be_refused(self, kind: str, answer: httpx.Response) -> None:
        if answer.is_success:
            self.client.count.succeeded[kind] += 1
        else:
            self.client.expect(kind, answer, _REFUSED[kind])
