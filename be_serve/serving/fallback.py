"""`"be_fallback": "full"`: the stored prompt answers where its token cannot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from be_serve.core.errors import BEError, RegistryError, RequestError, TokenNotFound, UnsupportedRequest
from be_serve.core.slots import SlotRenderer
from be_serve.registry import TokenIndex
from be_serve.serving.composition import Composition
from be_serve.serving.middleware import RequestContext
from be_serve.serving.requests import BEFields
from be_serve.serving.resolve import Message, Resolver
from be_serve.serving.rows import TooManyVectors

logger = logging.getLogger("vllm.be_serve.hook")

# Options by which an answer would show the prompt's ids or text. Stored prompts are never read back.
_REVEALING = (
    "return_token_ids",
    "return_prompt_text",
    "return_token_offsets",
    "enable_response_messages",
    "kv_transfer_params",
)


class Unfit(BEError):
    """The token could answer; its own verdict says that it does not keep its prompt's behaviour."""

    http_status = 422
    code = "be_unfit"


@dataclass
class PlainChat:
    """A chat that is answered without a token."""

    messages: list[Message]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def refuse_unfit(tokens: Composition) -> None:
    """Raise Unfit for a token that is marked as anything but deployable. One without a verdict is not."""
    for record in tokens.records:
        verdict = record.manifest.quality.get("verdict")
        status = verdict.get("status") if isinstance(verdict, dict) else verdict
        if status not in (None, "deployable"):
            raise Unfit(
                f"Token {record.id!r} is marked {status!r}, and its prompt's text is not stored. Leave `be_fallback` "
                "out to use it all the same. Operators: be-serve register --with-prompt.",
                param="be_fallback",
            )


class Fallback:
    """Finds the stored prompts of the tokens that a request names."""

    def __init__(self, resolver: Resolver, index: TokenIndex[Any], slots: SlotRenderer) -> None:
        self._resolver = resolver
        self._index = index
        self._slots = slots

    async def chat(
        self, context: RequestContext, request: Any, fields: BEFields, chat: list[Message], reason: BEError
    ) -> PlainChat:
        """The chat with the full prompts in it. `reason` is why the tokens cannot answer.

        Raises `reason` where it is the request's own fault or a text is not stored, and
        UnsupportedRequest where the answer would show the prompt.
        """
        own_fault = isinstance(reason, RequestError) and not isinstance(reason, TooManyVectors)
        if own_fault or context.path == "/tokenize":  # which would list the prompt's ids
            raise reason
        for option in _REVEALING:
            if getattr(request, option, None):
                raise UnsupportedRequest(
                    f"`{option}` would show a stored prompt; leave it out, or leave `be_fallback` out.", param=option
                )
        be_ids, _ = self._resolver.named(fields, getattr(request, "model", None))
        try:
            found = await asyncio.to_thread(lambda: [self._index.prompt(be_id) for be_id in be_ids])
        except RegistryError:
            raise reason from None
        texts = [text for text in found if text is not None]
        if len(texts) < len(found):
            raise reason
        logger.debug("Serving the full prompt, as the request allows: %s", reason)
        full = self._slots.with_system_role(self._resolver.full(fields, be_ids, texts, chat))
        return PlainChat(full, self._template_kwargs(be_ids[0]))

    def _template_kwargs(self, be_id: str) -> Mapping[str, Any]:
        """The variables with which the full prompt was rendered in training; unknown for a removed token."""
        try:
            return self._index.get(be_id).manifest.template_kwargs
        except TokenNotFound:
            return {}
