"""The soak's HTTP client. It counts unexpected responses as failures."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import httpx

from be_serve.core.artifact import Token
from be_serve.core.errors import ServerError
from benchmarks.common.answers import Count
from benchmarks.common.client import server_message
from benchmarks.soak.answers import question, request_body
from benchmarks.soak.options import SoakOptions


@dataclass
class SoakClient:
    """Sends requests with the soak's tokens, for `Workload` and `Attacks`."""

    options: SoakOptions
    http: httpx.AsyncClient
    key: str
    """Key of the admin API."""
    tokens: dict[str, Token]
    count: Count
    model: str = ""
    vocabulary: int = 0

    async def register(self) -> None:
        """Register every token; set `model` and `vocabulary`. Raises ServerError."""
        models = (await self.http.get("/v1/models")).json()["data"]
        self.model = next(one["id"] for one in models if not one.get("parent"))
        config = json.loads((self.options.folder / "config.json").read_text(encoding="utf-8"))
        self.vocabulary = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
        for token in self.tokens.values():
            await self.put(token)

    def pick(self, rng: random.Random) -> tuple[str, int]:
        """Return the id of a random token and the number of a random question."""
        return rng.choice(list(self.tokens)), rng.randrange(self.options.questions)

    def chat(self, be_id: str, q: int, *, use_token: bool) -> dict[str, Any]:
        """Return the body of a chat with question `q` and a token, or with the token's text as a system prompt."""
        token = self.tokens[be_id]
        user = {"role": "user", "content": question(q, self.options)}
        body = request_body(self.model, token)
        if use_token:
            return {**body, "messages": [user], "be_id": be_id}
        return {**body, "messages": [{"role": "system", "content": token.manifest.prompt.text}, user]}

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Return the response, whatever its status."""
        return await self.http.post(path, json=body)

    async def put(self, token: Token) -> None:
        """Register a token. Raises ServerError."""
        answer = await self.http.post("/v1/be/tokens", content=token.to_bytes(), headers={"X-BE-Key": self.key})
        if answer.status_code not in (200, 201):
            raise ServerError(f"Registration failed with HTTP {answer.status_code}: {server_message(answer.content)}")

    def expect(self, name: str, answer: httpx.Response, status: int) -> bool:
        """Return whether the response has the expected status; count any other status as a failure."""
        if answer.status_code == status:
            return True
        self.count.failures[f"{name}: HTTP {answer.status_code}: {server_message(answer.content)}"[:200]] += 1
        return False
