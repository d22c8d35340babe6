"""Compare greedy answers token by token: right, tie (rounding) or wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

TIE = 0.35
"""Largest log-probability gap, in nats, that a different order of bfloat16 sums may reverse."""


@dataclass(frozen=True)
class Answer:
    """Tokens of a greedy answer, with the close alternatives at each position."""

    tokens: tuple[str, ...]
    close: tuple[frozenset[str], ...]
    """At each position: the other tokens within `TIE` of the most likely token."""


@dataclass
class Count:
    """Counts of requests by action and outcome."""

    right: Counter[str] = field(default_factory=Counter)
    """Right answers by action. The action `plain` uses no token and shows the engine's own rate of ties."""
    ties: Counter[str] = field(default_factory=Counter)
    """Answers that differ first at a token within `TIE` of the most likely one. Later tokens are not compared."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Server errors and responses that cannot be evaluated, by message."""
    attempts: Counter[str] = field(default_factory=Counter)
    """Attacks by kind."""
    succeeded: Counter[str] = field(default_factory=Counter)
    """Successful attacks by kind."""
    void: Counter[str] = field(default_factory=Counter)
    """Attacks on KV blocks that the cache had evicted before. They are not in `attempts`."""

    def judge(self, action: str, reference: Answer, got: Answer, what: dict[str, Any]) -> None:
        """Compare an answer with the reference token by token and count the outcome.

        `what` describes the request; it is stored with a wrong answer.
        """
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
    """Return the answer in a chat completion with `logprobs`. Raises LookupError or TypeError without them."""
    places = body["choices"][0]["logprobs"]["content"]
    close = [
        frozenset(one["token"] for one in place["top_logprobs"] if one["logprob"] > place["logprob"] - TIE)
        - {place["token"]}
        for place in places
    ]
    return Answer(tuple(place["token"] for place in places), tuple(close))
