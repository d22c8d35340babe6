"""What can be read in a token's vectors: the words of the prompt that their nearest embeddings are.

Training moves a vector far from where it began, and the word that it began as stays its nearest embedding: of 57
places begun at words of a prompt, all were read back after 240 steps
(docs/results/2026-11-27-literal-places). It is the simplest attack, so the count is a least one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.model.frozen import FrozenModel

_ROWS = 16_384  # of the embedding matrix, converted to float32 at a time


def nearest_words(model: FrozenModel, vectors_KH: Tensor) -> list[int]:
    """The token id [K] whose embedding has the highest cosine with each vector [K, H]."""
    directions_KH = normalize(vectors_KH.to(model.device, torch.float32), dim=-1)
    best_K = torch.full((len(vectors_KH),), -2.0, device=model.device)
    found_K = torch.zeros(len(vectors_KH), dtype=torch.long, device=model.device)
    with torch.no_grad():
        for begin in range(0, model.vocab_size, _ROWS):
            rows_NH = normalize(model.embedding.weight[begin : begin + _ROWS].float(), dim=-1)
            cosine_K, at_K = (directions_KH @ rows_NH.T).max(-1)
            better_K = cosine_K > best_K
            best_K, found_K = torch.where(better_K, cosine_K, best_K), torch.where(better_K, begin + at_K, found_K)
    return [int(token) for token in found_K]


def readable(model: FrozenModel, vectors_KH: Tensor, prompt_ids: Sequence[int]) -> int:
    """How many vectors [K, H] have a word of the prompt as their nearest embedding."""
    decode = model.tokenizer.decode

    def word(token: int) -> str:
        return str(decode([token])).strip().lower()

    held = {text for text in map(word, set(prompt_ids)) if any(c.isalnum() for c in text)}
    return sum(word(token) in held for token in nearest_words(model, vectors_KH))
