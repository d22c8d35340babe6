"""ASGI middleware: sets the context of each request, adds the `x-be-*` headers, refuses tokens at other endpoints.

Only vLLM's handlers know which token answered, and be-serve does not change their responses. A context
variable carries this information from there to the response headers.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from be_serve.core.errors import BEError, MisnamedField, NameConflict, TokenRequired, UnsupportedRequest
from be_serve.core.ids import split_alias
from be_serve.core.names import FIELDS, field_near, field_of_header, find_slip
from be_serve.serving.metrics import Metrics
from be_serve.serving.requests import refuse_slips

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# The endpoints that can use a token.
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
# Takes a chat, which the hook processes, or a `prompt`, which never reaches the hook.
_TOKENIZE = "/tokenize"
# These endpoints count a chat's ids and generate nothing.
COUNTING = frozenset({"/v1/messages/count_tokens", _TOKENIZE})
# These endpoints answer or render a prompt and cannot use a token.
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
# The request classes of these endpoints drop unknown fields. The middleware therefore reads the be-serve fields
# from the body: at its top level, and in the one object for custom parameters that these classes know.
_STRICT = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
_STRICT_READS = ("vllm_xargs",)
# vLLM's /invocations writes this header's value into the body's `model`, after the middleware has read the body.
_ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
# With escapes or another encoding, a search of the bytes may miss a name.
_ENCODED = (b"\\u", b"\\/", b"\0")
# A route's pattern ends in `$`, which also matches before a final newline: the router finds a route for a path that
# equals no path above. No route has a control character in its path.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_KEY_END = re.compile(rb'"\s*:')
_WINDOW = 64
# The search of a larger body runs in a thread, so that other requests go on meanwhile.
_LARGE_BODY = 1_000_000
# Total seconds a slow client may block sends while its request holds a token's rows or memory.
_SEND_SECONDS = 120.0


@dataclass
class RequestContext:
    """The state of one HTTP request. All tasks that handle the request share this one object."""

    path: str
    authorization: str = ""
    """The request's Authorization header."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The be-serve fields of the body, unvalidated, for endpoints whose request classes drop them."""
    fault: BEError | None = None
    """The error of these fields' names. The hook raises it, so that it gets the endpoint's error shape."""
    outcomes: list[dict[str, str]] = field(default_factory=list)
    """The `x-be-*` headers of each chat in the request. A batch has several chats."""
    cleanup: list[Callable[[], None]] = field(default_factory=list)
    """Functions to call after the end of the request, streaming included."""
    over: bool = False
    """Whether the request has ended. A background task may still run then."""

    @property
    def supported(self) -> bool:
        return self.path in SUPPORTED

    @property
    def read_in(self) -> tuple[str, ...]:
        """Objects of the request, besides its top level, from which be-serve fields are read."""
        return _STRICT_READS if self.path in _STRICT else ()

    @property
    def headers(self) -> dict[str, str]:
        """Headers to add to the response."""
        merged = {name: value for outcome in self.outcomes for name, value in outcome.items()}
        if "x-be-fallback" in merged and "x-be-id" in merged:
            merged["x-be-fallback"] = "partial"  # in a batch, some chats got the token and others the full prompt
        return merged


current: ContextVar[RequestContext | None] = ContextVar("be_serve_request", default=None)


def error_body(exc: BEError) -> dict[str, Any]:
    """The error as OpenAI's JSON object. `code` is the HTTP status, as in vLLM's own errors."""
    return {"error": {"message": exc.message, "type": type(exc).__name__, "param": exc.param, "code": exc.http_status}}


