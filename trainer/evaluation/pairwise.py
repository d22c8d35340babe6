"""A judge model compares answers in pairs: the token's against the full prompt's, and against those without a prompt.

Each pair is shown in both orders. A preference counts where both orders agree;
else the pair is a tie, for models prefer a place (Zheng et al., arXiv 2306.05685).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.data.chat_server import Endpoint
from trainer.model.generate import Progress

JUDGE_KEY = "BE_JUDGE_KEY"
RIVALS = ("full", "none")
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_SYSTEM = (
    "You compare two answers, A and B, that an assistant gave to the same user message. The assistant had to follow "
    "the instructions shown to you. Decide which answer follows them better: role, tone, rules, wording and facts "
    "taken from the instructions. Do not reward length or the order of the answers. Give one sentence of reason, then "
    "a last line that holds [[A]], [[B]], or [[C]] if neither is better."
)
_QUESTION = (
    "# Instructions to the assistant\n{prompt}\n\n# User message\n{query}\n\n"
    "# Answer A\n{a}\n\n# Answer B\n{b}\n\nWhich answer follows the instructions better?"
)


@dataclass(frozen=True)
class Tally:
    """How the token fared against a rival, in answers to the same queries."""

    wins: int
    ties: int
    losses: int
    unreadable: int
    """Pairs of which a verdict could not be read; they count nowhere else."""

    @property
    def score(self) -> float | None:
        """Wins plus half the ties, over the readable pairs; .5 is no difference."""
        readable = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / readable if readable else None

    def to_json(self) -> dict[str, Any]:
        """Part of `eval --json`."""
        return {**asdict(self), "score": self.score}


def judge_pairs(
    server: Endpoint, prompt: str, samples: Sequence[Mapping[str, str]], progress: Progress | None = None
) -> dict[str, Tally]:
    """The token's tally against each rival; `samples` are `Evaluation.samples`.

    The judge is sent the prompt's text. Raises InputError where it cannot be reached or refuses.
    """

    def ask(case: tuple[str, Mapping[str, str], bool]) -> str | None:
        rival, sample, swapped = case
        a, b = (sample[rival], sample["be"]) if swapped else (sample["be"], sample[rival])
        question = _QUESTION.format(prompt=prompt, query=sample["query"], a=a, b=b)
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        answer = server.chat(messages, {"max_tokens": 256, "temperature": 0.0})
        if progress:
            progress(1)
        return _winner(answer.text, swapped)

    cases = [(rival, sample, swapped) for rival in RIVALS for sample in samples for swapped in (False, True)]
    verdicts = server.each(ask, cases)
    pairs = list(zip(verdicts[::2], verdicts[1::2], strict=True))
    return {rival: _tally(pairs[i * len(samples) : (i + 1) * len(samples)]) for i, rival in enumerate(RIVALS)}


def _winner(answer: str, swapped: bool) -> str | None:
    """`be`, `rival` or `tie`; None where the answer holds no verdict, or several that differ."""
    found = set(_VERDICT.findall(answer))
    if len(found) != 1:
        return None
    letter = found.pop()
    return "tie" if letter == "C" else "be" if (letter == "A") != swapped else "rival"


def _tally(pairs: Sequence[tuple[str | None, str | None]]) -> Tally:
    counts = Counter("unreadable" if None in pair else pair[0] if pair[0] == pair[1] else "tie" for pair in pairs)
    return Tally(counts["be"], counts["tie"], counts["rival"], counts["unreadable"])
