"""The trainable vectors and their splice into a model's input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from trainer.model.frozen import FrozenModel
from trainer.model.row_packing import Layout, attending_in_blocks

_COMMON_LEAST = 32
"""Positions at the beginning of all rows from which on it pays to compute them once."""


class SoftToken:
    """k vectors as a float32 master parameter [k, H], cast where they enter the model.

    bfloat16's spacing near 1 is 7.8e-3: small updates would vanish in it.
    """

    def __init__(self, start_KH: Tensor) -> None:
        self.parameters = {"vectors": nn.Parameter(start_KH.detach().to(torch.float32).clone())}

    @property
    def vectors(self) -> Tensor:
        """The vectors [k, H] as they enter the model."""
        return self.parameters["vectors"]


class LowRankToken(SoftToken):
    """The over-parameterisation e = W z + b, with a W [r, H] common to the k vectors (arXiv 2607.21231).

    z starts at zero and b at the start, so the first step sees the start itself.
    """

    def __init__(self, start_KH: Tensor, rank: int, seed: int = 0) -> None:
        super().__init__(start_KH)
        rng = torch.Generator().manual_seed(seed)
        basis_RH = torch.randn(rank, start_KH.shape[1], generator=rng) / rank**0.5
        self.parameters["basis"] = nn.Parameter(basis_RH.to(start_KH.device))
        self.parameters["mix"] = nn.Parameter(torch.zeros(len(start_KH), rank, device=start_KH.device))

    @property
    def vectors(self) -> Tensor:
        return self.parameters["vectors"] + self.parameters["mix"] @ self.parameters["basis"]


class MixedToken(SoftToken):
    """Literal places, which stay as they are, before learned ones.

    Words are read as a text is read: what follows them can refer to them.
    """

    def __init__(self, literal_LH: Tensor, learned: SoftToken) -> None:
        self.literal_LH = literal_LH.detach().to(torch.float32)
        self.learned = learned
        self.parameters = learned.parameters

    @property
    def vectors(self) -> Tensor:
        """The vectors [L + K, H] as they enter the model."""
        return torch.cat([self.literal_LH, self.learned.vectors])


def soft_token(start_KH: Tensor, rank: int, seed: int = 0, literal_LH: Tensor | None = None) -> SoftToken:
    """A token at `start_KH`, over-parameterised where `rank` is not 0, behind literal places if there are any."""
    learned = LowRankToken(start_KH, rank, seed) if rank else SoftToken(start_KH)
    return learned if literal_LH is None or not len(literal_LH) else MixedToken(literal_LH, learned)


@dataclass(frozen=True)
class Row:
    """One input: ids before the vectors, ids after them, and the response that is scored.

    With no vectors (k = 0) it is a plain sequence of ids.
    """

    before: Sequence[int]
    after: Sequence[int]
    response: Sequence[int]
    at_once: bool = False
    """One-step generation: vector i itself predicts response id i, and nothing of the response is fed."""

    def length(self, k: int) -> int:
        """Positions fed to the model: the response's last id is predicted, never fed."""
        if self.at_once:
            return len(self.before) + k + len(self.after)
        return len(self.before) + k + len(self.after) + max(len(self.response) - 1, 0)


