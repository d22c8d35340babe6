"""Processes a chat request: check it, resolve its tokens, render it with a slot, inject. Imports no vLLM."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from be_serve.core.errors import (
    BEError,
    NotAuthenticated,
    OverBudget,
    RequestError,
    RowsBusy,
    TokenRequired,
    TooLarge,
    TooManyVectors,
    UnsupportedRequest,
)
from be_serve.core.names import FIELDS
from be_serve.core.slots import Slot, SlotRenderer, new_marker
from be_serve.registry import TokenIndex
from be_serve.serving.composition import Composition
from be_serve.serving.cost import Cost
from be_serve.serving.fallback import Fallback, PlainChat, refuse_revealing
from be_serve.serving.injection.base import Held, Injection
from be_serve.serving.metrics import Metrics
from be_serve.serving.middleware import COUNTING, SUPPORTED, RequestContext, current
from be_serve.serving.rendered import check_ids, prompt_text, slot_is_kept
from be_serve.serving.requests import BEFields, keep_lists, refuse_slips
from be_serve.serving.resolve import How, Message, Resolution, Resolver

logger = logging.getLogger("vllm.be_serve.hook")

# The server has no room for a token's vectors. Nothing is wrong with the request.
_NO_ROOM = (OverBudget, RowsBusy, TooLarge, TooManyVectors)
_REQUIRED = (
    "This server answers only chats that name a token (--be-require), and this chat names none. Send `be_id` with a "
    "token's id at the top level of the request's JSON, or `<model>:<id>` as `model`. If you sent `be_id`, a gateway "
    "or client library dropped it. Operators: let your gateway pass fields that it does not know, or name the token "
    "in `model`."
)


@dataclass
class Rendering:
    """One request while vLLM's renderer processes it."""

    tokens: Composition
    held: Held | None
    """The rows or memory that the vectors use; None if the request only counts ids and generates nothing."""
    marker: str
    messages: list[dict[str, Any]]
    template_kwargs: dict[str, Any]
    cost: Cost = field(default_factory=Cost)
    """Time that be-serve's own work on this request took so far."""
    slot: Slot | None = None
    how: How = "be_id"
    fallback: Callable[[BEError], Awaitable[PlainChat]] | None = None
    """If the tokens cannot be placed: returns the chat to answer instead, or raises the error. None: no fallback."""


