"""Batched decoding and scoring behind one shared prefix, whose keys and values are computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.model.frozen import FrozenModel
from trainer.model.shared_prefix import attending_to
from trainer.model.soft_token import Row, splice

_MAX_BATCH = 64
_MAX_POSITIONS = 48_000
Progress = Callable[[int], None]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the ids that all rows begin with; every row keeps at least one id behind it."""
    shortest, first = min(map(len, rows)), rows[0]
    length = 0
    while length < shortest - 1 and all(row[length] == first[length] for row in rows):
        length += 1
    return length


class Prefix:
    """Keys and values of rows [P, H] that stand before every sequence of a batch.

    They are read in place by all sequences where the model allows it
    (`shared_prefix`), and copied for each batch where it does not.
    """

    def __init__(self, model: FrozenModel, rows_PH: Tensor) -> None:
        from transformers import DynamicCache

        self.model = model
        self.length = len(rows_PH)
        self._cache = DynamicCache(config=model.causal_lm.config)
        if self.length:
            with torch.no_grad():
                model.body(rows_PH[None].to(model.dtype), past_key_values=self._cache, use_cache=True)
        self._shared = self.length > 0 and model.shares_prefix()

    def batch_size(self, longest: int) -> int:
        """How many sequences of `longest` further positions fit one batch."""
        return max(1, min(_MAX_BATCH, _MAX_POSITIONS // (self.length + longest)))

    @contextmanager
    def _before(self, batch: int) -> Iterator[Any]:
        """A cache for `batch` sequences, behind the prefix while the context is open."""
        from transformers import DynamicCache

        if self._shared:
            layers = [(layer.keys, layer.values) for layer in self._cache.layers]
            with attending_to(self.model.causal_lm, layers):
                yield DynamicCache(config=self.model.causal_lm.config)
            return
        cache = copy.deepcopy(self._cache)
        if self.length:
            cache.batch_repeat_interleave(batch)
        yield cache

    def states(self, rows: Sequence[Row], progress: Progress | None = None) -> list[Tensor]:
        """Final hidden states [T, H] that predict each row's response ids."""
        with torch.no_grad():
            order = sorted(range(len(rows)), key=lambda i: rows[i].length(0))
            size = self.batch_size(max(row.length(0) for row in rows))
            found: dict[int, Tensor] = {}
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                inputs_BTH, scored_N = splice(self.model, [rows[i] for i in batch], None)
                position_1T = torch.arange(inputs_BTH.shape[1], device=self.model.device)[None] + self.length
                with self._before(len(batch)) as cache:
                    hidden_BTH = self.model.body(
                        inputs_BTH, position_ids=position_1T, past_key_values=cache, use_cache=True
                    )
                flat_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[scored_N]
                found.update(zip(batch, flat_NH.split([len(rows[i].response) for i in batch]), strict=True))
                if progress:
                    progress(len(batch))
            return [found[i] for i in range(len(rows))]

    def generate(
        self,
        suffixes: Sequence[Sequence[int]],
        max_new: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Up to `max_new` ids for each suffix, the stop id included where one was reached.

        Greedy at temperature 0, else sampled; the same seed and inputs give the same ids.
        """
        stop_ids = torch.tensor(self.model.stop_ids() if stop is None else list(stop), device=self.model.device)
        rng = torch.Generator(self.model.device).manual_seed(seed)
        order = sorted(range(len(suffixes)), key=lambda i: len(suffixes[i]))
        size = self.batch_size(max(map(len, suffixes)) + max_new)
        made: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            with self._before(len(batch)) as cache:
                ids = self._decode([suffixes[i] for i in batch], cache, max_new, temperature, rng, stop_ids, progress)
            made.update(zip(batch, ids, strict=True))
        return [made[i] for i in range(len(suffixes))]

    def _decode(
        self,
        suffixes: Sequence[Sequence[int]],
        cache: Any,
        max_new: int,
        temperature: float,
        rng: torch.Generator,
        stop_ids: Tensor,
        progress: Progress | None,
    ) -> list[list[int]]:
        with torch.no_grad():
            device = self.model.device
            width = max(map(len, suffixes))
            # Padded on the left, between prefix and suffix, so that all rows end together.
            mask_BT = torch.ones(len(suffixes), self.length + width, dtype=torch.long, device=device)
            ids_BT = torch.zeros(len(suffixes), width, dtype=torch.long)
            for i, suffix in enumerate(suffixes):
                mask_BT[i, self.length : self.length + width - len(suffix)] = 0
                ids_BT[i, width - len(suffix) :] = torch.tensor(suffix)
            position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, self.length :]
            if self._shared:  # the cache holds no prefix then, and the mask covers what the cache holds
                mask_BT = mask_BT[:, self.length :]
            rows = live = list(range(len(suffixes)))
            made: list[list[int]] = [[] for _ in suffixes]
            inputs_BTH = self.model.embed(ids_BT)
            for _ in range(max_new):
                hidden_BTH = self.model.body(
                    inputs_BTH, attention_mask=mask_BT, position_ids=position_BT, past_key_values=cache, use_cache=True
                )
                next_B = _choose(self.model.head(hidden_BTH[:, -1]), temperature, rng)
                for row, token in zip(rows, next_B.tolist(), strict=True):
                    if row >= 0:
                        made[row].append(token)
                ended = torch.isin(next_B, stop_ids).tolist()
                rows = [-1 if end else row for row, end in zip(rows, ended, strict=True)]
                before, live = len(live), [i for i, row in enumerate(rows) if row >= 0]
                if progress and len(live) < before:
                    progress(before - len(live))  # a long batch would stand still otherwise
                if not live:
                    break
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
                position_BT = position_BT[:, -1:] + 1
                if len(live) <= len(rows) // 2:  # finished rows cost as much as others: drop them
                    keep = torch.tensor(live, device=device)
                    cache.batch_select_indices(keep)
                    mask_BT, position_BT, next_B = mask_BT[keep], position_BT[keep], next_B[keep]
                    rows = [rows[i] for i in live]
                    live = list(range(len(rows)))
                inputs_BTH = self.model.embed(next_B[:, None])
            if progress and live:
                progress(len(live))
            return made


def _choose(logits_BV: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    # One random number a row, looked up in the summed probabilities: `multinomial` draws one for each entry of the
    # vocabulary. From (0, total], so that no id of probability zero is ever met.
    summed_BV = torch.softmax(logits_BV.float() / temperature, -1).cumsum_(-1)
    drawn_B1 = torch.rand(len(summed_BV), 1, generator=rng, device=summed_BV.device)
    return torch.searchsorted(summed_BV, (1 - drawn_B1) * summed_BV[:, -1:])[:, 0]
