"""Options of `be-serve bench load`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.servers import ServerOptions


@dataclass(frozen=True)
class LoadOptions:
    """Options of the load benchmark: servers, bursts and tokens."""

    model: str
    folder: Path
    """Folder of the model; needed to make a token."""
    out: Path
    servers: ServerOptions
    other: str = "stock"
    """`stock` for stock vLLM, or the injection of the other plugin server."""
    k: int = 1
    rounds: int = 200
    starts: int = 8
    """Number of starts of both servers. The rounds are divided among the starts."""
    warmup: int = 3
    """Untimed rounds after each start. Enough of them use every active token once before the timed rounds."""
    concurrency: int = 4
    """Chats in a burst."""
    question_tokens: int = 58
    max_tokens: int = 16
    registered: int = 100
    """Number of registered tokens. They have different ids and equal vectors."""
    active: int = 8
    """Number of these tokens that the chats use in turn."""
    seed: int = 0

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms."""
        return ("plain", "be", "plain_other", "again_other" if self.other == "stock" else "be_other")

    @property
    def shares(self) -> list[int]:
        """Number of rounds for each start. Without an even division, the first starts get one more."""
        starts = min(self.starts, self.rounds)
        return [self.rounds // starts + (i < self.rounds % starts) for i in range(starts)]
