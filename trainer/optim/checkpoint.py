"""The state of a run on disk: vectors, optimiser, random numbers, step. Written atomically, never pickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import InputError


@dataclass
class Checkpoint:
    """Where a run is: `stage` counts the stages done, `step` the steps done in the current one."""

    digest: str
    """Digest of everything the run depends on; another run's checkpoint is refused."""
    stage: int
    step: int
    parameters: Mapping[str, Tensor]
    """By name; `vectors` [k, H] is among them."""
    moments: Mapping[str, tuple[Tensor, Tensor]]
    """AdamW's two moments of each parameter; empty before the first step."""
    rng: Tensor
    """State of torch's random numbers, uint8."""
    best: tuple[float, int, Tensor] | None = None
    """KL, step and vectors [k, H] of the best step so far on the validation queries, where there are any."""

    def save(self, path: Path) -> None:
        """Write the checkpoint; readers see the old or the new one."""
        tensors = {f"parameter.{name}": tensor for name, tensor in self.parameters.items()} | {"rng": self.rng}
        for name, (first, second) in self.moments.items():
            tensors |= {f"exp_avg.{name}": first, f"exp_avg_sq.{name}": second}
        state: dict[str, Any] = {"digest": self.digest, "stage": self.stage, "step": self.step}
        if self.best:
            kl, step, tensors["best"] = self.best
            state["best"] = [kl, step]
        on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        write_atomically(path, save(on_cpu, metadata={"state": json.dumps(state)}))

    @classmethod
    def load(cls, path: Path, digest: str) -> Checkpoint:
        """Read a checkpoint. Raises InputError for a damaged one or one of another run."""
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = cls(
                state["digest"],
                int(state["stage"]),
                int(state["step"]),
                _part(tensors, "parameter."),
                {name: (first, tensors[f"exp_avg_sq.{name}"]) for name, first in _part(tensors, "exp_avg.").items()},
                tensors["rng"].to(torch.uint8),
                (float(state["best"][0]), int(state["best"][1]), tensors["best"]) if "best" in state else None,
            )
            if found.best and not (math.isfinite(found.best[0]) and found.best[0] >= 0 and found.best[2].dim() == 2):
                raise ValueError("its best step has no finite divergence")
            _ = found.parameters["vectors"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, OverflowError) as exc:
            raise InputError(f"Damaged checkpoint {path}: {exc}. Delete it, or start again with --fresh.") from exc
        if found.digest != digest:
            raise InputError(
                f"{path} belongs to a run with other settings, prompt, queries or model. "
                "Use another --run-dir, or start again with --fresh."
            )
        return found


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
