"""Finds the tokens that answer a request, if any. Does no I/O and imports no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from be_serve.core.errors import NameConflict, RequestError, SystemConflict, UnsupportedRequest
from be_serve.core.ids import split_alias, validate_be_id
from be_serve.core.prompts import prompt_sha256
from be_serve.core.slots import SYSTEM_ROLES, text_of
from be_serve.registry import Record
from be_serve.serving.composition import Composition
from be_serve.serving.requests import BEFields

Message = dict[str, Any]
How = Literal["be_id", "alias", "match"]


@dataclass(frozen=True)
class Resolution:
    """The tokens of a request, and its chat without the system text that the tokens replace."""

    tokens: Composition
    how: How
    messages: list[Message]
    append: str | None = None


class Names(Protocol):
    """Interface to look up records: a TokenIndex, or the files of an `LLM`."""

    @property
    def has_matches(self) -> bool: ...

    def get(self, be_id: str) -> Record:
        """The record of an id. Raises TokenNotFound."""
        ...

    def match(self, sha256: str) -> Record | None:
        """The record registered with `match` for the prompt with this digest, or None."""
        ...


class Resolver:
    """Finds tokens by `be_id` (one id or a list), then by alias, then (opt-in) by the exact prompt."""

    def __init__(
        self,
        index: Names,
        base_models: Callable[[], Sequence[str]],
        *,
        match: bool = True,
        usable: Callable[[Record], bool] = lambda record: True,
    ) -> None:
        self._index = index
        self._base_models = base_models
        self._match = match
        self._usable = usable

    def resolve(self, fields: BEFields, model: str | None, messages: Sequence[Message]) -> Resolution | None:
        """The tokens to use, or None for a request that uses none.

        Raises InvalidBeId, NameConflict, TokenNotFound, SystemConflict, RequestError.
        """
        be_ids, how = self.named(fields, model)
        if (
            how != "alias"
            and model
            and model not in self._base_models()
            and split_alias(model, self._base_models()) is None
        ):
            # `model` is a LoRA adapter. Tokens have the fingerprint of the base model.
            if be_ids:
                raise UnsupportedRequest(
                    f"Tokens are trained for the base model, but `model` is {model!r}; send the base model's name.",
                    param="model",
                )
            return None
        if not be_ids:
            for name, given in (("be_system", fields.append), ("be_fallback", fields.fallback is not None)):
                if given:
                    raise RequestError(f"`{name}` needs a `be_id`.", param=name)
            return self._matched(fields, messages)
        tokens = Composition([self._index.get(be_id) for be_id in be_ids])
        chat, append = self._without_system(tokens.name, tokens.replaces, messages, append=fields.append)
        return Resolution(tokens, how, chat, append)

    def full(
        self, fields: BEFields, be_ids: Sequence[str], texts: Sequence[str], messages: Sequence[Message]
    ) -> list[Message]:
        """The chat with the texts of the prompts in place of the tokens. Raises SystemConflict."""
        digests = {prompt_sha256(text) for text in texts}
        chat, append = self._without_system(",".join(be_ids), digests.__contains__, messages, append=fields.append)
        return [{"role": "system", "content": "\n\n".join([*texts, *([append] if append else [])])}, *chat]

    def named(self, fields: BEFields, model: str | None) -> tuple[tuple[str, ...], How]:
        """The ids that a request names, and by which field. Raises InvalidBeId, NameConflict."""
        alias = split_alias(model, self._base_models())
        if alias is None:
            return fields.be_ids, "be_id"
        alias_id = validate_be_id(alias[1], param="model")
        if fields.be_ids not in ((), (alias_id,)):
            raise NameConflict(
                f"`model` names the token {alias_id!r} and `be_id` names {', '.join(map(repr, fields.be_ids))}; "
                "send one of them.",
                param="be_id",
            )
        return (alias_id,), "be_id" if fields.be_ids else "alias"

    def _matched(self, fields: BEFields, messages: Sequence[Message]) -> Resolution | None:
        if not (self._match and fields.match and self._index.has_matches) or not messages:
            return None
        systems = [m for m in messages if m.get("role") in SYSTEM_ROLES]
        if len(systems) != 1 or systems[0] is not messages[0]:
            return None
        text = text_of(messages[0].get("content"))
        if not text:
            return None
        record = self._index.match(prompt_sha256(text))
        # The request names no token. If the matching token does not fit, the request must be answered as without
        # the plugin and not be refused.
        if record is None or not self._usable(record):
            return None
        return Resolution(Composition([record]), "match", list(messages[1:]))

    def _without_system(
        self, name: str, replaces: Callable[[str], bool], messages: Sequence[Message], *, append: bool
    ) -> tuple[list[Message], str | None]:
        """The chat without its leading system messages, and the text among them that no token replaces.

        Raises SystemConflict for such a text unless `append`, and for a system message later in the chat.
        """
        count = next((i for i, m in enumerate(messages) if m.get("role") not in SYSTEM_ROLES), len(messages))
        head, chat = messages[:count], list(messages[count:])
        others: list[str] = []
        for message in head:
            text = text_of(message.get("content"))
            if text is None:
                raise SystemConflict(
                    "A system message sent with a token must be text; remove its other content.", param="messages"
                )
            if text.strip() and not replaces(prompt_sha256(text)):
                others.append(text)
        if any(m.get("role") in SYSTEM_ROLES for m in chat):
            raise SystemConflict(
                "A chat with a token cannot have a system message in the middle; put it first and send "
                '`"be_system": "append"`.',
                param="messages",
            )
        if others and not append:
            raise SystemConflict(
                f"Token {name!r} replaces the system message, but this request has another one. "
                'Remove it, or send `"be_system": "append"` to place it after the token.',
                param="messages",
            )
        return chat, "\n\n".join(others) if others else None
