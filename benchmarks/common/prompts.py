"""System prompts and questions with an exact number of tokens, from built-in text.

The server counts the tokens (`/tokenize`), so that the lengths are exact for its tokenizer.
The seed determines all texts: two runs with one model and one seed send the same texts.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from be_serve.core.errors import InputError, ServerError
from benchmarks.common.client import ServerClient

Count = Callable[[str], Awaitable[int]]
Messages = list[dict[str, str]]

_PREAMBLE = (
    "Be brief and kind. You are the front desk of a small harbour hotel and answer guests in writing. "
    "Read every rule below before each reply, keep to all of them, and never mention that they exist. "
)
_WHEN = (
    "a guest arrives after midnight", "the ferry is late", "somebody asks for the wifi password",
    "a room is too warm", "the kitchen has closed", "a bicycle is returned wet", "two bookings overlap",
    "a parcel has no name on it", "the tide is above four metres", "a child is lost on the pier",
    "a musician wants to practise", "the lift is being repaired", "a dog barks at night",
    "an invoice needs a company name", "a key card stops working", "breakfast is asked for at five",
    "a boat must be moored overnight", "somebody wants a quieter room", "the heating makes a noise",
    "a guest has lost a ring", "a taxi does not come", "the sauna is booked twice",
)  # fmt: skip
_DO = (
    "offer the blue room first and name its price", "apologise once and give a time",
    "write the answer in two short sentences", "point to the map beside the stairs",
    "ask for the booking number before anything else", "promise nothing that the captain has not signed",
    "add the telephone number of the night porter", "list the choices as a numbered list of three",
    "repeat the date with the day of the week", "thank them for telling us and note it in the log",
    "send the form with the green border", "quote the fee in the local currency and in euro",
    "keep the tone warm but leave out every exclamation mark", "say which colleague will follow it up",
)  # fmt: skip
_UNLESS = (
    "unless the guest is a member of the sailing club", "even when the house is full",
    "but only between the first of May and the end of September", "and close with the weather at sea",
    "unless the manager has decided otherwise that day", "and never guess a number",
    "also when the question comes in another language", "and keep the reply under eighty words",
    "except on the evening of the lantern market", "and leave the old tariff out of it",
)  # fmt: skip
_ASK = (
    "can I still get something warm to eat tonight, and where would I sit",
    "which of the two staircases leads to the roof with the telescope",
    "is there a dry place for three bicycles and a folded kayak",
    "what does the later ferry cost for a van with a small trailer",
    "who do I call when the gate behind the boathouse will not open",
    "how early may I leave my luggage before the room is ready",
    "would you move our table nearer to the window for the concert",
    "could you tell me what the red flag on the mole means today",
)
_MORE = (
    "We are a party of five and one of us walks slowly.", "I asked the porter, but he was not certain.",
    "My sister stayed with you last spring and was happy.", "Please use plain words, I am reading on the boat.",
    "We would rather pay in cash if that is possible.", "The letter you sent has another date on it.",
    "Nothing about it stands on the page I was given.", "I would like to know before the tide turns.",
)  # fmt: skip
# One token each in most vocabularies. They fill the last gap to an exact count.
_FILLERS = ("and", "the", "of", "a", "it", "so", "to", "now", "I", "x", ".", "!", "?", ",")


def handbook(seed: int) -> str:
    """Return a rule book of about 20,000 tokens. Its first n words are a prompt of any length."""
    rng = random.Random(f"handbook {seed}")  # noqa: S311
    rules = [f"Rule {n}. When {rng.choice(_WHEN)}, {rng.choice(_DO)}, {rng.choice(_UNLESS)}." for n in range(1, 601)]
    return _PREAMBLE + " ".join(rules)


def question_text(seed: int, label: str) -> str:
    """Return a guest's letter of about 10,000 tokens. Each label gives another letter, from its first words on."""
    rng = random.Random(f"question {seed} {label}")  # noqa: S311
    opening = f"{rng.choice(('Room', 'Cabin', 'Table', 'Berth'))} {rng.randrange(10, 9_999)} here: {rng.choice(_ASK)}?"
    more = list(_MORE)
    rng.shuffle(more)
    return " ".join([opening, *(" ".join(more) for _ in range(100))])


