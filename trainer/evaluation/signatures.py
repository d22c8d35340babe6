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

from trainer.text import runs, words_of

SIGNATURES = ("copying", "refusal", "template_collapse", "repetition")
_COPIED_WORDS = 12
_LOOP_WORDS = 4
_LOOPED = 0.5
_TAIL_WORDS = 40
_PERIOD, _ROUND = 40, 60
_MACHINE = r"an? (ai\b|artificial intelligence|language model|chatbot)"
_REFUSAL = re.compile(
    rf"\bas {_MACHINE}|\bi('| a)m (just )?{_MACHINE}"
    r"|\bi('m| am) sorry,? but i (can('|no)t|am not able)|\bi can('|no)t (assist|help) with",
    re.IGNORECASE,
)
_OPTIONS = re.compile(r"(^|\s)A\).+(\s)B\).+", re.DOTALL)


def signatures(answers: Sequence[str], prompt: str) -> dict[str, float]:
    """The share of `answers` with each signature; zeros where there are none."""
    if not answers:
        return dict.fromkeys(SIGNATURES, 0.0)
    phrases = runs(words_of(prompt), _COPIED_WORDS)
    found = {
        "copying": [bool(phrases & runs(words_of(answer), _COPIED_WORDS)) for answer in answers],
        "refusal": [bool(_REFUSAL.search(answer.replace("’", "'"))) for answer in answers],
        "template_collapse": [bool(_OPTIONS.search(answer)) for answer in answers],
        "repetition": [looped(answer) for answer in answers],
    }
    return {name: sum(hits) / len(answers) for name, hits in found.items()}


def looped(answer: str) -> bool:
    """Whether most runs of four words in the answer were said before in it."""
    words = words_of(answer)
    said = [tuple(words[i : i + _LOOP_WORDS]) for i in range(len(words) - _LOOP_WORDS + 1)]
    return len(said) >= 2 * _LOOP_WORDS and 1 - len(set(said)) / len(said) > _LOOPED


def goes_round(ids: Sequence[int]) -> bool:
    """Whether the last ids are one run of at most `_PERIOD` ids, over and over: three times, and `_ROUND` ids long."""
    for period in range(1, _PERIOD + 1):
        length = max(3 * period, _ROUND)
        tail = ids[-length:]
        if len(tail) == length and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False


def ends_in_loop(answer: str) -> bool:
    """Whether an answer loops as a whole, or most runs of four words in its last 40 words were said before in it.

    Half of a long answer may be sound before it begins to go round: `looped` does not see that.
    """
    words = words_of(answer)
    if len(words) < _TAIL_WORDS:
        return looped(answer)
    said: set[tuple[str, ...]] = set()
    repeated = []
    for i in range(len(words) - _LOOP_WORDS + 1):
        run = tuple(words[i : i + _LOOP_WORDS])
        repeated.append(run in said)
        said.add(run)
    tail = repeated[-(_TAIL_WORDS - _LOOP_WORDS + 1) :]
    return looped(answer) or sum(tail) / len(tail) > _LOOPED
