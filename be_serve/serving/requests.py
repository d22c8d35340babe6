"""The request fields of ours: what a client may send beside the OpenAI ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from be_serve.core.errors import MisnamedField, RequestError, UnsupportedRequest
from be_serve.core.ids import validate_be_id
from be_serve.core.names import FIELDS, find_slip

# vLLM's own marker for client-sent embeddings. With the engine able to take embeddings,
# its text form would become an id outside the vocabulary.
EMBEDS_MARKER = "<prompt_embeds>"


Fallback: TypeAlias = Literal["full", "unavailable"]

MAX_COMPOSED = 8
"""Most tokens that a request may name for its slot."""


@dataclass(frozen=True)
class BEFields:
    """Our fields of one request, validated."""

    be_ids: tuple[str, ...] = ()
    """The tokens of the slot, in order."""
    append: bool = False
    match: bool = True
    fallback: Fallback | None = None
    """Where the full prompt may answer: "full" in place of tokens that cannot answer, or are marked as not
    keeping its behaviour; "unavailable" in place of the first kind only."""

    @classmethod
    def parse(cls, extra: Mapping[str, Any] | None) -> BEFields:
        """Read the fields from a request's extra fields. Raises RequestError.

        `null` counts as absent for each of them.
        """
        given = {name: extra[name] for name in FIELDS if extra and extra.get(name) is not None}
        if not given:
            return _NONE
        be_ids = _be_ids(given["be_id"]) if "be_id" in given else ()
        system = given.get("be_system")
        if system not in (None, "append"):
            raise RequestError('`be_system` must be "append" or absent.', param="be_system")
        match = given.get("be_match", True)
        if not isinstance(match, bool):
            raise RequestError("`be_match` must be true or false.", param="be_match")
        fallback = given.get("be_fallback")
        if fallback not in (None, *get_args(Fallback)):
            raise RequestError('`be_fallback` must be "full", "unavailable" or absent.', param="be_fallback")
        return cls(be_ids=be_ids, append=system == "append", match=match, fallback=fallback)


_NONE = BEFields()


def _be_ids(value: object) -> tuple[str, ...]:
    """One id, or a list of them. Raises InvalidBeId, RequestError."""
    if not isinstance(value, list):
        return (validate_be_id(value),)
    if not 0 < len(value) <= MAX_COMPOSED:
        raise RequestError(f"`be_id` as a list names 1 to {MAX_COMPOSED} tokens, not {len(value)}.", param="be_id")
    return tuple(validate_be_id(be_id) for be_id in value)


def refuse_slips(
    top: Mapping[str, Any],
    *requests: Mapping[str, Any],
    read_in: Collection[str] = (),
    where: str = "at the top level of the request's JSON, beside `model`",
) -> None:
    """Refuse a key that is meant for a field of ours, for nobody would read it. Arguments as of `find_slip`.

    Raises MisnamedField: an answer without the token would be one without any system prompt.
    """
    slip = find_slip(top, *requests, read_in=read_in)
    if slip is None:
        return
    message = f"`{slip.key}` is not read; send `{slip.field}` {where}."
    if slip.place == "extra_body":
        message += " `extra_body` is the SDKs' argument for such fields, and itself no field of a request."
    raise MisnamedField(message, param=slip.key)


def keep_lists(messages: Any) -> None:
    """Make lists of the one-shot iterators that pydantic keeps in messages: they may be read more than once."""
    for message in messages:
        if isinstance(message, dict):
            lazy = {key: list(value) for key, value in message.items() if isinstance(value, Iterator)}
            message.update(lazy)


def refuse_raw_embeddings(messages: Any, tools: Any) -> None:
    """Refuse client-sent embeddings in any form, as parts or as their marker in text.

    Raises UnsupportedRequest. Stock vLLM refuses the parts without
    `--enable-prompt-embeds`; with it in use for tokens, both must be refused here.
    """
    keep_lists(messages)
    for value in _leaves([messages, tools]):
        if isinstance(value, str):
            if EMBEDS_MARKER in value:
                raise UnsupportedRequest(
                    f"The text {EMBEDS_MARKER} is reserved on this server; remove it from messages and tools."
                )
        elif isinstance(value, Mapping) and value.get("type") == "prompt_embeds":
            raise UnsupportedRequest(
                "Raw prompt embeddings are not accepted on this server. Register a token and send its `be_id`."
            )


def _leaves(value: Any) -> Iterator[Any]:
    """All strings and mappings below `value`; mapping keys included, they are rendered too."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            yield item
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif hasattr(item, "model_dump"):
            stack.append(item.model_dump())
