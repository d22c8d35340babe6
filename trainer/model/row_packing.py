"""Rows of different lengths in one sequence without padding: block-diagonal packing.

All products of a layer see the tokens of all rows as one matrix; only the attention
unfolds them into a padded batch, so no row reads another and each has positions of its
own. The function is registered with transformers' attention interface, as in
`trainer.model.shared_prefix`, and serves the same architectures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.shared_prefix import alike, attention_by, supports

# On the CPU the backward pass of plain products takes half the time of the fused attention's;
# above this width their W x W scores cost more memory than they save time.
_PLAIN_WIDTH = 640


@dataclass(frozen=True)
class Layout:
    """Where the tokens of B rows lie: packed [N], and padded on the right [B, W]."""

    padded_N: Tensor
    """Index into B x W of each packed token."""
    packed_BW: Tensor
    """Index into N of each padded place; that of the row's first token where there is none."""
    position_N: Tensor
    """Position of each token in its row."""
    head: Layout | None = None
    """Of a row that lies before these in the sequence. Every row sees it whole, as its own beginning."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, head: int = 0) -> Layout:
        """The layout of rows of these lengths, one behind the other, all behind a common beginning of `head` tokens."""
        length_B = torch.tensor(lengths, device=device)
        start_B = length_B.cumsum(0) - length_B
        place_W = torch.arange(max(lengths), device=device)
        filled_BW = place_W < length_B[:, None]
        packed_BW = start_B[:, None] + torch.where(filled_BW, place_W, 0)
        position_N = place_W.expand_as(filled_BW)[filled_BW]
        own = None
        if head:
            own = cls.of([head], device)
            position_N = torch.cat([own.position_N, head + position_N])
        return cls(filled_BW.flatten().nonzero()[:, 0], packed_BW, position_N, own)


class _Unfold(torch.autograd.Function):  # type: ignore[misc]
    """[N, F] to [B, W, F]. The gradient of padding is zero, so both ways are a gather."""

    @staticmethod
    def forward(ctx, rows_NF, layout):  # type: ignore[no-untyped-def]
        ctx.layout = layout
        return rows_NF.index_select(0, layout.packed_BW.flatten()).unflatten(0, layout.packed_BW.shape)

    @staticmethod
    def backward(ctx, grad_BWF):  # type: ignore[no-untyped-def]
        return grad_BWF.flatten(0, 1).index_select(0, ctx.layout.padded_N), None


class _Fold(torch.autograd.Function):  # type: ignore[misc]
    """[B, W, F] to [N, F]; padding is dropped and gets a zero gradient."""

    @staticmethod
    def forward(ctx, rows_BWF, layout):  # type: ignore[no-untyped-def]
        ctx.layout, ctx.shape = layout, rows_BWF.shape
        return rows_BWF.flatten(0, 1).index_select(0, layout.padded_N)

    @staticmethod
    def backward(ctx, grad_NF):  # type: ignore[no-untyped-def]
        found = grad_NF.new_zeros(ctx.shape).flatten(0, 1)
        return found.index_copy_(0, ctx.layout.padded_N, grad_NF).view(ctx.shape), None


def block_attention(
    query_1AND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    layout: Layout,
    scaling: float,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of A = G x R heads of each row to itself, behind a prefix if there is one; returns [1, N, A, D].

    `prefix` are the keys and values [1, G, P, D] of P positions that every row sees whole.
    """
    if layout.head is not None:
        first = len(layout.head.padded_N)
        own = query_1AND[:, :, :first], key_1GND[:, :, :first], value_1GND[:, :, :first]
        rest = query_1AND[:, :, first:], key_1GND[:, :, first:], value_1GND[:, :, first:]
        keys, values = own[1:] if prefix is None else (torch.cat(pair, 2) for pair in zip(prefix, own[1:], strict=True))
        begun = block_attention(*own, layout.head, scaling, prefix)
        return torch.cat([begun, block_attention(*rest, replace(layout, head=None), scaling, (keys, values))], 1)
    heads, groups = query_1AND.shape[1], key_1GND.shape[1]
    query, key, value = (
        _Unfold.apply(x[0].transpose(0, 1).flatten(1), layout).unflatten(2, (x.shape[1], -1)).transpose(1, 2)
        for x in (query_1AND, key_1GND, value_1GND)
    )
    batch, _, width, _ = query.shape
    if query.device.type != "cpu" or width > _PLAIN_WIDTH:
        mask = None
        if prefix is not None:
            key, value = (
                torch.cat([p.expand(batch, -1, -1, -1), x], 2) for p, x in zip(prefix, (key, value), strict=True)
            )
            mask = torch.ones(width, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - width)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        return _Fold.apply(out.transpose(1, 2).flatten(2), layout).unflatten(1, (heads, -1))[None]
    grouped = query.reshape(batch, groups, heads // groups * width, -1)
    scores = torch.matmul(grouped * scaling, key.transpose(2, 3)).reshape(batch, groups, -1, width, width)
    later_WW = torch.ones(width, width, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(later_WW, torch.finfo(scores.dtype).min)
    if prefix is not None:
        before = torch.matmul(grouped * scaling, prefix[0][0].transpose(1, 2))
        scores = torch.cat([before.reshape(batch, groups, -1, width, before.shape[-1]), scores], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype).reshape(batch, groups, -1, scores.shape[-1])
    out = torch.matmul(weights[..., -width:], value)
    if prefix is not None:
        out = out + torch.matmul(weights[..., :-width], prefix[1][0])
    out = out.reshape(batch, heads, width, -1).transpose(1, 2)
    return _Fold.apply(out.flatten(2), layout).unflatten(1, (heads, -1))[None]


def works(causal_lm: Any, rows_TH: Tensor) -> bool:
    """Whether a model gives two packed rows the states [T, H] that each has alone."""
    if not supports(causal_lm):
        return False
    half = len(rows_TH) // 2
    layout = Layout.of([half, len(rows_TH) - half], rows_TH.device)
    body = causal_lm.base_model
    with torch.no_grad():
        alone = torch.cat(
            [body(inputs_embeds=part[None], use_cache=False)[0][0] for part in rows_TH.tensor_split([half])]
        )
        try:
            with attending_in_blocks(causal_lm, layout):
                together = body(
                    inputs_embeds=rows_TH[None], position_ids=layout.position_N[None], use_cache=False
                ).last_hidden_state[0]
        except (NotImplementedError, AttributeError, ValueError, TypeError):
            # This is the question that the function answers: such a model gets padded rows.
            return False
    return alike(together, alone)


@contextmanager
def attending_in_blocks(
    causal_lm: Any, layout: Layout, prefix: Sequence[tuple[Tensor, Tensor]] | None = None
) -> Iterator[None]:
    """While open, a packed sequence [1, N, H] is attended to row by row, each behind `prefix[layer]` if it is given."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        before = None if prefix is None else prefix[module.layer_idx]
        return block_attention(query, key, value, layout, scaling, before)

    with attention_by(causal_lm, "be_packed", attend, lambda *args, **kwargs: None):
        yield
