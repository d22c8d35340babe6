"""Options of `be-serve bench load`, as the command line fills them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.servers import ServerOptions


@dataclass(frozen=True)
class LoadOptions:
    """What to measure, and on which servers."""

    model: str
    folder: Path
    """The model's files, to make a token of."""
    out: Path
    servers: ServerOptions
    other: str = "stock"
    """`stock`, or the injection of the other server."""
    k: int = 1
    rounds: int = 200
    starts: int = 8
    """How often both servers are started anew; each time, its share of the rounds is measured."""
    warmup: int = 3
    """Rounds after each start that do not count; each token is first used there, where they suffice."""
    concurrency: int = 4
    question_tokens: int = 58
    max_tokens: int = 16
    registered: int = 100
    """Tokens that are registered, under ids of their own and with the same vectors."""
    active: int = 8
    """How many of them are asked for, in turns."""
    seed: int = 0

    @property
    def arms(self) -> tuple[str, ...]:
        return ("plain", "be", "plain_other", "again_other" if self.other == "stock" else "be_other")

    @property
    def shares(self) -> list[int]:
        """Rounds of each start: equally many, the first starts one more where they do not divide."""
        starts = min(self.starts, self.rounds)
        return [self.rounds // starts + (i < self.rounds % starts) for i in range(starts)]
