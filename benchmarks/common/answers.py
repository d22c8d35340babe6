"""Greedy answers compared token by token: right, a tie of rounding, or wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

TIE = 0.35
"""Nats behind the likeliest token within which another order of sums may bring a token to the front (bfloat16)."""


@dataclass(frozen=True)
class Answer:
    """The tokens of a greedy answer, and how clear each choice was."""

    tokens: tuple[str, ...]
    close: tuple[frozenset[str], ...]
    """The other tokens within `TIE` of the likeliest, at each place."""


@dataclass
class Count:
    """What became of the requests."""

    right: Counter[str] = field(default_factory=Counter)
    """By action, as are ties: those of `plain` have nothing to do with tokens."""
    ties: Counter[str] = field(default_factory=Counter)
    """Answers that took another token within `TIE` of the likeliest; what follows cannot be compared."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Errors that are not the client's, and answers that tell nothing."""
    attempts: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    void: Counter[str] = field(default_factory=Counter)
    """Attempts on blocks that had left the cache by then: they count as not made."""

    def judge(self, action: str, reference: Answer, got: Answer, what: dict[str, Any]) -> None:
        """Compare an answer with the right one, token by token."""
        for n, right in enumerate(reference.tokens):
            ours = got.tokens[n] if n < len(got.tokens) else None
            if ours == right:
                continue
            if ours in reference.close[n]:
                self.ties[action] += 1
            else:
                self.wrong.append({**what, "at": n, "got": got.tokens, "right": reference.tokens})
            return
        if len(got.tokens) == len(reference.tokens):
            self.right[action] += 1
        else:
            self.wrong.append({**what, "at": len(reference.tokens), "got": got.tokens, "right": reference.tokens})


def answer_of(body: dict[str, Any]) -> Answer:
    places = body["choices"][0]["logprobs"]["content"]
    close = [
        frozenset(one["token"] for one in place["top_logprobs"] if one["logprob"] > place["logprob"] - TIE)
        - {place["token"]}
        for place in places
    ]
    return Answer(tuple(place["token"] for place in places), tuple(close))
