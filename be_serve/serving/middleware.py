"""A small ASGI middleware: per-request context, our response headers, refusals elsewhere.

Which token answered is known deep inside vLLM's handlers, whose responses stay
stock; a context variable carries it out to the response headers.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from be_serve.core.errors import BEError, NameConflict, TokenRequired, UnsupportedRequest
from be_serve.core.ids import split_alias
from be_serve.core.names import FIELDS, field_near, find_slip
from be_serve.serving.metrics import Metrics
from be_serve.serving.requests import refuse_slips

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# The endpoints that honour a token.
SUPPORTED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
    }
)
# Takes a chat, or text that passes the hook by.
_TOKENIZE = "/tokenize"
# They count a chat's ids and generate nothing.
COUNTING = frozenset({"/v1/messages/count_tokens", _TOKENIZE})
# They answer or render a prompt, and take no token.
TOKENLESS = frozenset(
    {
        "/v1/completions",
        "/v1/completions/render",
        "/v1/chat/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
        "/v1/systemone",
        "/inference/v1/generate",
        "/generative_scoring",
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
        "/invocations",
    }
)
# Their request classes drop fields that they do not know: ours are read from the body, where they may also stand
# in the one object for custom parameters that these classes do know.
_STRICT = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
_STRICT_READS = ("vllm_xargs",)
# Escapes and other encodings may hide a name.
_HIDING = (b"\\u", b"\\/", b"\0")
_KEY_END = re.compile(rb'"\s*:')
_WINDOW = 64
# Seconds in all that a request which holds something for its token waits for a client to take its answer.
_PATIENCE = 120.0


@dataclass
class RequestContext:
    """One HTTP request: shared, not copied, with the tasks that handle it."""

    path: str
    authorization: str = ""
    """The request's Authorization header."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Our fields as they came, on endpoints whose request classes drop them."""
    fault: BEError | None = None
    """What is wrong with the names in such a body: for the hook to raise, whose errors come in the endpoint's shape."""
    outcomes: list[dict[str, str]] = field(default_factory=list)
    """Headers that tell how each chat of the request was answered; of a batch there are many."""
    cleanup: list[Callable[[], None]] = field(default_factory=list)
    """Called when the request is over, streams included."""
    over: bool = False
    """Whether that is so already: a background task may outlive its request."""

    @property
    def supported(self) -> bool:
        return self.path in SUPPORTED

    @property
    def read_in(self) -> tuple[str, ...]:
        """Objects of the request in which our fields are read, beside its top level."""
        return _STRICT_READS if self.path in _STRICT else ()

    @property
    def headers(self) -> dict[str, str]:
        """Headers to add to the response."""
        merged = {name: value for outcome in self.outcomes for name, value in outcome.items()}
        if "x-be-fallback" in merged and "x-be-id" in merged:
            merged["x-be-fallback"] = "partial"  # some chats of a batch found room for the token, others did not
        return merged


current: ContextVar[RequestContext | None] = ContextVar("be_serve_request", default=None)


def error_body(exc: BEError) -> dict[str, Any]:
    """An error in OpenAI's shape, as vLLM prints its own: `code` is the HTTP status."""
    return {"error": {"message": exc.message, "type": type(exc).__name__, "param": exc.param, "code": exc.http_status}}


