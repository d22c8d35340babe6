"""What happens to a chat request: guard, resolve, render with a slot, inject. No vLLM here."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from be_serve.core.errors import BEError, NotAuthenticated, RequestError, TokenRequired, UnsupportedRequest
from be_serve.core.slots import Slot, SlotRenderer, new_marker
from be_serve.registry import TokenIndex
from be_serve.serving.composition import Composition
from be_serve.serving.cost import Cost
from be_serve.serving.fallback import Fallback, PlainChat, refuse_revealing
from be_serve.serving.injection.base import Held, Injection
from be_serve.serving.metrics import Metrics
from be_serve.serving.middleware import COUNTING, RequestContext, current
from be_serve.serving.requests import BEFields, keep_lists, refuse_slips
from be_serve.serving.resolve import How, Message, Resolution, Resolver

logger = logging.getLogger("vllm.be_serve.hook")

_REQUIRED = (
    "This server answers only chats that name a token (--be-require), and this one names none. Send `be_id` with a "
    "token's id at the top level of the request's JSON, or `<model>:<id>` as `model`. If you sent `be_id`, something "
    "on the way dropped it. Operators: let your gateway pass fields that it does not know, or name the token in "
    "`model`."
)


@dataclass
class Rendering:
    """One request on its way through vLLM's renderer."""

    tokens: Composition
    held: Held | None
    """What the vectors need in this process; None where they are only counted."""
    marker: str
    messages: list[dict[str, Any]]
    template_kwargs: dict[str, Any]
    cost: Cost = field(default_factory=Cost)
    """Of our own work so far."""
    slot: Slot | None = None
    how: How = "be_id"
    otherwise: Callable[[BEError], Awaitable[PlainChat]] | None = None
    """Gives the chat that is answered where the tokens cannot be placed, or raises the reason. None: raised at once."""