class BEMiddleware:
    """Sets `current`, adds `x-be-*` headers, and refuses tokens at endpoints that would ignore them."""

    def __init__(
        self,
        app: Any,
        *,
        base_models: Callable[[], Sequence[str]],
        metrics: Callable[[], Metrics],
        is_route: Callable[[str], bool],
        require: bool = False,
    ) -> None:
        """With `require`, every request to an endpoint that cannot use a token is refused."""
        self._app = app
        self._base_models = base_models
        self._metrics = metrics
        self._is_route = is_route
        self._require = require

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _CONTROL.search(scope["path"]):
            await _not_found(send)
            return
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = _route_path(scope)
        context = RequestContext(path, authorization=_header(scope, b"authorization"))
        may_ignore = path == _TOKENIZE or not (context.supported or path.startswith("/v1/be/"))
        try:
            # Read only bodies that the route itself would read as a whole.
            if may_ignore and _is_json(scope) and self._is_route(path):
                body, receive = await _read_ahead(receive)
                await _search(self._refuse_ignored, path, body)
            self._refuse_adapter(path, scope)
            if context.supported or (may_ignore and self._is_route(path)):
                try:
                    _refuse_outside(path, scope)
                except MisnamedField as exc:
                    if path not in _STRICT:
                        raise
                    context.fault = exc
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
                context.fields = await _search(_read_fields, body)
            except BEError as exc:
                context.fault = context.fault or exc

        seconds_left = _SEND_SECONDS

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal seconds_left
            if message["type"] == "http.response.start" and context.headers:
                extra = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in context.headers.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            if not context.cleanup:
                await send(message)
                return
            begin = monotonic()
            async with asyncio.timeout(seconds_left):  # a timeout ends the request, and `cleanup` releases its rows
                await send(message)
            seconds_left -= monotonic() - begin

        token = current.set(context)
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            current.reset(token)
            context.over = True
            while context.cleanup:
                context.cleanup.pop()()

    def _refuse_adapter(self, path: str, scope: Scope) -> None:
        """Raise UnsupportedRequest if SageMaker's header names a token."""
        if path != "/invocations":
            return
        for value in _headers(scope, _ADAPTER_HEADER.lower().encode()):
            if split_alias(value.strip(), self._base_models()) is not None:
                raise UnsupportedRequest(
                    f"{path} cannot use a token, but the header `{_ADAPTER_HEADER}` names one. Leave it out, or use "
                    f"one of: {', '.join(sorted(SUPPORTED))}.",
                    param=_ADAPTER_HEADER,
                )

    def _refuse_ignored(self, path: str, body: bytes) -> None:
        """Raise UnsupportedRequest if a body names a token at an endpoint that would ignore it."""
        names = list(self._base_models())
        if not _may_name_a_field(body) and not any(f"{name}:".encode() in body for name in names):
            return
        data = _json_object(body)
        if data is None or (path == _TOKENIZE and "messages" in data and data.get("prompt") is None):
            return  # the endpoint refuses a body that is no object; the hook checks a chat
        arguments = data.get("vllm_xargs")
        places = [data, arguments if isinstance(arguments, dict) else {}]
        named = [name for name in FIELDS if any(place.get(name) is not None for place in places)]
        model = data.get("model")
        # At /tokenize, a `prompt` has the same ids under every alias.
        if path != _TOKENIZE and isinstance(model, str) and split_alias(model, names) is not None:
            named.append("model")
        # `be_match: false` asks for an answer without a token, which this endpoint gives.
        if named == ["be_match"] and data.get("be_match") is False:
            named = []
        if named:
            why = f"`{named[0]}` belongs to a token"
        elif slip := find_slip(data, data):
            named, why = [slip.key], f"`{slip.key}` looks like the token field `{slip.field}`"
        else:
            return
        what = f"{path} with a `prompt`" if path == _TOKENIZE else path
        raise UnsupportedRequest(
            f"{what} cannot use a token, but {why}. Leave it out, or use one of: {', '.join(sorted(SUPPORTED))}.",
            param=named[0],
        )


async def _search(search: Callable[..., T], *arguments: Any) -> T:
    """The result of `search` on these arguments, the last of which is a body. A large body is searched in a thread."""
    if len(arguments[-1]) > _LARGE_BODY:
        return await asyncio.to_thread(search, *arguments)
    return search(*arguments)


