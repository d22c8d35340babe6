"""The field `be_fallback`: answers with the stored prompt if its token is not available."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from be_serve.core.errors import (
    BEError,
    RegistryError,
    RequestError,
    TokenNotFound,
    TooLarge,
    TooManyVectors,
    Unfit,
    UnsupportedRequest,
)
from be_serve.core.slots import SlotRenderer
from be_serve.registry import TokenIndex
from be_serve.serving.composition import Composition
from be_serve.serving.injection.resident_rows import salt
from be_serve.serving.middleware import RequestContext
from be_serve.serving.requests import BEFields
from be_serve.serving.resolve import Message, Resolver

_FIELD = "be_fallback"
_MAX_WARNINGS = 1000
logger = logging.getLogger("vllm.be_serve.hook")

# Options that make an answer show the prompt's ids or text. A client must never read a stored prompt.
_REVEALING = (
    "return_token_ids",
    "return_prompt_text",
    "return_token_offsets",
    "enable_response_messages",
    "kv_transfer_params",
)
# Options whose text a template may print before the system message.
_TEMPLATE_OPTIONS = ("tools", "tool_choice", "chat_template_kwargs", "documents", "reasoning", "reasoning_effort")


@dataclass
class PlainChat:
    """A chat that is answered without a token."""

    messages: list[Message]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    secret: str | None = None
    """Goes into `cache_salt`, so that no client's chat shares KV blocks with it. None: the client's own chat."""

    def with_cache_salt(self, engine_input: dict[str, Any]) -> dict[str, Any]:
        """The engine input with a `cache_salt` that only chats with the same `secret` have."""
        if self.secret is None:
            return engine_input
        return {**engine_input, "cache_salt": salt(self.secret, engine_input.get("cache_salt"))}


def refuse_revealing(context: RequestContext, request: Any) -> None:
    """Raise UnsupportedRequest for a request whose answer would show the stored prompt after a fallback."""
    if context.path == "/tokenize":
        raise UnsupportedRequest("`be_fallback` could show a stored prompt at /tokenize; leave it out.", param=_FIELD)
    for option in _REVEALING:
        if getattr(request, option, None):
            raise UnsupportedRequest(
                f"`{option}` with `be_fallback` could show a stored prompt; leave one of them out.", param=option
            )


class Fallback:
    """Finds the stored prompts of the tokens that a request names."""

    def __init__(self, resolver: Resolver, index: TokenIndex[Any], slots: SlotRenderer) -> None:
        self._resolver = resolver
        self._index = index
        self._slots = slots
        self._warned: set[tuple[str, str]] = set()
        self._secret = secrets.token_hex(32)

    async def chat(self, request: Any, fields: BEFields, chat: list[Message], reason: BEError) -> PlainChat:
        """The chat with the full prompts in place of the tokens. `reason` is why the tokens cannot answer.

        Raises `reason` if the request itself is wrong, or if a prompt's text is not stored.
        """
        if isinstance(reason, RequestError) and not isinstance(reason, TooManyVectors | TooLarge):
            raise reason
        be_ids, _ = self._resolver.named(fields, getattr(request, "model", None))
        try:
            found = await asyncio.to_thread(lambda: [self._index.prompt(be_id) for be_id in be_ids])
        except RegistryError:
            raise reason from None
        texts = [text for text in found if text is not None]
        if len(texts) < len(found):
            raise reason
        self._warn_once(",".join(be_ids), reason)
        full = self._slots.with_system_role(self._resolver.full(fields, be_ids, texts, chat))
        return PlainChat(full, self._template_kwargs(be_ids[0]), self._cache_secret(request, be_ids))

    def refuse_unfit(self, tokens: Composition) -> None:
        """Raise Unfit for a token whose verdict is not `deployable`, if the texts of all prompts are stored.

        A token without a verdict is not refused.
        """
        if not all(self._index.has_prompt(record.id) for record in tokens.records):
            return
        for record in tokens.records:
            verdict = record.manifest.quality.get("verdict")
            status = verdict.get("status") if isinstance(verdict, dict) else verdict
            if status not in (None, "deployable"):
                raise Unfit(f"Token {record.id!r} is marked {status!r}.")

    def _cache_secret(self, request: Any, be_ids: Sequence[str]) -> str:
        """A cache secret for these prompts and for the options that a template prints before them.

        `usage` shows how many tokens of a prompt were cached. With the same secret, a client could send a guess
        of the stored prompt's beginning and learn, token by token, whether the guess is right.
        """
        options = {name: getattr(request, name, None) for name in _TEMPLATE_OPTIONS}
        return f"{self._secret}\n{json.dumps([be_ids, options], sort_keys=True, default=str)}"

    def _warn_once(self, name: str, reason: BEError) -> None:
        """Log one warning for each token and error code: every such request pays for its full prompt."""
        if (name, reason.code) not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add((name, reason.code))
            logger.warning("Requests with be_fallback get the full prompt in place of %s: %s", name, reason)

    def _template_kwargs(self, be_id: str) -> Mapping[str, Any]:
        """The template variables that training used for the full prompt. Empty for a removed token: not known."""
        try:
            return self._index.get(be_id).manifest.template_kwargs
        except TokenNotFound:
            return {}
