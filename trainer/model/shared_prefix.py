"""Attention that reads one prefix for a whole batch, in place of a copy of its keys and values for each row.

With the prompt as prefix, copying is most of the work of a decoding step. The
function is registered with transformers' attention interface, so it serves every
architecture that uses the interface with full attention in all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

Attend = Callable[[Any, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""Output [B, T, A, D] of a layer's module, its query, key, value, mask and scaling."""
Layers: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [1, G, P, D] of each layer."""
# Options of an attention call that this function does not implement.
_UNKNOWN = ("s_aux", "softcap", "sinks", "position_bias")


def works(causal_lm: Any, rows_TH: Tensor) -> bool:
    """Whether a model gives the same states [T, H] behind a shared prefix as with a prefix of its own."""
    from transformers import DynamicCache

    if not supports(causal_lm):
        return False
    half = len(rows_TH) // 2
    positions = torch.arange(half, len(rows_TH), device=rows_TH.device)[None]
    body, config = causal_lm.base_model, causal_lm.config
    with torch.no_grad():
        cache = DynamicCache(config=config)
        body(inputs_embeds=rows_TH[None, :half], past_key_values=cache, use_cache=True)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        whole = body(inputs_embeds=rows_TH[None], use_cache=False).last_hidden_state[:, half:]
        try:
            with attending_to(causal_lm, [layers], [2]):
                shared = body(
                    inputs_embeds=rows_TH[None, half:].expand(2, -1, -1),
                    position_ids=positions,
                    past_key_values=DynamicCache(config=config),
                    use_cache=True,
                ).last_hidden_state
        except (NotImplementedError, AttributeError, ValueError, TypeError):
            # This is the question that the function answers: such a model gets a copy of the prefix for each row.
            return False
    return alike(shared, whole.expand(2, -1, -1))


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two results of the same computation in another order agree, as a whole.

    In bfloat16 rounding alone moved single states by a tenth of the largest, and the whole by
    a sixth, where the ids made no text. A row that reads another's tokens moves it by two thirds.
    """
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    return bool(difference < 0.3)


def supports(causal_lm: Any) -> bool:
    """Whether every layer reads all positions, through the attention interface."""
    config = causal_lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return bool(getattr(causal_lm, "_supports_attention_backend", False)) and kinds == {"full_attention"} and not window


@contextmanager
def attention_by(causal_lm: Any, name: str, attend: Attend, mask: Callable[..., Any]) -> Iterator[None]:
    """While open, every layer of the model attends by `attend`; `mask` makes what it gets as mask.

    A layer whose attention has options that plain attention has not raises NotImplementedError.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def plain(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if any(kwargs.get(option) is not None for option in _UNKNOWN):
            # No stub: `works` takes this as its no, and an answer without these options would be wrong.
            raise NotImplementedError(f"{type(module).__name__} needs more than plain attention")
        return attend(module, query, key, value, mask, scaling), None

    AttentionInterface.register(name, plain)
    AttentionMaskInterface.register(name, mask)
    before = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation(name)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(before)


@contextmanager
def attending_to(causal_lm: Any, prefixes: Sequence[Layers], rows: Sequence[int]) -> Iterator[None]:
    """While open, each layer of the model also reads the layer's keys and values in the prefix of each row.

    The first `rows[0]` rows of a batch stand behind the first prefix, the next `rows[1]` behind the second, and so
    on. `rows` is read anew in each layer: who drops rows from a batch counts them there.
    """
    from transformers.masking_utils import eager_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        own = zip(
            prefixes,
            query.split(list(rows)),
            key.split(list(rows)),
            value.split(list(rows)),
            # A mask may be one for all rows.
            [mask] * len(rows) if mask is None or len(mask) == 1 else mask.split(list(rows)),
            strict=True,
        )
        found = []
        for prefix, queries, keys, values, masks in own:
            if len(queries):
                prefix_keys, prefix_values = prefix[module.layer_idx]
                found.append(shared_attention(queries, keys, values, masks, prefix_keys, prefix_values, scaling))
        return torch.cat(found)

    with attention_by(causal_lm, "be_shared_prefix", attend, eager_mask):
        yield


def shared_attention(
    query_BATD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask_B1TS: Tensor | None,
    prefix_key_1GPD: Tensor,
    prefix_value_1GPD: Tensor,
    scaling: float,
) -> Tensor:
    """Attention of A = G x R query heads over the prefix (seen whole) and each row's own S positions.

    Returns [B, T, A, D]. The prefix costs one product for the whole batch.
    """
    batch, heads, length, width = query_BATD.shape
    groups, own, shared = key_BGSD.shape[1], key_BGSD.shape[2], prefix_key_1GPD.shape[2]
    repeats = heads // groups
    # Scaled here, where it is small. A softmax adds up in float32 whatever its dtype, so the scores stay as they are:
    # they are most of what a decoding step writes.
    grouped = (query_BATD * scaling).reshape(batch, groups, repeats * length, width)
    # [G, B R T, D]: all rows side by side before the one prefix.
    joined = grouped.transpose(0, 1).reshape(groups, batch * repeats * length, width)
    prefix_scores = torch.matmul(joined, prefix_key_1GPD[0].transpose(1, 2))
    prefix_scores = prefix_scores.reshape(groups, batch, repeats, length, shared).transpose(0, 1)
    own_scores = torch.matmul(grouped, key_BGSD.transpose(2, 3)).reshape(batch, groups, repeats, length, own)
    if mask_B1TS is not None:
        own_scores = own_scores + mask_B1TS[:, :, None, :, :own].to(own_scores.dtype)
    weights = torch.softmax(torch.cat([prefix_scores, own_scores], dim=-1), dim=-1)
    of_prefix, of_own = weights.split([shared, own], dim=-1)
    joined_weights = of_prefix.transpose(0, 1).reshape(groups, batch * repeats * length, shared)
    read = torch.matmul(joined_weights, prefix_value_1GPD[0]).reshape(groups, batch, repeats * length, width)
    out = read.transpose(0, 1) + torch.matmul(of_own.reshape(batch, groups, repeats * length, own), value_BGSD)
    return out.reshape(batch, heads, length, width).transpose(1, 2).contiguous()
