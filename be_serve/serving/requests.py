"""The request fields that be-serve adds to the OpenAI fields, and the checks on them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from be_serve.core.errors import MisnamedField, RequestError, UnsupportedRequest
from be_serve.core.ids import validate_be_id
from be_serve.core.names import FIELDS, find_slip

# vLLM's own marker for embeddings from a client. If the engine accepts embeddings,
# this text would become an id outside the vocabulary.
EMBEDS_MARKER = "<prompt_embeds>"


Fallback: TypeAlias = Literal["full", "unavailable"]

MAX_COMPOSED = 8
"""Largest number of tokens that a request may name for its slot."""


@dataclass(frozen=True)
class BEFields:
    """The validated be-serve fields of one request."""

    be_ids: tuple[str, ...] = ()
    """The tokens of the slot, in order."""
    append: bool = False
    match: bool = True
    fallback: Fallback | None = None
    """When the full prompt answers in place of the tokens. "unavailable": if they cannot answer. "full": also if
    their verdict says that they do not keep the prompt's behaviour. None: never."""

    @classmethod
    def parse(cls, extra: Mapping[str, Any] | None) -> BEFields:
        """Read the fields from a request's extra fields. Raises RequestError.

        A field with the value `null` counts as absent.
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
    """The validated ids of `be_id`, which is one id or a list. Raises InvalidBeId, RequestError."""
    if not isinstance(value, list):
        return (validate_be_id(value),)
    if not 0 < len(value) <= MAX_COMPOSED:
        raise RequestError(f"`be_id` as a list must name 1 to {MAX_COMPOSED} tokens, not {len(value)}.", param="be_id")
    return tuple(validate_be_id(be_id) for be_id in value)


def refuse_slips(
    top: Mapping[str, Any],
    *requests: Mapping[str, Any],
    read_in: Collection[str] = (),
    where: str = "at the top level of the request's JSON, beside `model`",
) -> None:
    """Raise MisnamedField for a key that is meant as a be-serve field and is not read. Arguments as for `find_slip`.

    If the key were ignored, the model would answer without the token and so without any system prompt.
    """
    slip = find_slip(top, *requests, read_in=read_in)
    if slip is None:
        return
    message = f"`{slip.key}` is not read; send `{slip.field}` {where}."
    if slip.place == "extra_body":
        message += " `extra_body` is an argument of the SDKs for such fields; it is not a field of the request."
    raise MisnamedField(message, param=slip.key)


def keep_lists(messages: Any) -> None:
    """Replace the one-shot iterators that pydantic keeps in messages by lists, which can be read more than once."""
    for message in messages:
        if isinstance(message, dict):
            lists = {key: list(value) for key, value in message.items() if isinstance(value, Iterator)}
            message.update(lists)


def refuse_raw_embeddings(messages: Any, tools: Any) -> None:
    """Raise UnsupportedRequest for embeddings from a client: message parts, or vLLM's marker in text.

    Without `--enable-prompt-embeds` vLLM itself refuses the parts. be-serve needs that option for its
    tokens, so this function refuses both forms.
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
                "This server does not accept raw prompt embeddings. Register a token and send its `be_id`."
            )


def _leaves(value: Any) -> Iterator[Any]:
    """All strings and mappings inside `value`. Includes the keys of mappings, because templates print them, too."""
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
