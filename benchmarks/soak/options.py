"""Options of `be-serve bench soak`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.servers import ServerOptions


@dataclass(frozen=True)
class SoakOptions:
    """Options of the soak: server, load and tokens."""

    model: str
    folder: Path
    """Folder of the model; needed to make tokens."""
    out: Path
    servers: ServerOptions
    minutes: float = 30.0
    clients: int = 16
    tokens: int = 24
    questions: int = 4
    rows: int = 48
    kv_tokens: int = 4096
    """Size of the engine's KV cache in tokens."""
    seed: int = 0
