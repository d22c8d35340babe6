"""The state of a run on disk: vectors, optimiser, random numbers, step. Written atomically, never pickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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
    vectors_KH: Tensor
    exp_avg_KH: Tensor
    exp_avg_sq_KH: Tensor
    rng: Tensor
    """State of torch's random numbers, uint8."""

    def save(self, path: Path) -> None:
        """Write the checkpoint; readers see the old or the new one."""
        tensors = {
            "vectors": self.vectors_KH,
            "exp_avg": self.exp_avg_KH,
            "exp_avg_sq": self.exp_avg_sq_KH,
            "rng": self.rng,
        }
        state = json.dumps({"digest": self.digest, "stage": self.stage, "step": self.step})
        on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        write_atomically(path, save(on_cpu, metadata={"state": state}))

    @classmethod
    def load(cls, path: Path, digest: str) -> Checkpoint:
        """Read a checkpoint. Raises InputError for a damaged one or one of another run."""
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in ("vectors", "exp_avg", "exp_avg_sq", "rng")}
            found = cls(
                state["digest"],
                int(state["stage"]),
                int(state["step"]),
                tensors["vectors"],
                tensors["exp_avg"],
                tensors["exp_avg_sq"],
                tensors["rng"].to(torch.uint8),
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as exc:
            raise InputError(f"Damaged checkpoint {path}: {exc}. Delete it, or start again with --fresh.") from exc
        if found.digest != digest:
            raise InputError(
                f"{path} belongs to a run with other settings, prompt, queries or model. "
                "Use another --run-dir, or start again with --fresh."
            )
        return found