class BEMiddleware:
    """Sets `current`, adds `x-be-*` headers, and refuses tokens where they would be ignored."""

    def __init__(
        self,
        app: Any,
        *,
        base_models: Callable[[], Sequence[str]],
        metrics: Callable[[], Metrics],
        is_route: Callable[[str], bool],
        require: bool = False,
    ) -> None:
        """With `require`, endpoints that take no token are refused whole."""
        self._app = app
        self._base_models = base_models
        self._metrics = metrics
        self._is_route = is_route
        self._require = require

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = _route_path(scope)
        context = RequestContext(path, authorization=_header(scope, b"authorization"))
        may_ignore = path == _TOKENIZE or not (context.supported or path.startswith("/v1/be/"))
        try:
            # Only bodies that a route would read whole anyway are read here.
            if may_ignore and _is_json(scope) and self._is_route(path):
                body, receive = await _read_ahead(receive)
                self._refuse_ignored(path, body)
            if self._require and path in TOKENLESS and self._is_route(path):
                raise TokenRequired(
                    f"This server answers only chats that name a token (--be-require), and {path} cannot use one. "
                    f"Use one of: {', '.join(sorted(SUPPORTED))}."
                )
        except BEError as exc:
            self._metrics().refused(exc)
            await _respond(send, exc)
            return

        if path in _STRICT:
            body, receive = await _read_ahead(receive)
            try:
                context.fields = _our_fields(body)
            except BEError as exc:
                context.fault = exc

        patience = _PATIENCE

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal patience
            if message["type"] == "http.response.start" and context.headers:
                extra = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in context.headers.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            if not context.cleanup:
                await send(message)
                return
            begin = monotonic()
            async with asyncio.timeout(patience):  # it ends the request, and what it holds is given back
                await send(message)
            patience -= monotonic() - begin

        token = current.set(context)
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            current.reset(token)
            context.over = True
            while context.cleanup:
                context.cleanup.pop()()

    def _refuse_ignored(self, path: str, body: bytes) -> None:
        """Raise where a body names a token on an endpoint that would silently ignore it."""
        names = list(self._base_models())
        if not _may_name_a_field(body) and not any(f"{name}:".encode() in body for name in names):
            return
        data = _json_object(body)
        if data is None or (path == _TOKENIZE and "messages" in data and data.get("prompt") is None):
            return  # no object, or a chat, which is the hook's
        arguments = data.get("vllm_xargs")
        places = [data, arguments if isinstance(arguments, dict) else {}]
        named = [name for name in FIELDS if any(place.get(name) is not None for place in places)]
        model = data.get("model")
        # Text without a chat has the same ids under every alias.
        if path != _TOKENIZE and isinstance(model, str) and split_alias(model, names) is not None:
            named.append("model")
        # be_match false asks for what happens here anyway.
        if named == ["be_match"] and data.get("be_match") is False:
            named = []
        if named:
            why = f"`{named[0]}` names one or is meant for one"
        elif slip := find_slip(data, data):
            named, why = [slip.key], f"`{slip.key}` is meant for one (`{slip.field}`)"
        else:
            return
        what = f"{path} of a `prompt`" if path == _TOKENIZE else path
        raise UnsupportedRequest(
            f"{what} cannot use a token, and {why}. Use one of: {', '.join(sorted(SUPPORTED))}.", param=named[0]
        )


def _our_fields(body: bytes) -> dict[str, Any]:
    """Our fields in a body. Raises MisnamedField, NameConflict."""
    if not _may_name_a_field(body):
        return {}
    data = _json_object(body) or {}
    refuse_slips(data, data, read_in=_STRICT_READS)
    found: dict[str, Any] = {}
    for place in (data, *(inside for name in _STRICT_READS if isinstance(inside := data.get(name), dict))):
        for name in FIELDS:
            value = place.get(name)
            if value is not None and found.setdefault(name, value) != value:
                raise NameConflict(f"`{name}` is given twice, and differs; send it once.", param=name)
    return found


def _may_name_a_field(body: bytes) -> bool:
    """Whether JSON may have a key near one of our fields. False is certain, and costs some microseconds.

    The text before each colon is looked at alone: to parse a body of images or ids would take milliseconds.
    """
    if any(mark in body for mark in _HIDING):
        return True
    keys = set()
    for end in _KEY_END.finditer(body):
        before, quote, key = body[max(0, end.start() - _WINDOW) : end.start()].rpartition(b'"')
        # An escape may hide the name, and a key without a beginning is longer than the window.
        if not quote or b"\\" in key or before.endswith(b"\\"):
            return True
        keys.add(key)
    return any(field_near(key.decode("utf-8", "replace")) for key in keys)


def _json_object(body: bytes) -> dict[str, Any] | None:
    """The object in a body; None for anything else, which is the endpoint's to refuse."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _header(scope: Scope, name: bytes) -> str:
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), "")


def _is_json(scope: Scope) -> bool:
    kind = _header(scope, b"content-type").partition(";")[0].strip().lower()
    return not kind.startswith(("multipart/", "application/octet-stream"))


async def _read_ahead(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that gives it again."""
    chunks: list[bytes] = []
    last: MutableMapping[str, Any] = {"type": "http.request", "more_body": True}
    while last["type"] == "http.request" and last.get("more_body", False):
        last = await receive()
        chunks.append(last.get("body", b""))
    body = b"".join(chunks)
    queue: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    if last["type"] != "http.request":
        queue = [last]  # the client went away

    async def replay() -> MutableMapping[str, Any]:
        return queue.pop() if queue else await receive()

    return body, replay


def _route_path(scope: Scope) -> str:
    """The path by which the router finds a route: without --root-path, where a proxy left it on."""
    path: str = scope["path"]
    rest = path.removeprefix(scope.get("root_path", ""))
    return rest if rest.startswith("/") else path  # /v1x does not lie below /v1


async def _respond(send: Send, exc: BEError) -> None:
    body = json.dumps(error_body(exc)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": exc.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
