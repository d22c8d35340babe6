"""Words and sentences of prompts and answers, and whether an answer says a fact. It knows nothing of models."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(r"\w+", re.UNICODE)
CONTENT = re.compile(r"[^\W_]{2,}|\d")
"""A word of two letters or more, or a digit alone."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_OPENING_WORDS = 8
_RECITED_WORDS = 20
_QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”')
# Quotation marks and dashes as a keyboard writes them. NFKC leaves most of them apart.
_SIGNS = str.maketrans({**dict.fromkeys("’‘‛`´", "'"), **dict.fromkeys("“”„‟«»", '"'), **dict.fromkeys("‐‑‒–—−", "-")})
_EMPHASIS = re.compile(r"(?<!\w)(\*+|__+)|(\*+|__+)(?!\w)")
# At a word's edges. Signs that say something (14 %, $5, -3, #2, @me) stay.
_EDGES = re.compile(r"^[^\w%°$€£¥#@+\-]+|[^\w%°$€£¥]+$|^-+(?!\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Thai to Burmese, Khmer, kana, Han, Hangul: written without a space on each side of a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_LETTER = rf"[^\W_{_UNSPACED}]"


def sentences(prompt: str) -> list[str]:
    """The prompt's sentences, those of at least three words."""
    parts = [part.strip(" -*#\t") for part in _SENTENCE.split(prompt)]
    return [part for part in parts if len(part.split()) >= 3] or [prompt]


def without_marks(text: str) -> str:
    """The text without punctuation and line breaks: marks within words and numbers stay, and signs of units."""
    return " ".join(word for word in (_EDGES.sub("", part) for part in text.split()) if word)


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


def content_words(text: str) -> set[str]:
    """The words of two letters or more, and the digits, in lower case."""
    return {word.lower() for word in CONTENT.findall(text)}


def runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """All runs of so many words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def says(answer: str, facts: Sequence[str]) -> bool:
    """Whether an answer says one of the facts.

    Case, the form of quotation marks, dashes and white space, emphasis by asterisks and
    commas between thousands do not count. A fact that begins or ends with a letter or
    digit must do so at the edge of a word or number: 17 is neither in 1975 nor in 17.5.
    """
    text = _plain(answer)
    return any(_found(plain, text) for plain in map(_plain, facts) if plain)


def _plain(text: str) -> str:
    plain = _EMPHASIS.sub("", unicodedata.normalize("NFKC", text.translate(_SIGNS))).casefold()
    return _THOUSANDS.sub("", " ".join(plain.split()))


def _found(fact: str, text: str) -> bool:
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, fact[0]) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, fact[-1]) else ""
    if fact[0].isdecimal():
        before += r"(?<!\d[.,])"
    if fact[-1].isdecimal():
        after += r"(?![.,]\d)"
    return re.search(before + re.escape(fact) + after, text) is not None