def _refuse_outside(path: str, scope: Scope) -> None:
    """Raise MisnamedField for a header or a query parameter that is meant as a be-serve field: neither is read."""
    headers = (key.decode("latin-1") for key, _ in scope["headers"])
    query = scope.get("query_string", b"").decode("latin-1")
    parameters = (key for key, _ in parse_qsl(query, keep_blank_values=True))
    for kind, names in (("header", headers), ("query parameter", parameters)):
        for name in names:
            if field := field_of_header(name):
                where = "" if path in SUPPORTED else f" of one of: {', '.join(sorted(SUPPORTED))}"
                raise MisnamedField(
                    f"The {kind} `{name[:64]}` is not read; send `{field}` at the top level of the request's JSON, "
                    f"beside `model`{where}.",
                    param=name[:64],
                )


def _read_fields(body: bytes) -> dict[str, Any]:
    """The be-serve fields of a body. Raises MisnamedField, NameConflict."""
    if not _may_name_a_field(body):
        return {}
    data = _json_object(body) or {}
    refuse_slips(data, data, read_in=_STRICT_READS)
    found: dict[str, Any] = {}
    for place in (data, *(inside for name in _STRICT_READS if isinstance(inside := data.get(name), dict))):
        for name in FIELDS:
            value = place.get(name)
            if value is not None and found.setdefault(name, value) != value:
                raise NameConflict(f"`{name}` is given twice with different values; send it once.", param=name)
    return found


def _may_name_a_field(body: bytes) -> bool:
    """Whether a JSON body may have a key close to a be-serve field. False is certain; True may be wrong.

    Looks only at the text before each colon, which takes microseconds. To parse a body with images or ids
    takes milliseconds.
    """
    if any(mark in body for mark in _ENCODED):
        return True
    keys = set()
    for end in _KEY_END.finditer(body):
        before, quote, key = body[max(0, end.start() - _WINDOW) : end.start()].rpartition(b'"')
        # With an escape the key's name is not certain. Without an opening quote the key is longer than the window.
        if not quote or b"\\" in key or before.endswith(b"\\"):
            return True
        keys.add(key)
    return any(field_near(key.decode("utf-8", "replace")) for key in keys)


def _json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object of a body, or None if the body is anything else. The endpoint refuses such a body."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [v.decode("latin-1") for k, v in scope["headers"] if k == name]


def _header(scope: Scope, name: bytes) -> str:
    return next(iter(_headers(scope, name)), "")


def _is_json(scope: Scope) -> bool:
    kind = _header(scope, b"content-type").partition(";")[0].strip().lower()
    return not kind.startswith(("multipart/", "application/octet-stream"))


async def _read_ahead(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` function that returns it once more."""
    chunks: list[bytes] = []
    last: MutableMapping[str, Any] = {"type": "http.request", "more_body": True}
    while last["type"] == "http.request" and last.get("more_body", False):
        last = await receive()
        chunks.append(last.get("body", b""))
    body = b"".join(chunks)
    queue: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    if last["type"] != "http.request":
        queue = [last]  # the client disconnected

    async def replay() -> MutableMapping[str, Any]:
        return queue.pop() if queue else await receive()

    return body, replay


def _route_path(scope: Scope) -> str:
    """The path by which the router finds a route. Some proxies leave the prefix --root-path on it; it is removed."""
    path: str = scope["path"]
    rest = path.removeprefix(scope.get("root_path", ""))
    return rest if rest.startswith("/") else path  # with the root path /v1, /v1x stays /v1x


async def _not_found(send: Send) -> None:
    message = "The path contains a control character, and no route has one; remove it (such as `%0A`)."
    await _send_json(send, 404, {"error": {"message": message, "type": "NotFoundError", "param": None, "code": 404}})


async def _respond(send: Send, exc: BEError) -> None:
    await _send_json(send, exc.http_status, error_body(exc))


async def _send_json(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
