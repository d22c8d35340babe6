"""Injection `prompt-embeds`: each request sends its vectors to the engine, as vLLM prompt embeds.

The engine gets a tensor [T, hidden_size] with the k vectors in the slot, and a mask of the positions that
are ordinary tokens. vLLM embeds those positions itself. The tensor is built in this process and never comes
from a client, so nothing is decoded from base64 or unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from be_serve.core.errors import TooLarge, UnsupportedRequest
from be_serve.core.slots import Slot
from be_serve.serving.injection.byte_budget import ByteBudget
from be_serve.serving.injection.vectors import join
from be_serve.serving.requests import refuse_raw_embeddings

PLACEHOLDER_ID = 0
"""The id at the position of a vector. It must be in the vocabulary, because logits processors index with it."""


def mixed(slot: Slot, vectors: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """A tensor [T, hidden_size] with the vectors [k, hidden_size] in the slot, and a mask [T]: True for a token id."""
    start, k = len(slot.before), len(vectors)
    length = start + k + len(slot.after)
    embeds = torch.zeros(length, vectors.shape[1], dtype=vectors.dtype)
    embeds[start : start + k] = vectors
    return embeds, [not start <= i < start + k for i in range(length)]


class HeldVectors:
    """The vectors [k, hidden_size] of one request, and the memory of its tensors.

    vLLM sends an embeds prompt to the engine once for each of the request's `choices`.
    """

    def __init__(self, vectors: torch.Tensor, budget: ByteBudget, choices: int = 1) -> None:
        self.vectors = vectors
        self._budget = budget
        self._choices = choices
        self._size = 0
        self._released = False

    def claim(self, tensor_bytes: int) -> None:
        """Claim the bytes of one more tensor. Raises OverBudget, or TooLarge for a request that can never fit."""
        if self._released:
            raise UnsupportedRequest("The request ended before its chat was rendered; send it again.")
        size = tensor_bytes * self._choices
        if self._size + size > self._budget.capacity:
            raise TooLarge(
                f"The request needs {self._size + size} bytes of embeddings; this server process allows "
                f"{self._budget.capacity} for all requests. Send less. Operators: raise --be-inflight-bytes."
            )
        self._budget.take(size)
        self._size += size

    def release(self) -> None:
        self._budget.give_back(self._size)
        self._size, self._released = 0, True


class PromptEmbeds:
    """Injection `prompt-embeds`."""

    name = "prompt-embeds"
    capacity = None
    beside_media = False
    outlasts_request = False

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget

    def check(self, messages: Any, tools: Any) -> None:
        refuse_raw_embeddings(messages, tools)

    async def hold(
        self, parts: Sequence[tuple[str, torch.Tensor]], *, wait: bool = True, choices: int = 1
    ) -> HeldVectors:
        return HeldVectors(join([vectors for _, vectors in parts]), self._budget, choices)

    def inject(self, engine_input: dict[str, Any], slot: Slot, held: HeldVectors) -> dict[str, Any]:
        """vLLM's mixed embeds input. Keeps the keys cache_salt and arrival_time of `engine_input`."""
        ids: list[int] = engine_input["prompt_token_ids"]
        held.claim(len(ids) * held.vectors[0].nbytes)
        embeds, is_token = mixed(slot, held.vectors)
        kept: dict[str, Any] = {key: engine_input[key] for key in ("cache_salt", "arrival_time") if key in engine_input}
        return {"type": "embeds", "prompt_embeds": embeds, "prompt_token_ids": ids, "is_token_ids": is_token, **kept}
