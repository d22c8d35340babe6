"""Words that only the prompt brings into an answer: names and numbers that nobody had to ask for.

A probe needs a question that someone wrote, with the fact that a right answer says. Any query shows as much: where
the full prompt's answer says a word of the prompt, which neither the question nor the answer without a prompt says,
the token's answer should say it, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.text import content_words, recites

WORDS_LEAST = 20
"""With fewer such words the token's share of them says nothing."""
_COMMON = 0.1
"""A word of more than this share of the answers without a prompt is any answer's word."""


@dataclass(frozen=True)
class Words:
    """Counts of the words, each once an answer.

    `n` are those that only the full prompt's answer says. `be` counts those of the `n` that the token's answer says.
    An answer may be worded otherwise and as good: `steady` are those of the `n` that are said, too, when the prompt
    has lost its punctuation, and `be_steady` counts those of the `steady` that the token's answer says.
    """

    n: int = 0
    be: int = 0
    steady: int = 0
    be_steady: int = 0

    @property
    def kept(self) -> float | None:
        """The share of the steady words that the token says; None where they are too few."""
        return self.be_steady / self.steady if self.steady >= WORDS_LEAST else None

    def to_json(self) -> dict[str, Any]:
        """`words` of `eval --json`."""
        return {"n": self.n, "be": self.be, "steady": {"n": self.steady, "be": self.be_steady}, "kept": self.kept}

    def line(self) -> str:
        """For people."""
        few = "" if self.kept is not None else f" (fewer than {WORDS_LEAST}: no share is given)"
        return (
            f"words: the token says {self.be} of the {self.n} words of the prompt that only the prompt brings into an "
            f"answer, and {self.be_steady} of the {self.steady} that it brings without its punctuation, too{few}"
        )


def brought(
    prompt: str, asked: Mapping[int, str], full: Mapping[int, str], none: Mapping[int, str]
) -> dict[int, set[str]]:
    """The words, in lower case, that only the prompt brings into each answer, by the number of its query.

    `asked` are the queries' texts, `full` and `none` the answers under the full prompt and without one. Answers that
    recite the prompt are left out, and so are words that many answers without a prompt say.
    """
    held = content_words(prompt)
    plain = {i: content_words(text) for i, text in none.items()}
    counts = Counter(word for words in plain.values() for word in words)
    common = {word for word, count in counts.items() if count > max(1, _COMMON * len(plain))}
    return {
        i: (held & content_words(text)) - common - plain[i] - content_words(asked[i])
        for i, text in full.items()
        if not recites(text, prompt)
    }


def count_words(found: Mapping[int, set[str]], be: Mapping[int, str], unmarked: Mapping[int, str]) -> Words:
    """How many of the words that `brought` found the token's answers say, and those of the prompt without its marks."""
    counts = Counter[str]()
    for i, words in found.items():
        said = content_words(be[i])
        steady = words & content_words(unmarked[i])
        counts.update(n=len(words), be=len(words & said), steady=len(steady), be_steady=len(steady & said))
    return Words(counts["n"], counts["be"], counts["steady"], counts["be_steady"])
