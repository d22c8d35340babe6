"""Path A: vectors travel with the request as vLLM prompt embeds.

A tensor [T, hidden_size] with the k rows at the slot and a mask over the token
positions goes to the engine; vLLM embeds the masked positions itself. The tensor
never leaves this process as client data: no base64, no unpickling.
"""

from __future__ import annotations

from typing import Any

import torch

from be_serve.core.artifact import Token
from be_serve.core.slots import Slot

PLACEHOLDER_ID = 0
"""The id under a row. It must be a real one: logits processors index with it."""


def prepare(token: Token, dtype: torch.dtype) -> torch.Tensor:
    """The token's vectors [k, hidden_size] in the serving dtype."""
    return torch.from_numpy(token.vectors.copy()).to(dtype)


def inject(engine_input: dict[str, Any], slot: Slot, rows: torch.Tensor) -> dict[str, Any]:
    """Turn a token input whose slot holds placeholders into vLLM's mixed embeds input.

    rows: [k, hidden_size]. Keys other than the prompt's (cache_salt, arrival_time) are kept.
    """
    ids: list[int] = engine_input["prompt_token_ids"]
    start, k = len(slot.before), rows.shape[0]
    embeds = torch.zeros(len(ids), rows.shape[1], dtype=rows.dtype)
    embeds[start : start + k] = rows
    is_token = [True] * len(ids)
    is_token[start : start + k] = [False] * k
    kept: dict[str, Any] = {key: engine_input[key] for key in ("cache_salt", "arrival_time") if key in engine_input}
    return {"type": "embeds", "prompt_embeds": embeds, "prompt_token_ids": ids, "is_token_ids": is_token, **kept}
