"""Batched decoding and scoring behind one shared prefix, whose keys and values are computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trainer.model.frozen import FrozenModel
from trainer.model.shared_prefix import Layers, attending_to
from trainer.model.soft_token import Row, splice

_MAX_BATCH = 64
_MAX_POSITIONS = 48_000
_LOOK = 32
"""Steps of decoding between two questions whether a row has enough."""
Progress = Callable[[int], None]
Enough = Callable[[int, Sequence[Sequence[int]]], bool]
"""Whether a row, by its number, needs no more ids; told the ids that all rows have so far."""


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
        self.shared = self.length > 0 and model.shares_prefix()

    def batch_size(self, longest: int) -> int:
        """How many sequences of `longest` further positions fit one batch."""
        return max(1, min(_MAX_BATCH, _MAX_POSITIONS // (self.length + longest)))

    @property
    def layers(self) -> Layers:
        """Keys and values [1, G, P, D] of each layer."""
        return [(layer.keys, layer.values) for layer in self._cache.layers]

    @contextmanager
    def _before(self, batch: int) -> Iterator[Any]:
        """A cache for `batch` sequences, behind the prefix while the context is open."""
        with _behind([self], [batch]) as cache:
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
        choose = _Choice(self.model, temperature, seed, stop)
        order = sorted(range(len(suffixes)), key=lambda i: len(suffixes[i]))
        size = self.batch_size(max(map(len, suffixes)) + max_new)
        made: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            rows = [suffixes[i] for i in batch]
            ids = _decode([self], [len(rows)], rows, [max_new] * len(rows), choose, progress=progress)
            made.update(zip(batch, ids, strict=True))
        return [made[i] for i in range(len(suffixes))]


def generate_beside(
    prefixes: Sequence[Prefix],
    rows: Sequence[Sequence[Sequence[int]]],
    most: Sequence[Sequence[int]],
    enough: Enough,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy ids for rows behind several prefixes of one model, decoded as one batch, in the order of the prefixes.

    `rows` and `most` hold the suffixes and the largest numbers of new ids behind each prefix. The last rows of a batch
    cost a pass over all weights for each id, however few they are: side by side, the prefixes pay for that once. Where
    the model cannot share prefixes, each has a batch of its own, in their order. `enough` is asked every `_LOOK` ids.
    """
    choose = _Choice(prefixes[0].model)
    starts = [0, *accumulate(map(len, rows))]
    made: list[list[int]] = [[] for _ in range(starts[-1])]
    together = all(prefix.shared for prefix in prefixes)
    count = len(prefixes) if together else 1
    for n in range(0, len(prefixes), count):
        some, first = slice(n, n + count), starts[n]
        suffixes = [row for own in rows[some] for row in own]
        if not suffixes:
            continue

        def has_enough(row: int, _: Sequence[Sequence[int]], first: int = first) -> bool:
            return enough(first + row, made)

        _decode(
            prefixes[some],
            [len(own) for own in rows[some]],
            suffixes,
            [limit for own in most[some] for limit in own],
            choose,
            enough=has_enough,
            made=made[first : first + len(suffixes)],  # the same lists, so that `enough` sees them grow
            progress=progress,
        )
    return made


@contextmanager
def _behind(prefixes: Sequence[Prefix], counts: Sequence[int]) -> Iterator[Any]:
    """A cache for `counts` sequences behind each prefix while the context is open; copies serve one prefix only."""
    from transformers import DynamicCache

    first = prefixes[0]
    if first.shared:
        config = first.model.causal_lm.config
        with attending_to(first.model.causal_lm, [prefix.layers for prefix in prefixes], counts):
            yield DynamicCache(config=config)
        return
    cache = copy.deepcopy(first._cache)
    if first.length:
        cache.batch_repeat_interleave(counts[0])
    yield cache


class _Choice:
    """How the next ids are chosen, and with which ids a row ends."""

    def __init__(
        self, model: FrozenModel, temperature: float = 0.0, seed: int = 0, stop: Sequence[int] | None = None
    ) -> None:
        self.stop_ids = torch.tensor(model.stop_ids() if stop is None else list(stop), device=model.device)
        self._temperature = temperature
        self._rng = torch.Generator(model.device).manual_seed(seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Ids [B]."""
        return _choose(logits_BV, self._temperature, self._rng)


def _decode(
    prefixes: Sequence[Prefix],
    counts: Sequence[int],
    suffixes: Sequence[Sequence[int]],
    most: Sequence[int],
    choose: _Choice,
    *,
    enough: Enough | None = None,
    made: list[list[int]] | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Ids for the suffixes, `counts` of them behind each prefix, at most `most` each; they are put into `made`."""
    model, live_counts = prefixes[0].model, list(counts)
    made = [[] for _ in suffixes] if made is None else made
    with torch.no_grad(), _behind(prefixes, live_counts) as cache:
        device = model.device
        width = max(map(len, suffixes))
        group = torch.arange(len(prefixes)).repeat_interleave(torch.tensor(counts))
        offset_B1 = torch.tensor([prefix.length for prefix in prefixes])[group][:, None].to(device)
        # Padded on the left, between prefix and suffix, so that all rows end together.
        mask_BT = torch.ones(len(suffixes), width, dtype=torch.long, device=device)
        ids_BT = torch.zeros(len(suffixes), width, dtype=torch.long)
        for i, suffix in enumerate(suffixes):
            mask_BT[i, : width - len(suffix)] = 0
            ids_BT[i, width - len(suffix) :] = torch.tensor(suffix)
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0) + offset_B1
        if not prefixes[0].shared:  # the cache holds the prefix then, and the mask covers what the cache holds
            mask_BT = torch.cat([mask_BT.new_ones(len(suffixes), prefixes[0].length), mask_BT], dim=1)
        rows = live = list(range(len(suffixes)))
        inputs_BTH = model.embed(ids_BT)
        for step in range(1, max(most) + 1):
            hidden_BTH = model.body(
                inputs_BTH, attention_mask=mask_BT, position_ids=position_BT, past_key_values=cache, use_cache=True
            )
            next_B = choose(model.head(hidden_BTH[:, -1]))
            for row, token in zip(rows, next_B.tolist(), strict=True):
                if row >= 0:
                    made[row].append(token)
            ended = torch.isin(next_B, choose.stop_ids).tolist()
            look = enough is not None and step % _LOOK == 0
            rows = [
                -1 if end or row < 0 or step >= most[row] or (look and enough and enough(row, made)) else row
                for row, end in zip(rows, ended, strict=True)
            ]
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
                group = group[live]
                live_counts[:] = torch.bincount(group, minlength=len(prefixes)).tolist()
                rows = [rows[i] for i in live]
                live = list(range(len(rows)))
            inputs_BTH = model.embed(next_B[:, None])
        return made


def _choose(logits_BV: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    # One random number a row, looked up in the summed probabilities: `multinomial` draws one for each entry of the
    # vocabulary. From (0, total], so that no id of probability zero is ever met.
    summed_BV = torch.softmax(logits_BV.float() / temperature, -1).cumsum_(-1)
    drawn_B1 = torch.rand(len(summed_BV), 1, generator=rng, device=summed_BV.device)
    return torch.searchsorted(summed_BV, (1 - drawn_B1) * summed_BV[:, -1:])[:, 0]
