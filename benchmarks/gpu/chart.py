"""Chart of TTFT by model and length, with the paper's values as dotted lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.shapes import SHAPES

_BARS = (
    ("full_cold", "full prompt, cold", "#16425b"),
    ("full_warm", "full prompt, cached", "#3a7ca5"),
    ("be", "[BE], one vector", "#d1495b"),
    ("floor", "one-token prompt", "#9aa5b1"),
)


def draw(state: dict[str, Any], path: Path) -> bool:
    """Write the PNG if the state holds a TTFT step; return whether it was written."""
    measured = {
        name: step["figures"]["cases"]
        for name in SHAPES
        if (step := state["steps"].get(f"ttft-{name}", {})).get("status") == "done"
    }
    if not measured:
        return False
    from matplotlib.figure import Figure  # Figure without pyplot needs no display and loads faster
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(max(7.6, 1.4 + 3.6 * len(measured)), 4.6), layout="constrained")
    axes = figure.subplots(1, len(measured), squeeze=False)[0]
    width = 0.8 / len(_BARS)
    for axis, (name, cases) in zip(axes, measured.items(), strict=True):
        places = np.arange(len(cases))
        for n, (arm, label, colour) in enumerate(_BARS):
            heights = [case["arms"][arm]["p50_ttft_ms"] for case in cases]
            at = places + (n - (len(_BARS) - 1) / 2) * width
            axis.bar(at, heights, width, color=colour, label=label, zorder=2)
            for x, height in zip(at, heights, strict=True):
                axis.annotate(
                    f"{height:.0f}" if height >= 20 else f"{height:.1f}",
                    *[(x, height)],
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=colour,
                )
        for x, case in zip(places, cases, strict=True):
            paper = SHAPES[name].paper.get((case["prompt_tokens"], case["question_tokens"]))
            if paper and not state["tiny"]:
                axis.hlines(paper[0], x - 0.42, x - 0.2, color="#16425b", linestyle=":", linewidth=1.6, zorder=3)
                axis.hlines(paper[1], x - 0.02, x + 0.2, color="#d1495b", linestyle=":", linewidth=1.6, zorder=3)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(places, [f"{c['prompt_tokens']:,} + {c['question_tokens']}" for c in cases], fontsize=8.5)
        axis.set_title(name, fontsize=10.5, loc="left")
        axis.grid(axis="y", color="#e4e7eb", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    axes[0].set_ylabel("time to first token, ms (log scale)")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    hardware = state["hardware"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, no GPU"
    figure.suptitle(
        f"{device}, by tokens of system prompt + question; medians"
        + ("" if state["tiny"] else "\nDotted: the paper's full prompt and [BE], on an A100"),
        fontsize=9.5,
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
