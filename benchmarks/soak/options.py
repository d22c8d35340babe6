"""What a soak is to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.servers import ServerOptions


@dataclass(frozen=True)
class SoakOptions:
    """What to run, and how hard. The command line fills it."""

    model: str
    folder: Path
    """The model's files, to make tokens of."""
    out: Path
    servers: ServerOptions
    minutes: float = 30.0
    clients: int = 16
    tokens: int = 24
    questions: int = 4
    rows: int = 48
    kv_tokens: int = 4096
    """Tokens that the engine's KV cache holds."""
    seed: int = 0