@dataclass(frozen=True)
class Context:
    """Rows [P, H] that stand before every row of a batch and get no gradient: their keys and values are made once."""

    rows_PH: Tensor
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values [1, G, P, D] of each layer."""

    @classmethod
    def of(cls, model: FrozenModel, rows_PH: Tensor) -> Context:
        """The context of a model that packs rows (`FrozenModel.packs_rows`)."""
        from transformers import DynamicCache

        rows_PH = rows_PH.detach().to(model.device, model.dtype)
        cache = DynamicCache(config=model.causal_lm.config)
        with torch.no_grad():
            model.body(rows_PH[None], past_key_values=cache, use_cache=True)
        return cls(rows_PH, [(layer.keys, layer.values) for layer in cache.layers])


Vectors: TypeAlias = Tensor | Sequence[Tensor]
"""One set of vectors [k, H] for all rows, or a set for each row; k may differ from row to row."""


def splice(model: FrozenModel, rows: Sequence[Row], vectors: Vectors | None) -> tuple[Tensor, Tensor]:
    """Build `inputs_embeds` [B, T, H], padded on the right, and the flat positions of the scored states.

    Position i of the second result, [N], indexes [B * T]: the states that predict each
    response id, row by row. Under a causal mask the padding behind a row changes
    nothing before it, so no attention mask is needed.
    """
    each = _for_each(vectors, len(rows))
    width = max(row.length(_count(own)) for row, own in zip(rows, each, strict=True))
    inputs_NH, scored_N = _lay(model, rows, each, [i * width for i in range(len(rows))], len(rows) * width)
    return inputs_NH.unflatten(0, (len(rows), width)), scored_N


def _lay(
    model: FrozenModel, rows: Sequence[Row], each: Sequence[Tensor | None], starts: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """Inputs [size, H] with row i from `starts[i]` on, and the positions of the scored states."""
    ids_N = torch.zeros(size, dtype=torch.long)
    scored: list[int] = []
    replaced: list[int] = []
    for row, own, start in zip(rows, each, starts, strict=True):
        k = _count(own)
        fed = [*row.before, *([0] * k), *row.after, *(() if row.at_once else row.response[:-1])]
        ids_N[start : start + len(fed)] = torch.tensor(fed)
        slot = start + len(row.before)
        replaced.extend(range(slot, slot + k))
        first = slot if row.at_once else slot + k + len(row.after) - 1
        scored.extend(range(first, first + len(row.response)))
    inputs_NH = model.embed(ids_N)
    if replaced:
        source = torch.cat([own.to(inputs_NH.dtype) for own in each if own is not None])
        inputs_NH = inputs_NH.index_copy(0, torch.tensor(replaced, device=model.device), source)
    return inputs_NH, torch.tensor(scored, device=model.device)


def _common_beginning(rows: Sequence[Row], each: Sequence[Tensor | None]) -> int:
    """Positions with which all rows begin: ids and the same vectors. 0 for few, or a single row."""
    first, own = rows[0], each[0]
    if len(rows) < 2 or own is None or any(row.at_once or not row.after for row in rows):
        return 0
    same = all(row.before == first.before for row in rows) and all(other is own for other in each)
    length = len(first.before) + len(own)
    return length if same and length >= _COMMON_LEAST else 0


def _count(own: Tensor | None) -> int:
    return 0 if own is None else len(own)


def _for_each(vectors: Vectors | None, rows: int) -> Sequence[Tensor | None]:
    if vectors is None:
        return [None] * rows
    return [vectors] * rows if isinstance(vectors, Tensor) and vectors.dim() == 2 else list(vectors)


def scored_states(
    model: FrozenModel,
    rows: Sequence[Row],
    vectors: Vectors | None,
    *,
    context: Context | None = None,
    checkpointed: bool = False,
) -> Tensor:
    """Final hidden states [N, H] at the positions that predict the rows' responses.

    Several rows go through the model as one packed sequence, where it can be done, all of them behind `context`.
    `checkpointed`: padded rows, whose layers are computed again in the backward pass.
    """
    if checkpointed:
        if context is not None:  # computed again in the backward pass, the layers would not find it
            vectors = [
                context.rows_PH if own is None else torch.cat([context.rows_PH.to(own.dtype), own])
                for own in _for_each(vectors, len(rows))
            ]
        inputs_BTH, scored_N = splice(model, rows, vectors)
        with model.checkpointed():
            hidden_BTH = model.body(inputs_BTH)
        return hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[scored_N]
    if context is not None or (len(rows) > 1 and model.packs_rows()):
        each = _for_each(vectors, len(rows))
        head = _common_beginning(rows, each)
        if head:  # computed once, and its gradient with it
            rows = [Row(rows[0].before, (), ()), *(replace(row, before=()) for row in rows)]
            each = [each[0], *([None] * (len(rows) - 1))]
        lengths = [row.length(_count(own)) for row, own in zip(rows, each, strict=True)]
        starts = [0, *itertools.accumulate(lengths)]
        inputs_NH, scored_N = _lay(model, rows, each, starts[:-1], starts[-1])
        layout = Layout.of(lengths[1:] if head else lengths, model.device, head)
        layers = None if context is None else context.layers
        position_N = layout.position_N + (0 if context is None else len(context.rows_PH))
        with attending_in_blocks(model.causal_lm, layout, layers):
            return model.body(inputs_NH[None], position_ids=position_N[None])[0][scored_N]
    inputs_BTH, scored_N = splice(model, rows, vectors)
    with model.fast_backward(inputs_BTH.shape[1]):
        hidden_BTH = model.body(inputs_BTH)
    # Indexed to a contiguous matrix first: a sliced 3-D tensor makes the head's product a slow batched one.
    return hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[scored_N]
