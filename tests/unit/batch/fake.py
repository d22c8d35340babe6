"""An app that answers the rows of batch files, and the files themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from be_serve.batch import connect, run_rows

CHAT = "/v1/chat/completions"
MODEL = {"model": "m"}


def row(custom_id: str, **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}, ensure_ascii=False)


def write(path, *lines: str):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Answers:
    """An app that answers `say` in capitals, and does what a row tells it to do."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.busy = 2
        self.broken = True
        self.digest = "abc"
        self.killed = asyncio.Event()
        """The server is gone from a row that says "kill" until `killed` is cleared, as it is by the first look."""

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body["say"])
        match body["say"]:
            case "refuse":
                return JSONResponse({"error": {"message": "no such token", "code": 404}}, status_code=404)
            case "busy" if self.busy:
                self.busy -= 1
                return JSONResponse({"error": {"message": "later"}}, 503 - self.busy, headers={"Retry-After": "0"})
            case "late" if self.asked == ["late"]:
                await asyncio.sleep(0.3)
                return JSONResponse({"error": {"message": "later"}}, 503)
            case "break" if self.broken:
                return PlainTextResponse("it broke", 500)
            case "moved":
                return RedirectResponse("https://elsewhere/", 301)
            case "login":
                return PlainTextResponse("<html>login</html>")
            case "key":
                return JSONResponse({"error": {"message": "Unauthorized"}}, 401)
            case "nowhere":
                return JSONResponse({"error": {"message": "Not Found", "code": 404}}, 404)
            case "blocked" | "too large":
                return PlainTextResponse("<html>no</html>", {"blocked": 403, "too large": 413}[body["say"]])
            case "never":
                return JSONResponse({"error": {"message": "no room"}}, 503, headers={"Retry-After": "\u00b2"})
            case "deep":
                return PlainTextResponse("[" * 100_000, 200)
            case "kill":
                self.killed.set()
                raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
            case "beside":
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.killed.wait(), 0.05)
                    raise httpx.ReadError("")
            case "slow":
                raise httpx.ReadTimeout("too slow")
        headers = {"x-be-id": "captain", "x-be-digest": self.digest, "other": "x"}
        return JSONResponse({"id": "chat-1", "text": body["say"].upper()}, headers=headers)

    async def models(self, request: Request) -> Response:
        gone = self.killed.is_set()
        self.killed.clear()
        return JSONResponse({"data": []}, 502 if gone else 200)

    @property
    def transport(self) -> httpx.ASGITransport:
        routes = [Route(CHAT, self.chat, methods=["POST"]), Route("/v1/models", self.models)]
        return httpx.ASGITransport(Starlette(routes=routes))


async def run(rows, journal, answers: Answers, **options):
    async with connect("http://batch", transport=answers.transport) as client:
        return await run_rows(client, rows, journal, **options)
