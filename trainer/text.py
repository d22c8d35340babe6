"""Words and sentences of prompts and answers. It knows nothing of models."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+", re.UNICODE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_OPENING_WORDS = 8
_RECITED_WORDS = 20
_QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”')


def sentences(prompt: str) -> list[str]:
    """The prompt's sentences, those of at least three words."""
    parts = [part.strip(" -*#\t") for part in _SENTENCE.split(prompt)]
    return [part for part in parts if len(part.split()) >= 3] or [prompt]


def recites(answer: str, prompt: str) -> bool:
    """Whether an answer gives the prompt away word for word.

    It does where it holds the prompt's first eight words (a shorter prompt's all), or
    any twenty in a row. What the prompt itself puts in quotation marks is meant to be
    said, and does not count among the twenty.
    """
    opening, said = tuple(words_of(prompt)[:_OPENING_WORDS]), words_of(answer)
    if opening and opening in runs(said, len(opening)):
        return True
    spoken = runs(said, _RECITED_WORDS)
    return any(spoken & runs(words_of(part), _RECITED_WORDS) for part in _QUOTED.split(prompt))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """All runs of so many words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