class ChatHook:
    """Serves a token in place of the system message. One instance a server process."""

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
        """How a request that names a token is answered; None for a plain one.

        Raises BEError for everything that must be refused, counted.
        """
        context = current.get()
        cost = Cost()
        try:
            self._injection.check(messages, tools)
            if context is None or not context.supported:
                if self._require and context is not None:  # a chat on an endpoint that we do not know
                    raise TokenRequired(_REQUIRED)
                return None
            rendering = await cost.of(self._begin(context, request, messages))
        except BEError as exc:
            self._metrics.refused(exc)
            raise
        if isinstance(rendering, Rendering):
            rendering.cost = cost
        return rendering

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
        full = partial(self._full, context, request, fields, chat, outcome)
        try:
            rendering = await self._with_tokens(context, request, fields, chat)
        except TokenRequired:  # no token is named: there is nothing to fall back on
            raise
        except BEError as exc:
            if not fields.fallback:
                raise
            return await full(exc)
        if rendering is None:
            return None
        tokens = rendering.tokens
        outcome.update({"x-be-id": tokens.name, "x-be-digest": tokens.digest})
        if rendering.how == "match":
            outcome["x-be-match"] = "exact"
            rendering.otherwise = partial(self._as_it_came, context, tokens, chat, outcome)
        elif fields.fallback:
            rendering.otherwise = full
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
            # Who has a full prompt to fall back on waits for no room.
            wait = resolution.how != "match" and not fields.fallback
            held = await self._hold(context, resolution, wait=wait, choices=max(1, getattr(request, "n", None) or 1))
            return self._mark(resolution, held)
        except BEError as exc:
            if held:
                held.release()
            if resolution.how != "match":
                raise
            self._missed(context, resolution.tokens, exc)
            return None

    async def _full(
        self,
        context: RequestContext,
        request: Any,
        fields: BEFields,
        chat: list[Message],
        outcome: dict[str, str],
        exc: BEError,
    ) -> PlainChat:
        """The stored prompt's chat in place of a token's, which cannot be had for the reason `exc`."""
        found = await self._fallback.chat(request, fields, chat, exc)
        outcome.clear()
        outcome["x-be-fallback"] = "full"
        self._count(context, "fallback")
        return found

    async def _as_it_came(
        self, context: RequestContext, tokens: Composition, chat: list[Message], outcome: dict[str, str], exc: BEError
    ) -> PlainChat:
        """A matched request's own chat: it named no token, and is answered as without the plugin."""
        self._missed(context, tokens, exc)
        outcome.clear()
        return PlainChat(chat)

    def _missed(self, context: RequestContext, tokens: Composition, exc: BEError) -> None:
        logger.debug("Serving the full prompt: token %s cannot answer: %s", tokens.name, exc)
        self._count(context, "match_missed")

    def _count(self, context: RequestContext, how: str) -> None:
        self._metrics.requests.labels(path=context.path, how=how).inc()

    def _mark(self, resolution: Resolution, held: Held | None) -> Rendering:
        marker = new_marker()
        tokens = resolution.tokens
        marked = self._slots.mark(resolution.messages, marker, placement=tokens.placement, append=resolution.append)
        return Rendering(tokens, held, marker, marked, tokens.template_kwargs, how=resolution.how)

    async def _hold(self, context: RequestContext, resolution: Resolution, *, wait: bool, choices: int) -> Held | None:
        if context.path in COUNTING:  # nothing is generated: the manifest says all that is needed
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
        over = UnsupportedRequest("A response that goes on in the background cannot use a token in its later turns.")
        if context.over:
            raise over
        held = await self._injection.hold(parts, wait=wait, choices=choices)
        if context.over:  # meanwhile: nobody else would give it back
            held.release()
            raise over
        context.cleanup.append(held.release)
        return held

    async def give_up(self, rendering: Rendering, exc: BEError) -> PlainChat:
        """The chat that is answered in place of one whose tokens could not be placed, or raises `exc`."""
        if rendering.held:  # its long answer would hold what it does not use
            rendering.held.release()
        try:
            if rendering.otherwise is None:
                raise exc
            return await rendering.otherwise(exc)
        except BEError as refusal:
            self._metrics.refused(refusal)
            raise

    def check_prompt(self, prompt: Mapping[str, Any]) -> str:
        """The text of vLLM's rendered prompt. Raises UnsupportedRequest for what a token cannot stand beside."""
        return prompt_text(prompt, media=self._injection.beside_media)

    def cut(self, rendering: Rendering, text: str) -> list[int]:
        """Token ids of the rendered chat with placeholders in the slot. Runs in the renderer's thread pool."""
        if len(text) > self._max_chars:  # vLLM's own bound, before any tokenizer works on it
            raise RequestError(
                f"The chat has {len(text)} characters, more than any {self._max_chars} that fit this model's context. "
                "Please reduce the length of the messages.",
                param="messages",
            )
        with rendering.cost.of_block():
            sides = self._slots.split(text, rendering.marker, placement=rendering.tokens.placement)
        slot = self._slots.encode(*sides)  # in place of vLLM's own, which a plain chat waits for as well
        with rendering.cost.of_block():
            check_ids(slot, self._vocab_size)
            rendering.slot = slot
            return slot.ids(rendering.tokens.k)

    def finish(self, rendering: Rendering, engine_input: Mapping[str, Any]) -> dict[str, Any]:
        """The engine input with the vectors in it. Raises UnsupportedRequest where the slot was cut away."""
        with rendering.cost.of_block():
            found = self._finish(rendering, engine_input)
        if rendering.held:
            self._metrics.injected(rendering.cost)
        return found

    def _finish(self, rendering: Rendering, engine_input: Mapping[str, Any]) -> dict[str, Any]:
        slot, k = rendering.slot, rendering.tokens.k
        ids = engine_input.get("prompt_token_ids", ())
        kind = engine_input.get("type")
        if slot is None or kind not in ("token", "multimodal"):
            raise UnsupportedRequest(
                "vLLM rendered this chat in a way that leaves no place for a token; send its full prompt."
            )
        if kind == "multimodal" and not _slot_is_kept(slot, k, engine_input):
            raise UnsupportedRequest(
                "This model's processor of images, audio and video moved the token's place; send its full prompt.",
                param="messages",
            )
        if kind == "token" and len(ids) != len(slot.before) + k + len(slot.after):
            raise UnsupportedRequest(
                "The chat was cut to another length, and the token with it; send fewer messages, or shorter ones."
            )
        context = current.get()
        if context is not None:
            self._count(context, rendering.how)
        if rendering.held is None:
            return dict(engine_input)  # only counted: no vectors are needed
        return self._injection.inject(dict(engine_input), slot, rendering.held)

    def _may_use(self, context: RequestContext) -> bool:
        """Whether a request may use tokens: vLLM's API key does not guard /tokenize, and tokens need guarding."""
        if not self._keys or context.path != "/tokenize":
            return True
        scheme, _, given = context.authorization.partition(" ")
        return scheme.lower() == "bearer" and any(hmac.compare_digest(given.encode(), k.encode()) for k in self._keys)

    def _refuse_options(self, request: Any) -> None:
        """Options whose answer would be wrong beside a vector, which is no vocabulary token."""
        if getattr(request, "background", None) and not self._injection.outlasts_request:
            raise UnsupportedRequest(
                f"With --be-injection {self._injection.name} a token cannot be used in the background.",
                param="background",
            )
        of_the_prompt = {
            "prompt_logprobs": getattr(request, "prompt_logprobs", None) is not None,  # 0 asks for them, too
            "echo": bool(getattr(request, "echo", False)),
        }
        for option in (name for name, asked in of_the_prompt.items() if asked):
            raise UnsupportedRequest(
                f"`{option}` cannot be answered for a token, which has no text; leave it out.", param=option
            )
        if getattr(request, "use_beam_search", False):
            raise UnsupportedRequest(
                "Beam search cannot be used with a token; leave it out, or ask for `n` answers.",
                param="use_beam_search",
            )
        if getattr(request, "truncate_prompt_tokens", None) is not None:
            raise UnsupportedRequest(
                "`truncate_prompt_tokens` could cut the token away; leave it out.", param="truncate_prompt_tokens"
            )
        if getattr(request, "chat_template", None) is not None:
            raise UnsupportedRequest(
                "A token is made for the server's chat template; send no `chat_template` with it.",
                param="chat_template",
            )
        transfer = getattr(request, "kv_transfer_params", None)
        if isinstance(transfer, dict) and transfer.get("prompt_token_ids") is not None:
            raise UnsupportedRequest(
                "Reused prompt ids cannot be combined with a token; leave `prompt_token_ids` out.",
                param="kv_transfer_params",
            )


