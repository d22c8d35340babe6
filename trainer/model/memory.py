"""How much memory the phases of training take: estimates from a model's shapes, and what the device has free.

The estimates count tensors that live at the same time. `tests/unit/trainer/test_memory.py`
holds them against the measured peaks of a process.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Limit = Callable[[int], int]
"""Most positions of one forward and backward pass, for rows of a given width."""

# The attention's scores are kept below this width on a CPU (`fast_backward`, `row_packing`).
_KEPT_SCORES_WIDTH = 640
_HEAD_CHUNK = 256
# float32 tensors [256, V] that live at once while a loss, or an evaluation's figures, are computed from states.
_LOSS_TENSORS = 8
_SCORE_TENSORS = 5
# Share of the free memory that one pass may fill: other processes grow, and allocators leave gaps.
_FILL = 0.7
_LEAST_POSITIONS = 64
# What libraries take beside tensors once they work: thread buffers, packed weights.
_BESIDE = 24 << 20
_CHECKPOINT_FACTOR = 3
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class MemoryModel:
    """Estimated bytes of what training holds, for one model on one kind of device.

    memory = MemoryModel.of(causal_lm)
    memory.step(positions=512, width=256)
    """

    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward layer that one position goes through."""
    heads: int
    groups: int
    head_width: int
    vocab: int
    item: int
    """Bytes of one number of the model's dtype."""
    weights: int
    """Bytes of all weights."""
    on_cpu: bool = True

    @classmethod
    def of(cls, causal_lm: Any) -> MemoryModel:
        """The memory model of a loaded model."""
        weight = causal_lm.get_input_embeddings().weight
        held = {p.data_ptr(): p.numel() * p.element_size() for p in causal_lm.parameters()}
        return cls._of(causal_lm.config, weight.element_size(), sum(held.values()), weight.device.type == "cpu")

    @classmethod
    def of_config(cls, config: Any, dtype: torch.dtype, on_cpu: bool = True) -> MemoryModel:
        """The memory model of a model that is not loaded, from its transformers configuration."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        return cls._of(config, dtype.itemsize, weights * dtype.itemsize, on_cpu)

    @classmethod
    def _of(cls, config: Any, item: int, weights: int, on_cpu: bool) -> MemoryModel:
        text = config.get_text_config()
        hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
        experts = int(getattr(text, "num_experts_per_tok", None) or 1)
        inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden
        return cls(
            layers=int(text.num_hidden_layers),
            hidden=hidden,
            inner=int(max(inner) if isinstance(inner, list) else inner) * experts,
            heads=heads,
            groups=int(getattr(text, "num_key_value_heads", None) or heads),
            head_width=int(getattr(text, "head_dim", None) or hidden // heads),
            vocab=int(text.vocab_size),
            item=item,
            weights=weights,
            on_cpu=on_cpu,
        )

    def loading(self) -> int:
        """Bytes at the peak of loading the weights."""
        return self.weights + _BESIDE

    def step(self, positions: int, width: int, *, checkpointed: bool = False) -> int:
        """Bytes that a training step of `positions` in rows of `width` adds to the weights.

        `checkpointed`: each layer keeps its input alone and is computed again in the backward pass.
        """
        layer = self._kept(width) + self._passing(width)
        if checkpointed:
            each = self.layers * self.hidden * self.item + _CHECKPOINT_FACTOR * layer
        else:
            each = (self.layers - 1) * self._kept(width) + layer
        return positions * each + self._chunk(positions, _LOSS_TENSORS) + _BESIDE

    def scoring(self, tokens: int, arms: int, *, prefix: int, batch: int, width: int) -> int:
        """Bytes that scoring `tokens` response tokens of `arms` arms adds, in batches behind a prefix of `prefix`."""
        states = tokens * arms * self.hidden * self.item
        passes = self._cache(prefix + batch * width) + batch * width * self._forward(prefix + width)
        copy = self.vocab * self.hidden * 4 if self.item < 4 else 0
        return states + max(passes, copy + self._chunk(tokens, _SCORE_TENSORS)) + _BESIDE

    def decoding(self, batch: int, *, prefix: int, width: int, new: int, shared: bool = True) -> int:
        """Bytes that decoding `new` tokens of `batch` rows adds, their own ids `width` long, behind a prefix.

        `shared`: the prefix is read in place by all rows, not copied for each.
        """
        cache = self._cache(prefix + batch * (width + new + (0 if shared else prefix)))
        first = batch * width * self._forward(prefix + width)
        chosen = batch * self.vocab * (self.item + 8)
        return cache + max(first, chosen) + _BESIDE

    def positions(self, free: int, width: int) -> int:
        """Most positions of one training pass, in rows of `width`, that fit `free` bytes; at least 64."""
        room = free * _FILL - self._chunk(_HEAD_CHUNK, _LOSS_TENSORS)
        return max(_LEAST_POSITIONS, int(room / (self.layers * self._kept(width) + self._passing(width))))

    def limit(self, free: int) -> Limit:
        """`positions` as a function of the width alone."""
        return lambda width: self.positions(free, width)

    def _kept(self, width: int) -> int:
        """Bytes a position that one layer keeps for the backward pass; frozen weights need no input of theirs."""
        norms = 2 * self.hidden * 4
        attention = (2 * self.heads + 2 * self.heads) * self.head_width * self.item
        scores = self.heads * width * (4 + self.item) if self.on_cpu and width <= _KEPT_SCORES_WIDTH else 0
        return norms + attention + scores + 3 * self.inner * self.item

    def _passing(self, width: int) -> int:
        """Bytes a position that the layer in work holds beyond what it keeps, gradients among them."""
        scores = self.heads * width * 4 if self.on_cpu and width <= _KEPT_SCORES_WIDTH else 0
        return 6 * self.hidden * 4 + 4 * self.inner * self.item + scores

    def _forward(self, reach: int) -> int:
        """Bytes a position of a pass without gradient that attends to `reach` positions."""
        widest = max(3 * self.inner, 3 * self.heads * reach)
        return (4 * self.hidden + widest) * self.item

    def _cache(self, positions: int) -> int:
        """Bytes of the keys and values of `positions`, and of the layer that is being made longer."""
        layer = 2 * self.groups * self.head_width * self.item
        return positions * layer * (self.layers + 1)

    def _chunk(self, tokens: int, tensors: int) -> int:
        return min(tokens, _HEAD_CHUNK) * self.vocab * 4 * tensors


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; None where the system does not say.

    On a CPU what the kernel calls available, or what is left of the control group's limit if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [left for left in (_available(), _group_left()) if left is not None]
    return min(found) if found else None


def training_limit(causal_lm: Any) -> Limit | None:
    """The bound of a training pass by the memory that is free now; None where that is unknown."""
    free = free_bytes(causal_lm.get_input_embeddings().weight.device)
    return None if free is None else MemoryModel.of(causal_lm).limit(free)


def _available() -> int | None:
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _group_left() -> int | None:
    """What the control group of a container leaves; its page cache can be dropped and counts as free."""
    for limit, used, stat, dropped in _CGROUPS:
        with contextlib.suppress(OSError, KeyError, ValueError):
            rows = dict(line.split() for line in Path(stat).read_text().splitlines())
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()) + int(rows[dropped]))
    return None  # "max" is no number: no limit


def held_bytes(device: torch.device) -> int:
    """Memory held now: by the process on a CPU, by torch on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Where /proc is closed the peak stays that of the whole process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most memory held since `reset_peak`: by the process on a CPU, by torch on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
