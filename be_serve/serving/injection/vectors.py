"""Converts a token's vectors for injection."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from be_serve.core.artifact import Token


def prepare(token: Token, dtype: torch.dtype) -> torch.Tensor:
    """The token's vectors [k, hidden_size] in the serving dtype."""
    return torch.from_numpy(token.vectors.copy()).to(dtype)


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The vectors [k, hidden_size] of several tokens, in order."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
