"""The paper's failure signatures, looked for in generated answers.

    copying            a run of words of the prompt that is no short phrase (memory-token collapse)
    refusal            the model refuses, or says that it is an AI
    template_collapse  an answer lists options "A) ... B) ...", as if it were a test paper
    repetition         an answer goes round in a loop

A signature is a share of the answers. It means something beside the full prompt's
own share: a small model loops under any prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SIGNATURES = ("copying", "refusal", "template_collapse", "repetition")
_WORD = re.compile(r"\w+", re.UNICODE)
_COPIED_WORDS = 12
_OPENING_WORDS = 8
_RECITED_WORDS = 20
_LOOP_WORDS = 4
_LOOPED = 0.5
_MACHINE = r"an? (ai\b|artificial intelligence|language model|chatbot)"
_REFUSAL = re.compile(
    rf"\bas {_MACHINE}|\bi('| a)m (just )?{_MACHINE}"
    r"|\bi('m| am) sorry,? but i (can('|no)t|am not able)|\bi can('|no)t (assist|help) with",
    re.IGNORECASE,
)
_QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”')
_OPTIONS = re.compile(r"(^|\s)A\).+(\s)B\).+", re.DOTALL)


def signatures(answers: Sequence[str], prompt: str) -> dict[str, float]:
    """The share of `answers` with each signature; zeros where there are none."""
    if not answers:
        return dict.fromkeys(SIGNATURES, 0.0)
    phrases = _runs(_words(prompt), _COPIED_WORDS)
    found = {
        "copying": [bool(phrases & _runs(_words(answer), _COPIED_WORDS)) for answer in answers],
        "refusal": [bool(_REFUSAL.search(answer.replace("’", "'"))) for answer in answers],
        "template_collapse": [bool(_OPTIONS.search(answer)) for answer in answers],
        "repetition": [looped(answer) for answer in answers],
    }
    return {name: sum(hits) / len(answers) for name, hits in found.items()}


def recites(answer: str, prompt: str) -> bool:
    """Whether an answer gives the prompt away word for word.

    It does where it holds the prompt's first eight words (a shorter prompt's all), or
    any twenty in a row. What the prompt itself puts in quotation marks is meant to be
    said, and does not count among the twenty.
    """
    opening, said = tuple(_words(prompt)[:_OPENING_WORDS]), _words(answer)
    if opening and opening in _runs(said, len(opening)):
        return True
    spoken = _runs(said, _RECITED_WORDS)
    return any(spoken & _runs(_words(part), _RECITED_WORDS) for part in _QUOTED.split(prompt))


def looped(answer: str) -> bool:
    """Whether most runs of four words in the answer were said before in it."""
    words = _words(answer)
    runs = [tuple(words[i : i + _LOOP_WORDS]) for i in range(len(words) - _LOOP_WORDS + 1)]
    return len(runs) >= 2 * _LOOP_WORDS and 1 - len(set(runs)) / len(runs) > _LOOPED


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
