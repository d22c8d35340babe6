"""Packs of short samples for [AE] pre-training: at random, or of related texts by threshold filtering.

Threshold Filtering Packing (arXiv 2408.09327) walks through the samples: from a
random one always to the nearest that was not visited and is no near-copy of those
in the pack. The path is cut at the pack's length. No mask separates the samples of
a pack. Samples are compared by the centred means of their input embeddings, which
need no second model (the paper's choice of embedding is open).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.frozen import FrozenModel

THRESHOLD = 0.3
"""Cosine distance; nearer samples count as copies."""


def sample_vectors(model: FrozenModel, samples: Sequence[Sequence[int]]) -> Tensor:
    """A unit vector [S, H] for each sample (ids)."""
    means_SH = torch.stack([model.embed(ids).float().mean(0) for ids in samples])
    return F.normalize(means_SH - means_SH.mean(0), dim=-1)


def filtered_path(vectors_SH: Tensor, pack: int, threshold: float, rng: torch.Generator) -> list[int]:
    """Every sample once: the nearest first whose distance to the current pack's samples exceeds `threshold`.

    Where none is far enough the farthest is taken, so no sample is lost.
    """
    count = len(vectors_SH)
    at = int(torch.randint(count, (1,), generator=rng))
    path, free = [at], torch.ones(count, dtype=torch.bool)
    free[at] = False
    while len(path) < count:
        recent = path[-(len(path) % pack or pack) :]
        distance_SR = 1 - vectors_SH @ vectors_SH[recent].T
        nearest_S, last_S = distance_SR.amin(1), distance_SR[:, -1]
        allowed = free & (nearest_S > threshold)
        if bool(allowed.any()):
            at = int(last_S.masked_fill(~allowed, torch.inf).argmin())
        else:
            at = int(nearest_S.masked_fill(~free, -torch.inf).argmax())
        free[at] = False
        path.append(at)
    return path


def packed(samples: Sequence[Sequence[int]], order: Sequence[int], pack: int) -> list[list[int]]:
    """Packs of `pack` samples, in the given order; an incomplete last one is left out."""
    whole = len(order) // pack * pack
    return [[t for i in order[start : start + pack] for t in samples[i]] for start in range(0, whole, pack)]
