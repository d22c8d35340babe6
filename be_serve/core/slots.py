"""Finds the slot: the place of a token's vectors in a rendered chat.

The module turns messages into the token ids before and after the slot. Training and serving must put the
same ids around the vectors, or the quality is lost, so both use this module. It does not handle vectors.

It renders the chat with an unguessable marker as the system message, and splits the rendered text at the
marker. This works with every chat template that prints the system message once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from be_serve.core.artifact import Placement
from be_serve.core.errors import SlotError

Message = dict[str, Any]
SYSTEM_ROLES = ("system", "developer")
# Template variables with a fixed value. Some templates print the date: a new date would change the ids every day.
_PINNED = {"date_string": "26 Jul 2024"}


class ChatTokenizer(Protocol):
    """The tokenizer methods that the slot needs. Tokenizers of Hugging Face and vLLM have them."""

    @property
    def bos_token(self) -> Any: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Slot:
    """The token ids before and after the k vectors."""

    before: list[int]
    after: list[int]

    def ids(self, k: int, placeholder: int = 0) -> list[int]:
        """All ids, with `placeholder` at the position of each of the k vectors."""
        return [*self.before, *([placeholder] * k), *self.after]


def pinned_template_kwargs(template: str | None) -> dict[str, Any]:
    """The variables of a template that training must pin, such as Llama-3's `date_string`, with their values."""
    return {name: value for name, value in _PINNED.items() if template and name in template}