def prompt_text(prompt: Mapping[str, Any], *, media: bool) -> str:
    """The text of vLLM's rendered prompt. Raises UnsupportedRequest for what a token cannot stand beside."""
    if prompt.get("multi_modal_data") and not media:
        raise UnsupportedRequest(
            "A token that travels as prompt embeds cannot stand beside images, audio or video: vLLM takes embeddings "
            "or media. Operators: --be-injection resident-rows.",
            param="messages",
        )
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise UnsupportedRequest(
            "This server's tokenizer renders chats as ids, and a token has no place in them; "
            "operators: leave --tokenizer-mode out."
        )
    return text


def _slot_is_kept(slot: Slot, k: int, engine_input: Mapping[str, Any]) -> bool:
    """Whether the slot of k placeholders is where it was before media were put into the prompt, all behind it."""
    ids, end = engine_input["prompt_token_ids"], len(slot.before) + k
    ranges = [one for of_kind in engine_input.get("mm_placeholders", {}).values() for one in of_kind]
    return list(ids[:end]) == slot.ids(k)[:end] and all(one.offset >= end for one in ranges)


def check_ids(slot: Slot, vocab_size: int) -> None:
    """Raise UnsupportedRequest for a chat with an id that the model has not: an added marker of the tokenizer."""
    highest = max(max(slot.before, default=0), max(slot.after, default=0))
    if highest >= vocab_size:
        raise UnsupportedRequest(
            f"The chat contains a marker of the tokenizer with the id {highest}, which the model does not know; "
            "take it out of the messages.",
            param="messages",
        )
