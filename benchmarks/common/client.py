"""Client with one keep-alive connection to one server. It times streamed chats.

TTFT starts just before the client writes the request. TTFT ends when the bytes of the first
event with content arrive; the client reads the clock before it parses these bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import httpx

from be_serve.core.addresses import warn_of_clear_text
from be_serve.core.errors import InputError, ServerError
from be_serve.core.redaction import hide, safe_url

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@dataclass
class Sample:
    """Timing of one streamed chat completion. Times in seconds. `error` is empty after a success."""

    started: float
    ttft: float = 0.0
    e2e: float = 0.0
    itls: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    round_trip: float = 0.0
    """Time of an empty request to the same server just before: the share of network and client."""
    cached_tokens: int | None = None
    text: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error


class ServerClient:
    """Client of one OpenAI-compatible server. It sends one request at a time.

    async with ServerClient("http://127.0.0.1:8000") as client:
        sample = await client.chat({"model": ..., "messages": [...], "stream": True})
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        self.url = safe_url(base)  # for messages and results
        # Compression would buffer events and hide their arrival times.
        headers = {"Accept-Encoding": "identity"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
        # trust_env=False: the time in a proxy from the environment would be measured, too.
        try:
            self._http = httpx.AsyncClient(
                base_url=base, headers=headers, timeout=_TIMEOUT, limits=limits, trust_env=False
            )
        except httpx.InvalidURL:  # httpx's message quotes the URL, which may hold a password
            raise InputError("The URL of a server is not valid. Use http://HOST:PORT.") from None
        if api_key:
            warn_of_clear_text(self._http.base_url.scheme, self._http.base_url.host)

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def healthy(self) -> bool:
        """Return whether `GET /health` answers 200. The call also opens the connection."""
        try:
            return (await self._http.get("/health")).status_code == 200
        except httpx.HTTPError:
            return False

    async def call(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON response of a call. Raises ServerError with the server's message."""
        try:
            response = await self._http.request(method, path, **options)
        except httpx.HTTPError as exc:
            raise ServerError(f"{method} {self.url}{path} failed: {hide(str(exc)) or type(exc).__name__}.") from exc
        if response.is_error:
            raise ServerError(
                f"{method} {self.url}{path} answered {response.status_code}: {server_message(response.content)}"
            )
        return response.json() if response.content else None

    async def text(self, path: str) -> str:
        """Return the body of a GET response as text. Raises ServerError."""
        try:
            response = await self._http.get(path)
        except httpx.HTTPError as exc:
            raise ServerError(f"GET {self.url}{path} failed: {hide(str(exc)) or type(exc).__name__}.") from exc
        if response.is_error:
            raise ServerError(f"GET {self.url}{path} answered {response.status_code}.")
        return response.text

    async def model_id(self) -> str:
        """Return the name of the served base model: the first model in `/v1/models` without a parent.

        Raises ServerError.
        """
        models = (await self.call("GET", "/v1/models"))["data"]
        base = [m["id"] for m in models if not m.get("parent")]
        if not base:
            raise ServerError(f"{self.url}/v1/models lists no model.")
        return str(base[0])

    async def version(self) -> str | None:
        """Return the vLLM version that the server reports; None if it reports none."""
        try:
            return str((await self.call("GET", "/version"))["version"])
        except (ServerError, KeyError, TypeError, ValueError):
            return None

    async def chat(self, body: dict[str, Any]) -> Sample:
        """Stream one chat completion and return its timing. A failure is in `error`, not raised."""
        request = self._http.build_request("POST", "/v1/chat/completions", json=body)
        begin = perf_counter_ns()
        sample = Sample(started=begin / 1e9)
        try:
            response = await self._http.send(request, stream=True)
            try:
                if response.status_code != 200:
                    sample.error = f"HTTP {response.status_code}: {server_message(await response.aread())}"
                else:
                    await _read_events(response, sample, begin)
            finally:
                await response.aclose()
        except (httpx.HTTPError, ValueError, LookupError) as exc:  # the last two: an event of unknown form
            sample.error = f"{type(exc).__name__}: {hide(str(exc))}".rstrip(": ")
        return sample


async def _read_events(response: httpx.Response, sample: Sample, begin: int) -> None:
    """Fill `sample` from a stream of server-sent events. `begin` is the start time in nanoseconds."""
    pending, done, last = b"", False, 0  # last: time of the last event with content
    async for received in response.aiter_raw():
        now = perf_counter_ns()
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                sample.e2e = (now - begin) / 1e9
                continue
            event = json.loads(data)
            if "error" in event:
                sample.error = f"in the stream: {server_message(data)}"
                return
            if content := _content(event):
                sample.text += content
                if last:
                    sample.itls.append((now - last) / 1e9)
                else:
                    sample.ttft = (now - begin) / 1e9
                last = now
            if usage := event.get("usage"):
                sample.prompt_tokens = usage["prompt_tokens"]
                sample.completion_tokens = usage.get("completion_tokens") or 0
                details = usage.get("prompt_tokens_details") or {}
                sample.cached_tokens = details.get("cached_tokens")
    if not done:
        sample.error = "the stream ended before [DONE]"
    elif not last:
        sample.error = "the stream held no content"


def _content(event: dict[str, Any]) -> str:
    """Return the text of an event's first choice. The reasoning of a thinking model counts as content."""
    choices = event.get("choices")
    if not choices:
        return ""
    delta = choices[0].get("delta") or {}
    return str(delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or "")


def server_message(body: bytes) -> str:
    """Return the message of an error body in OpenAI's or FastAPI's form, else the first 500 characters."""
    try:
        data = json.loads(body)
        error = data.get("error", data)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if message:
            return str(message)
    except (ValueError, AttributeError):
        pass
    return body.decode("utf-8", "replace").strip()[:500] or "(empty body)"