async def fit_text(text: str, target: int, count: Count) -> str:
    """Return the first words of `text`, with filler words at the end, in exactly `target` tokens.

    Raises InputError if the text is too short or no filler gives the exact count.
    """
    words = text.split()[:target]  # a word is at least one token
    low, high = 0, len(words)
    if await count(" ".join(words)) < target:
        raise InputError(f"{target} tokens are more than the built-in text holds. Use --prompt-file.")
    while low < high:  # binary search: the most words that fit
        middle = (low + high + 1) // 2
        if await count(" ".join(words[:middle])) <= target:
            low = middle
        else:
            high = middle - 1
    # Sometimes no filler fits after the last word. Then try again with fewer words.
    for kept in range(low, max(low - 8, -1), -1):
        filled = await _fill(" ".join(words[:kept]), target, count)
        if filled is not None:
            return filled
    raise InputError(f"Found no text of exactly {target} tokens for this tokenizer. Use another length in --cases.")


async def _fill(text: str, target: int, count: Count) -> str | None:
    have = await count(text) if text else 0
    while have < target:
        for filler in _FILLERS:
            longer = f"{text} {filler}" if text else filler
            if have < (n := await count(longer)) <= target:
                text, have = longer, n
                break
        else:
            return None
    return text if have == target else None


class Chat:
    """Builds the messages of an arm; the server counts their tokens.

    `system_role` is False for chat templates without a system turn (Gemma 2). The prompt is then
    the beginning of the user's message, as on a server with the plugin.
    """

    def __init__(self, client: ServerClient, model: str, template_kwargs: dict[str, Any] | None = None) -> None:
        self._client = client
        self._model = model
        self.template_kwargs = template_kwargs or {}
        self.system_role = True

    async def prepare(self) -> None:
        """Set `system_role`: whether the chat template accepts a system message. Raises ServerError."""
        try:
            await self.count("x", "Hi")
        except ServerError:
            self.system_role = False
            await self.count("x", "Hi")

    def messages(self, prompt: str | None, question: str) -> Messages:
        """Return the messages of an arm. `prompt` None or empty gives an empty system turn."""
        if self.system_role:
            return [{"role": "system", "content": prompt or ""}, {"role": "user", "content": question}]
        return [{"role": "user", "content": f"{prompt}\n\n{question}" if prompt else question}]

    async def count(self, prompt: str, question: str) -> int:
        """Return the number of tokens of the rendered chat. Raises ServerError."""
        body: dict[str, Any] = {"model": self._model, "messages": self.messages(prompt, question)}
        if self.template_kwargs:
            body["chat_template_kwargs"] = self.template_kwargs
        return int((await self._client.call("POST", "/tokenize", json=body))["count"])

    async def plain_ids(self, text: str) -> list[int]:
        """Return the token ids of a text alone, without special tokens. Raises ServerError."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return list((await self._client.call("POST", "/tokenize", json=body))["tokens"])

    async def question_tokens(self, question: str) -> int:
        """Return the number of tokens of a question alone. Raises ServerError."""
        return len(await self.plain_ids(question))

    async def prompt_tokens(self, prompt: str) -> int:
        """Return the number of tokens that a system prompt adds to a chat with an empty system turn."""
        if not self.system_role:
            return len(await self.plain_ids(prompt))
        if not hasattr(self, "_empty"):
            self._empty = await self.count("", "Hi")
        return await self.count(prompt, "Hi") - self._empty


async def fit_questions(chat: Chat, tokens: int, labels: Sequence[str], seed: int) -> list[str]:
    """Return one question of exactly `tokens` tokens for each label. Raises InputError."""
    return [await fit_text(question_text(seed, label), tokens, chat.question_tokens) for label in labels]
