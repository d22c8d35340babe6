"""Messages of people to an assistant, written for this project: queries that fit any system prompt."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from functools import cache
from pathlib import Path

from trainer.data.queries import Query, parse_query

_FILE = Path(__file__).parent.parent / "assets" / "messages.jsonl"


@cache
def pool() -> dict[str, list[Query]]:
    """All messages by kind: identity, work, help, code, other languages, several turns, ..."""
    found: dict[str, list[Query]] = defaultdict(list)
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row.pop("kind")].append(parse_query(row))
    return dict(found)


def draw(count: int, seed: int) -> list[Query]:
    """`count` different messages, of every kind alike, in random order; all of them where `count` is larger."""
    rng = random.Random(f"pool {seed}")  # noqa: S311
    kinds = [rng.sample(messages, len(messages)) for _, messages in sorted(pool().items())]
    longest = max(map(len, kinds))
    drawn = [kind[n] for n in range(longest) for kind in kinds if n < len(kind)][:count]
    rng.shuffle(drawn)
    return drawn
