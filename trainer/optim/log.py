"""What a run leaves for people: a log of every step and its curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from be_serve.core.artifact import write_atomically


class Log:
    """`log.jsonl`: one object a step. A resumed run cuts off what came after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a half-written last line is dropped."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def keep(self, stage: int, step: int) -> None:
        """Drop the rows behind `step` of `stage`."""
        rows = [row for row in self.rows() if (row["stage_index"], row["step"]) <= (stage, step)]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    total = norm = 0.0
    out = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def draw_curves(rows: Sequence[dict[str, Any]], path: Path, levels: dict[str, float] | None = None) -> None:
    """Draw each part of the loss over the steps as a PNG; `levels` are horizontal lines such as KL(none)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in ("kl", "softened kl", "nll", "reconstruction") if any(name in row for row in rows)]
    figure = Figure(figsize=(7.0, 3.2 * max(len(names), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names, start=1):
        axes = figure.add_subplot(len(names), 1, i)
        points = [(n, row[name]) for n, row in enumerate(rows, start=1) if name in row]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(steps, values, alpha=0.3, linewidth=0.8, label="batch")
        axes.plot(steps, smooth(values), label="smoothed")
        checked = [(n, row["validation"]) for n, row in enumerate(rows, start=1) if "validation" in row]
        if name == "kl" and checked:
            axes.plot(*zip(*checked, strict=True), marker="o", markersize=3, label="validation")
        for label, level in (levels or {}).items() if name == "kl" else ():
            axes.axhline(level, linestyle="--", linewidth=0.8, color="grey")
            axes.text(1, level, label, fontsize=8, va="bottom")
        axes.set_xlabel("step")
        axes.set_ylabel(f"{name} (nats a token)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
