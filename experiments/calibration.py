"""Does `be-serve fit` foretell what a token keeps? Demand over capacity against rho, over many prompts.

    be-serve train --batch-file prompts.jsonl --scores-only --run-dir RUNS -o TOKENS
    be-serve probe                                # once for the model
    python experiments/calibration.py RUNS --out calibration

Every finished run below RUNS is a point. Writes calibration.json and calibration.png.
The rank correlation says how far the order of prompts by demand is their order by rho, beside
what cheaper figures would have told: the prompt's length, and how much it changes the answers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from be_serve.cli.options import ModelChoice, model_options
from be_serve.core.errors import InputError
from be_serve.core.prompts import read_prompt_file
from be_serve.models import be_home
from benchmarks.common.stats import rank_correlation
from trainer.config import TrainConfig
from trainer.model.frozen import FrozenModel
from trainer.studies.capacity import Capacity, load_capacity, will_it_fit


@dataclass(frozen=True)
class Point:
    """One run."""

    id: str
    tokens: int
    """Length of the prompt."""
    k: int
    demand_bits: float
    share: float
    """Demand over the capacity of the k vectors."""
    kl_none: float
    rho: float


def read_points(model: FrozenModel, runs: Path, capacity: Capacity) -> list[Point]:
    """A point for each finished run. Raises InputError where there is none."""
    found = []
    for file in sorted(runs.glob("*/evaluation.json")):
        config = TrainConfig.load(file.parent / "run.yaml")
        evaluation: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        prompt = read_prompt_file(config.prompt_file)
        fit = will_it_fit(model, prompt, capacity)
        tokens = len(model.slots.prompt_ids(prompt, template_kwargs=model.template_kwargs))
        kl_none = evaluation["arms"]["none"]["kl"]
        k = int(evaluation["k"])
        found.append(Point(config.id, tokens, k, fit.demand_bits, fit.share(k), kl_none, evaluation["rho"]))
    if not found:
        raise InputError(f"No finished run below {runs}.")
    return found


def correlated(x: list[float], y: list[float], draws: int = 2000) -> dict[str, float]:
    """Spearman's rho with its 95 % bootstrap interval."""
    a, b = np.asarray(x), np.asarray(y)
    rng = np.random.default_rng(0)
    drawn = [rank_correlation(a[i].tolist(), b[i].tolist()) for i in rng.integers(0, len(a), (draws, len(a)))]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"value": rank_correlation(x, y), "low": float(low), "high": float(high)}


def draw(points: list[Point], path: Path, title: str) -> None:
    """A picture for people: each prompt by its demand and by what its token lost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for k in sorted({point.k for point in points}):
        of_k = [point for point in points if point.k == k]
        axes.scatter([p.share for p in of_k], [p.rho for p in of_k], label=f"k = {k}")
    axes.set_xscale("log")
    axes.set_xlabel("demand of the prompt's wording / capacity of the vectors (bits over bits)")
    axes.set_ylabel("rho = KL(be) / KL(none)")
    axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path without ending.")
@model_options
def main(runs: Path, out: Path, model: ModelChoice) -> None:
    """Hold the demand of many prompts against what their tokens kept."""
    frozen = model.load()
    capacity = load_capacity(be_home() / "capacity", frozen)
    if capacity is None:
        raise InputError("Measure the model's capacity first: be-serve probe.")
    points = read_points(frozen, runs, capacity)
    rho = [p.rho for p in points]
    spearman = {
        name: correlated([getattr(point, name) for point in points], rho) for name in ("share", "tokens", "kl_none")
    }
    result = {
        "model": frozen.name,
        "bits_a_vector": capacity.bits_a_vector,
        "spearman": spearman,
        "points": [asdict(point) for point in points],
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    told = spearman["share"]
    title = f"{len(points)} prompts, Spearman {told['value']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
    draw(points, out.with_suffix(".png"), title)
    click.echo(title)


if __name__ == "__main__":
    main()
