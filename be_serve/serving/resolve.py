"""From a request to the tokens that answer it, or to none. Pure: no I/O, no vLLM."""

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
    """The tokens of a request, and the chat without the system text they replace."""

    tokens: Composition
    how: How
    messages: list[Message]
    append: str | None = None


class Names(Protocol):
    """Where records are looked up: a TokenIndex, or files alone."""

    @property
    def has_matches(self) -> bool: ...

    def get(self, be_id: str) -> Record:
        """The record of an id. Raises TokenNotFound."""
        ...

    def match(self, sha256: str) -> Record | None:
        """The record that answers for the prompt of this digest, if any."""
        ...


class Resolver:
    """Applies the naming rules: `be_id` (one, or a list), then the alias, then (opt-in) the exact prompt."""

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
        """Return the tokens to use, or None for a plain request.

        Raises InvalidBeId, NameConflict, TokenNotFound, SystemConflict, RequestError.
        """
        be_ids, how = self.named(fields, model)
        if (
            how != "alias"
            and model
            and model not in self._base_models()
            and split_alias(model, self._base_models()) is None
        ):
            # A LoRA adapter: not the model that any token's fingerprint stands for.
            if be_ids:
                raise UnsupportedRequest(
                    f"Tokens are made for the base model, and `model` names {model!r}; send the base model's name.",
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
        """The chat with the prompts' own texts in place of the tokens. Raises SystemConflict."""
        digests = {prompt_sha256(text) for text in texts}
        chat, append = self._without_system(",".join(be_ids), digests.__contains__, messages, append=fields.append)
        return [{"role": "system", "content": "\n\n".join([*texts, *([append] if append else [])])}, *chat]

    def named(self, fields: BEFields, model: str | None) -> tuple[tuple[str, ...], How]:
        """The ids that a request names, and how. Raises InvalidBeId, NameConflict."""
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
        # A request that names no token must be answered as without the plugin, never refused for a token's sake.
        if record is None or not self._usable(record):
            return None
        return Resolution(Composition([record]), "match", list(messages[1:]))

    def _without_system(
        self, name: str, replaces: Callable[[str], bool], messages: Sequence[Message], *, append: bool
    ) -> tuple[list[Message], str | None]:
        """Drop the leading system turn the tokens stand for; keep other system text only to append it."""
        count = next((i for i, m in enumerate(messages) if m.get("role") not in SYSTEM_ROLES), len(messages))
        head, chat = messages[:count], list(messages[count:])
        others: list[str] = []
        for message in head:
            text = text_of(message.get("content"))
            if text is None:
                raise SystemConflict("A system message beside a token must be text.", param="messages")
            if text.strip() and not replaces(prompt_sha256(text)):
                others.append(text)
        if any(m.get("role") in SYSTEM_ROLES for m in chat):
            raise SystemConflict(
                "A system message in the middle of the chat cannot stand beside a token; put it first, "
                'with `"be_system": "append"`.',
                param="messages",
            )
        if others and not append:
            raise SystemConflict(
                f"Token {name!r} replaces the system message, and this request brings another one. "
                'Remove it, or send `"be_system": "append"` to place it behind the token.',
                param="messages",
            )
        return chat, "\n\n".join(others) if others else None
