"""Checks of what vLLM rendered, before and after the vectors go in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from be_serve.core.errors import UnsupportedRequest
from be_serve.core.slots import Slot


def prompt_text(prompt: Mapping[str, Any], *, media: bool) -> str:
    """The text of vLLM's rendered prompt.

    Raises UnsupportedRequest for images, audio or video unless `media`, and for a chat rendered as ids.
    """
    if prompt.get("multi_modal_data") and not media:
        raise UnsupportedRequest(
            "With --be-injection prompt-embeds a token cannot be combined with images, audio or video; send the full "
            "prompt instead. Operators: --be-injection resident-rows.",
            param="messages",
        )
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise UnsupportedRequest(
            "This server's tokenizer renders chats as ids and not as text, so the token's place cannot be found; "
            "send the full prompt instead. Operators: leave out --tokenizer-mode."
        )
    return text


def slot_is_kept(slot: Slot, k: int, engine_input: Mapping[str, Any]) -> bool:
    """Whether the slot's k placeholders are unmoved and all media placeholders stand after the slot."""
    ids, end = engine_input["prompt_token_ids"], len(slot.before) + k
    ranges = [item for same_kind in engine_input.get("mm_placeholders", {}).values() for item in same_kind]
    return list(ids[:end]) == slot.ids(k)[:end] and all(item.offset >= end for item in ranges)


def check_ids(slot: Slot, vocab_size: int) -> None:
    """Raise UnsupportedRequest for an id outside the model's vocabulary, such as an added token of the tokenizer."""
    highest = max(max(slot.before, default=0), max(slot.after, default=0))
    if highest >= vocab_size:
        raise UnsupportedRequest(
            f"The chat contains a special token of the tokenizer with the id {highest}, which the model does not "
            "have; remove it from the messages.",
            param="messages",
        )