def text_of(content: Any) -> str | None:
    """The text of a message's content (a string or text parts); None if the content has other parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type") not in ("text", "input_text", None):
            return None
        texts.append(text)
    return "".join(texts)


class SlotRenderer:
    """Finds the slot in chats, for one tokenizer and chat template.

        slots = SlotRenderer(tokenizer)
        slot = slots.render([{"role": "user", "content": "Hi"}])
        ids = slot.before + <k vectors> + slot.after

    `system_role` is False for a template without a system turn (Gemma 2). The slot is then
    at the start of the first user turn, followed by two newlines.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        self.system_role = self._accepts_system_role()
        self._bos = self._document_bos()

    def render(
        self,
        messages: Sequence[Message],
        *,
        placement: Placement = "system",
        append: str | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Slot:
        """The slot of a chat without a system message.

        `append` is text that follows the token in the same system turn, after two
        newlines. Raises SlotError if the chat has no place for the token.
        """
        marker = new_marker()
        marked = self.mark(messages, marker, placement=placement, append=append)
        text = self._apply(marked, add_generation_prompt, template_kwargs)
        return self.cut(text, marker, placement=placement)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a chat without a token, as a server tokenises it."""
        prepared = self.with_system_role(messages)
        return self._encode(self._apply(prepared, add_generation_prompt, template_kwargs))

    def prompt_ids(self, prompt: str, *, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """The ids of a system prompt in the place of the slot in a rendered chat."""
        user = [{"role": "user", "content": "Hi"}]
        slot = self.render(user, template_kwargs=template_kwargs)
        whole = self.encode_chat([{"role": "system", "content": prompt}, *user], template_kwargs=template_kwargs)
        end = len(whole) - len(slot.after)
        if whole[: len(slot.before)] == slot.before and whole[end:] == slot.after and end > len(slot.before):
            return whole[len(slot.before) : end]
        return self._encode(prompt)  # the tokenizer merged characters across the slot's edge

    def mark(
        self,
        messages: Sequence[Message],
        marker: str,
        *,
        placement: Placement = "system",
        append: str | None = None,
    ) -> list[Message]:
        """The messages with `marker` at the place of the slot. Raises SlotError if they begin with a system message."""
        chat = list(messages)
        if any(m.get("role") in SYSTEM_ROLES for m in chat[:1]):
            raise SlotError("A token replaces the system message; give the chat without one.")
        if placement == "prefix":
            if append is not None:
                raise SlotError(
                    "A token with placement `prefix` has no system turn, so no text can be appended; leave out the "
                    "system message."
                )
            return chat
        content = marker if append is None else f"{marker}\n\n{append}"
        if placement == "block" and append is not None:
            raise SlotError(
                "A token with placement `block` replaces the whole system turn, so no text can be appended; leave out "
                "the system message."
            )
        return self.with_system_role([{"role": "system", "content": content}, *chat])

    def cut(self, text: str, marker: str, *, placement: Placement = "system") -> Slot:
        """Split a rendered chat at its marker, and encode both sides. Raises SlotError."""
        return self.encode(*self.split(text, marker, placement=placement))

    def split(self, text: str, marker: str, *, placement: Placement = "system") -> tuple[str, str]:
        """The text of a rendered chat before and after its marker. Raises SlotError."""
        if placement == "prefix":
            return "", text
        if text.count(marker) != 1:
            raise SlotError(
                f"The chat template prints the system message {text.count(marker)} times, but a token needs it once; "
                "use the full prompt, or another chat template."
            )
        before, after = text.split(marker)
        if placement == "block" and self.system_role:
            before, after = self._cut_block(before, after)
        return before, after

    def encode(self, before: str, after: str) -> Slot:
        """The slot whose sides are the ids of the two texts."""
        return Slot(self._encode(before), self._encode(after))

    def with_system_role(self, messages: Sequence[Message]) -> list[Message]:
        """The messages. If the template has no system role, the system text moves to the start of the first user turn.

        Raises SlotError if there is no such turn.
        """
        chat = list(messages)
        if self.system_role or not chat or chat[0].get("role") not in SYSTEM_ROLES:
            return chat
        system, chat = text_of(chat[0].get("content")) or "", chat[1:]
        if not chat or chat[0].get("role") != "user":
            raise SlotError("This model's template has no system role: the chat must start with a user message.")
        content = chat[0].get("content")
        if isinstance(content, str) or content is None:
            content = f"{system}\n\n{content or ''}"
        else:
            content = [{"type": "text", "text": f"{system}\n\n"}, *content]
        return [{**chat[0], "content": content}, *chat[1:]]

    def _cut_block(self, before: str, after: str) -> tuple[str, str]:
        """Both sides without the rest of the system turn, from its start to its closing special token. A BOS stays."""
        specials = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        closings = [(at, token) for token in specials if (at := after.find(token)) >= 0]
        if not closings:
            raise SlotError(
                "The chat template does not close the system turn with a special token; use placement `system`."
            )
        at, token = min(closings, key=lambda found: (found[0], -len(found[1])))
        if after[:at].strip():
            raise SlotError(
                "The system turn holds more than the system message, such as tools or the user's own text. "
                "Placement `block` would remove it; use placement `system`."
            )
        bos = self._bos
        start = bos if bos and before.startswith(bos) else ""
        return start, after[at + len(token) :].lstrip()

    def _accepts_system_role(self) -> bool:
        marker = new_marker()
        chat: list[Message] = [{"role": "system", "content": marker}, {"role": "user", "content": "Hi"}]
        try:
            return str(self._apply(chat, True, None)).count(marker) == 1
        except Exception:  # a template may reject a role with any exception
            return False

    def _document_bos(self) -> str:
        """The BOS text if it occurs once, at the start of a chat; empty if every turn has it (SmolLM2) or none."""
        bos = self._tokenizer.bos_token
        if not isinstance(bos, str) or not bos:
            return ""
        chat: list[Message] = [{"role": "user", "content": "Hi"}]
        text = self._apply(chat, True, None)
        return bos if text.startswith(bos) and text.count(bos) == 1 else ""

    def _apply(self, chat: Sequence[Message], generate: bool, kwargs: Mapping[str, Any] | None) -> str:
        options: dict[str, Any] = dict(kwargs or {})
        if self._template is not None:
            options["chat_template"] = self._template
        apply: Callable[..., Any] = self._tokenizer.apply_chat_template
        return str(apply(list(chat), tokenize=False, add_generation_prompt=generate, **options))

    def _encode(self, text: str) -> list[int]:
        # The template has already printed the special tokens; the tokenizer must not add more.
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []


def new_marker() -> str:
    """A random marker text. No message can contain it, by chance or on purpose."""
    return f"BESLOT{secrets.token_hex(16)}"
