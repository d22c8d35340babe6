"""Shapes of the paper's four models, and tiny shapes of the same architectures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

Case = tuple[int, int]
"""Length in tokens of the system prompt and of the question."""

PAPER_CASES: tuple[Case, ...] = ((337, 26), (1584, 58))
"""RoleLLM and GSM8K, Table 8 of arXiv 2511.23271."""
PAPER_BOUND: dict[Case, float] = {(337, 26): 13.5, (1584, 58): 27.8}
"""Table 8: upper bound of the prefill speed-up, (L_p + L_q) / (1 + L_q)."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a dense decoder, as in its config.json."""

    name: str
    config: str
    """Configuration class in transformers."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    paper: dict[Case, tuple[float, float]] = field(default_factory=dict)
    """Table 5, A100: case -> TTFT in ms with the full prompt and with [BE]."""

    @property
    def parameters(self) -> int:
        """Number of weights, without the norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        heads = 1 if self.tied else 2
        return self.layers * (attention + 3 * self.hidden * self.mlp) + heads * self.vocabulary * self.hidden


LLAMA, QWEN3 = "LlamaConfig", "Qwen3Config"
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            *("llama-3.2-1b", LLAMA, 2048, 16, 32, 8, 64, 8192, 128256, True),
            paper={(337, 26): (23.89, 19.17), (1584, 58): (27.71, 19.99)},
        ),
        Shape(
            *("llama-3.2-3b", LLAMA, 3072, 28, 24, 8, 128, 8192, 128256, True),
            paper={(337, 26): (36.61, 32.14), (1584, 58): (67.14, 32.56)},
        ),
        Shape(
            *("llama-3.1-8b", LLAMA, 4096, 32, 32, 8, 128, 14336, 128256, False),
            paper={(337, 26): (44.52, 40.25), (1584, 58): (89.67, 40.36)},
        ),
        Shape(
            *("qwen3-4b", QWEN3, 2560, 36, 32, 8, 128, 9728, 151936, True),
            paper={(337, 26): (49.91, 38.51), (1584, 58): (118.07, 47.90)},
        ),
    )
}


def tiny(shape: Shape) -> Shape:
    """Return the same architecture with 2 layers of width 64, for a trial run on a CPU.

    As in the real models, the vocabulary is larger than that of the built-in tokenizer.
    """
    return replace(shape, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=96, vocabulary=49_408, paper={})