class ChatHook:
    """Serves a token in place of the system message. One instance per server process."""

    def __init__(
        self,
        *,
        resolver: Resolver,
        index: TokenIndex[Any],
        slots: SlotRenderer,
        injection: Injection,
        keys: Sequence[str],
        vocab_size: int,
        max_chars: int,
        metrics: Metrics,
        require: bool = False,
    ) -> None:
        """With `require`, a chat that names no token is refused."""
        self._resolver = resolver
        self._index = index
        self._slots = slots
        self._injection = injection
        self._keys = keys
        self._vocab_size = vocab_size
        self._max_chars = max_chars
        self._metrics = metrics
        self._require = require
        self._fallback = Fallback(resolver, index, slots)

    async def begin(self, request: Any, messages: Sequence[Any], tools: Any) -> Rendering | PlainChat | None:
        """Start a request: a Rendering to answer with tokens, a PlainChat to answer instead, None to leave it alone.

        Raises BEError for a request that must be refused, and counts the refusal.
        """
        context = current.get()
        cost = Cost()
        try:
            self._injection.check(messages, tools)
            if context is None or not context.supported:
                self._refuse_token(context, request)
                if self._require and context is not None:  # a chat on an endpoint that is not in SUPPORTED
                    raise TokenRequired(_REQUIRED)
                return None
            rendering = await cost.of(self._begin(context, request, messages))
        except BEError as exc:
            self._metrics.refused(exc)
            raise
        if isinstance(rendering, Rendering):
            rendering.cost = cost
        return rendering

    def _refuse_token(self, context: RequestContext | None, request: Any) -> None:
        """Raise UnsupportedRequest for a request that names a token where none can be used.

        The middleware refuses what it sees in the body. A handler of vLLM may change the request after that.
        """
        extra = getattr(request, "model_extra", None) or {}
        given = [name for name in FIELDS if extra.get(name) is not None]
        if given == ["be_match"] and extra["be_match"] is False:  # asks for an answer without a token
            given = []
        if not given and self._resolver.named(BEFields(), getattr(request, "model", None))[0]:
            given = ["model"]
        if given:
            where = context.path if context else "This call"
            raise UnsupportedRequest(
                f"{where} cannot use a token, but `{given[0]}` belongs to one. Leave it out, or use one of: "
                f"{', '.join(sorted(SUPPORTED))}.",
                param=given[0],
            )

    async def _begin(
        self, context: RequestContext, request: Any, messages: Sequence[Any]
    ) -> Rendering | PlainChat | None:
        if context.fault:
            raise context.fault
        extra = request.model_extra or {}
        refuse_slips(extra, extra, vars(request), read_in=context.read_in)
        fields = BEFields.parse(extra)
        if not self._may_use(context):
            if self._require or self._resolver.named(fields, getattr(request, "model", None))[0]:
                raise NotAuthenticated(f"{context.path} with a token needs the server's API key.")
            self._count(context, "plain")
            return None
        if fields.fallback:
            refuse_revealing(context, request)
        keep_lists(messages)
        chat = [dict(m) for m in messages]
        outcome: dict[str, str] = {}
        context.outcomes.append(outcome)
        full_prompt = partial(self._full_prompt_chat, context, request, fields, chat, outcome)
        try:
            rendering = await self._with_tokens(context, request, fields, chat)
        except TokenRequired:  # the request names no token, so no stored prompt belongs to it
            raise
        except BEError as exc:
            if not fields.fallback:
                raise
            return await full_prompt(exc)
        if rendering is None:
            return None
        tokens = rendering.tokens
        outcome.update({"x-be-id": tokens.name, "x-be-digest": tokens.digest})
        if rendering.how == "match":
            outcome["x-be-match"] = "exact"
            rendering.fallback = partial(self._unchanged_chat, context, tokens, chat, outcome)
        elif fields.fallback:
            rendering.fallback = full_prompt
        return rendering

    async def _with_tokens(
        self, context: RequestContext, request: Any, fields: BEFields, chat: list[Message]
    ) -> Rendering | None:
        model = getattr(request, "model", None)
        if self._resolver.named(fields, model)[0]:
            self._refuse_options(request)
        resolution = self._resolver.resolve(fields, model, chat)
        if resolution is None:
            if self._require:
                raise TokenRequired(_REQUIRED, param="be_id")
            self._count(context, "plain")
            return None
        held = None
        try:
            if resolution.how == "match":
                self._refuse_options(request)
            if fields.fallback == "full":
                self._fallback.refuse_unfit(resolution.tokens)
            # A request with a full prompt to fall back on does not wait for free rows.
            wait = resolution.how != "match" and not fields.fallback
            held = await self._hold(context, resolution, wait=wait, choices=max(1, getattr(request, "n", None) or 1))
            return self._mark(resolution, held)
        except BEError as exc:
            if held:
                held.release()
            if resolution.how != "match" or not self._may_answer_match(exc):
                raise
            self._count_missed_match(context, resolution.tokens, exc)
            return None

    async def _full_prompt_chat(
        self,
        context: RequestContext,
        request: Any,
        fields: BEFields,
        chat: list[Message],
        outcome: dict[str, str],
        exc: BEError,
    ) -> PlainChat:
        """The chat with the stored prompt. `exc` is the reason why the token is not available."""
        plain = await self._fallback.chat(request, fields, chat, exc)
        outcome.clear()
        outcome["x-be-fallback"] = "full"
        self._count(context, "fallback")
        return plain

    async def _unchanged_chat(
        self, context: RequestContext, tokens: Composition, chat: list[Message], outcome: dict[str, str], exc: BEError
    ) -> PlainChat:
        """The client's own chat, for a request that matched a token by its prompt and named none. Or raises `exc`."""
        if not self._may_answer_match(exc):
            outcome.clear()
            raise exc
        self._count_missed_match(context, tokens, exc)
        outcome.clear()
        return PlainChat(chat)

    def _may_answer_match(self, exc: BEError) -> bool:
        """Whether a matched chat may get its own prompt in place of the token that failed with `exc`.

        With `require` only for want of room: an option that rules tokens out can also cut the prompt away.
        """
        return not self._require or isinstance(exc, _NO_ROOM)

    def _count_missed_match(self, context: RequestContext, tokens: Composition, exc: BEError) -> None:
        logger.debug("Serving the full prompt, because token %s cannot answer: %s", tokens.name, exc)
        self._count(context, "match_missed")

    def _count(self, context: RequestContext, how: str) -> None:
        self._metrics.requests.labels(path=context.path, how=how).inc()

    def _mark(self, resolution: Resolution, held: Held | None) -> Rendering:
        marker = new_marker()
        tokens = resolution.tokens
        marked = self._slots.mark(resolution.messages, marker, placement=tokens.placement, append=resolution.append)
        return Rendering(tokens, held, marker, marked, tokens.template_kwargs, how=resolution.how)

    async def _hold(self, context: RequestContext, resolution: Resolution, *, wait: bool, choices: int) -> Held | None:
        if context.path in COUNTING:  # nothing is generated: the number of vectors in the manifest is enough
            for record in resolution.tokens.records:
                self._index.check_record(record)
            return None
        parts = []
        for record in resolution.tokens.records:
            vectors = self._index.cached(record)
            self._metrics.cache.labels(result="hit" if vectors is not None else "miss").inc()
            if vectors is None:
                vectors = await asyncio.to_thread(self._index.load, record)
            parts.append((record.digest, vectors))
        ended = UnsupportedRequest(
            "A background response cannot use a token in turns after its HTTP request ended; leave out `background`."
        )
        if context.over:
            raise ended
        held = await self._injection.hold(parts, wait=wait, choices=choices)
        if context.over:  # the request ended during the wait, so its cleanup list has already run
            held.release()
            raise ended
        context.cleanup.append(held.release)
        return held

    async def on_unavailable(self, rendering: Rendering, exc: BEError) -> PlainChat:
        """The chat to answer instead, when the tokens of `rendering` could not be placed. Raises `exc` if none."""
        if rendering.held:  # the answer without the token would hold the rows to its end and not use them
            rendering.held.release()
        try:
            if rendering.fallback is None:
                raise exc
            return await rendering.fallback(exc)
        except BEError as refusal:
            self._metrics.refused(refusal)
            raise

    def check_prompt(self, prompt: Mapping[str, Any]) -> str:
        """The text of vLLM's rendered prompt. Raises UnsupportedRequest as `prompt_text`."""
        return prompt_text(prompt, media=self._injection.beside_media)

    def cut(self, rendering: Rendering, text: str) -> list[int]:
        """Token ids of the rendered chat, with placeholders in the slot. Runs in the renderer's thread pool."""
        if len(text) > self._max_chars:  # vLLM's own limit; checked before the tokenizer spends time on the text
            raise RequestError(
                f"The chat has {len(text)} characters; at most {self._max_chars} can fit this model's context. "
                "Please reduce the length of the messages.",
                param="messages",
            )
        with rendering.cost.of_block():
            sides = self._slots.split(text, rendering.marker, placement=rendering.tokens.placement)
        slot = self._slots.encode(*sides)  # not timed: it replaces vLLM's own tokenising, which a plain chat pays too
        with rendering.cost.of_block():
            check_ids(slot, self._vocab_size)
            rendering.slot = slot
            return slot.ids(rendering.tokens.k)

    def finish(self, rendering: Rendering, engine_input: Mapping[str, Any]) -> dict[str, Any]:
        """The engine input with the vectors in it. Raises UnsupportedRequest if vLLM moved or removed the slot."""
        with rendering.cost.of_block():
            injected = self._finish(rendering, engine_input)
        if rendering.held:
            self._metrics.injected(rendering.cost)
        return injected

    def _finish(self, rendering: Rendering, engine_input: Mapping[str, Any]) -> dict[str, Any]:
        slot, k = rendering.slot, rendering.tokens.k
        ids = engine_input.get("prompt_token_ids", ())
        kind = engine_input.get("type")
        if slot is None or kind not in ("token", "multimodal"):
            raise UnsupportedRequest(
                "vLLM rendered this chat in a way that leaves no place for a token; send the full prompt instead."
            )
        if kind == "multimodal" and not slot_is_kept(slot, k, engine_input):
            raise UnsupportedRequest(
                "This model's processor for images, audio and video moved the token's place; send the full prompt "
                "instead.",
                param="messages",
            )
        if kind == "token" and len(ids) != len(slot.before) + k + len(slot.after):
            raise UnsupportedRequest(
                "vLLM truncated the chat and may have cut the token; send fewer messages, or shorter ones."
            )
        context = current.get()
        if context is not None:
            self._count(context, rendering.how)
        if rendering.held is None:
            return dict(engine_input)  # the request only counts ids: no vectors are needed
        return self._injection.inject(dict(engine_input), slot, rendering.held)

    def _may_use(self, context: RequestContext) -> bool:
        """Whether a request may use tokens. vLLM does not check its API key at /tokenize, so be-serve does."""
        if not self._keys or context.path != "/tokenize":
            return True
        scheme, _, given = context.authorization.partition(" ")
        return scheme.lower() == "bearer" and any(hmac.compare_digest(given.encode(), k.encode()) for k in self._keys)

    def _refuse_options(self, request: Any) -> None:
        """Raise UnsupportedRequest for an option that gives a wrong answer with a token."""
        if getattr(request, "background", None) and not self._injection.outlasts_request:
            raise UnsupportedRequest(
                f"With --be-injection {self._injection.name} a background response cannot use a token; leave out "
                "`background`.",
                param="background",
            )
        prompt_options = {
            "prompt_logprobs": getattr(request, "prompt_logprobs", None) is not None,  # 0 asks for them, too
            "echo": bool(getattr(request, "echo", False)),
        }
        for option in (name for name, requested in prompt_options.items() if requested):
            raise UnsupportedRequest(
                f"`{option}` cannot be answered for a token, because a token has no text; leave it out.", param=option
            )
        if getattr(request, "use_beam_search", False):
            raise UnsupportedRequest(
                "Beam search cannot be used with a token; leave out `use_beam_search`, or use `n` for several answers.",
                param="use_beam_search",
            )
        if getattr(request, "truncate_prompt_tokens", None) is not None:
            raise UnsupportedRequest(
                "`truncate_prompt_tokens` could remove the token; leave it out.", param="truncate_prompt_tokens"
            )
        if getattr(request, "chat_template", None) is not None:
            raise UnsupportedRequest(
                "A token was trained for the server's chat template; send no `chat_template` with it.",
                param="chat_template",
            )
        transfer = getattr(request, "kv_transfer_params", None)
        if isinstance(transfer, dict) and transfer.get("prompt_token_ids") is not None:
            raise UnsupportedRequest(
                "Reused prompt ids cannot be combined with a token; leave `prompt_token_ids` out.",
                param="kv_transfer_params",
            )
