"""A small OpenAI-compatible server whose answers take a known time: alpha + beta * uncached tokens.

It speaks HTTP/1.1 over a socket, with keep-alive and chunked bodies, so the client
under test does everything it does with vLLM.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from tests.conftest import make_tokenizer

MODEL = "fake:tiny"
_tokenizer = cache(lambda: make_tokenizer("chatml"))


@dataclass
class FakeServer:
    """`async with FakeServer(...) as fake: fake.url`. Times in seconds."""

    alpha: float = 0.004
    beta: float = 0.0001
    plugin: bool = False
    fail: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Number of a chat request (from 0) -> the status and message it gets instead."""
    fail_from: int | None = None
    """Every chat request from this number on is dropped without an answer."""
    tokens: dict[str, int] = field(default_factory=dict)
    """be_id -> k."""
    script: list[bytes] | None = None
    """Raw pieces of a chat's event stream, sent one by one in place of a computed answer."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self._tokenizer = _tokenizer()
        self._cached: dict[str, list[int]] = {}
        self.deleted: list[str] = []

    async def __aenter__(self) -> FakeServer:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**24)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                method, target, _ = lines[0].split()
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(writer, method, urlsplit(target).path, headers, data)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, out: asyncio.StreamWriter, method: str, path: str, headers: Any, data: bytes) -> None:
        if path == "/health":
            await _send(out, 200, b"")
        elif path == "/version":
            await _send_json(out, 200, {"version": "0.32.0"})
        elif path == "/v1/models":
            alias = [{"id": f"{MODEL}:x", "parent": MODEL}] if self.plugin else []
            await _send_json(out, 200, {"data": [*alias, {"id": MODEL, "parent": None}]})
        elif path == "/tokenize":
            body = json.loads(data)
            plain = "prompt" in body
            ids = self._tokenizer.encode(body["prompt"], add_special_tokens=False) if plain else self._ids(body)
            await _send_json(out, 200, {"count": len(ids), "tokens": ids})
        elif path.startswith("/v1/be/tokens") and self.plugin:
            await self._admin(out, method, path, headers, data)
        elif path == "/v1/chat/completions":
            await self._chat(out, json.loads(data))
        else:
            await _send_json(out, 404, {"detail": "Not Found"})

    async def _admin(self, out: asyncio.StreamWriter, method: str, path: str, headers: Any, data: bytes) -> None:
        from be_serve.core.artifact import Token

        if headers.get("x-be-key") != "secret":
            await _send_json(out, 403, {"error": {"message": "The admin key is missing or wrong."}})
        elif method == "POST":
            manifest = Token.from_bytes(data).manifest
            self.tokens[manifest.id] = manifest.k
            await _send_json(out, 201, {"id": manifest.id})
        else:
            self.deleted.append(path.rsplit("/", 1)[1])
            await _send_json(out, 200, {"deleted": True})

    def _ids(self, body: dict[str, Any]) -> list[int]:
        text = self._tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    async def _chat(self, out: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        if self.fail_from is not None and number >= self.fail_from:
            raise ConnectionError
        if number in self.fail:
            status, message = self.fail[number]
            await _send_json(out, status, {"error": {"message": message, "code": status}})
            return
        if self.script is not None:
            await _send_events(out, self.script)
            return
        if (be_id := body.get("be_id")) is not None:
            if be_id not in self.tokens:
                await _send_json(out, 404, {"error": {"message": f"No token {be_id!r}."}})
                return
            empty = {"messages": [{"role": "system", "content": ""}, *body["messages"]]}
            ids = self._ids(empty) + [0] * self.tokens[be_id]
        else:
            ids = self._ids(body)
        cached = self._find_cached(body["cache_salt"], ids)
        await asyncio.sleep(self.alpha + self.beta * (len(ids) - cached))
        usage: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": 2}
        if cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        deltas = [{"role": "assistant", "content": ""}, {"content": "Aye"}, {"content": " aye"}]
        events = [{"choices": [{"delta": delta}]} for delta in deltas] + [{"choices": [], "usage": usage}]
        await _send_events(out, [*(f"data: {json.dumps(e)}\n\n".encode() for e in events), b"data: [DONE]\n\n"])

    def _find_cached(self, salt: str, ids: list[int]) -> int:
        """Tokens shared with the last request under that salt, in blocks of 16."""
        last, self._cached[salt] = self._cached.get(salt, []), ids
        shared = next((i for i, (a, b) in enumerate(zip(last, ids, strict=False)) if a != b), min(len(last), len(ids)))
        return shared // 16 * 16


async def _send(out: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json") -> None:
    out.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await out.drain()


async def _send_json(out: asyncio.StreamWriter, status: int, data: Any) -> None:
    await _send(out, status, json.dumps(data).encode())


async def _send_events(out: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    out.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for piece in pieces:
        out.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        await out.drain()
        await asyncio.sleep(0.002)
    out.write(b"0\r\n\r\n")
    await out.drain()
