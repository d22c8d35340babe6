"""Chart of TTFT: one panel per case, one dot per request, one horizontal bar per arm at its median."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ttft.figures import Run

_COLOURS = {
    "none": "#7b8794",
    "floor_stock": "#7b8794",
    "floor": "#52606d",
    "be": "#d1495b",
    "full_warm": "#3a7ca5",
    "full_cold": "#16425b",
}
_NAMES = {
    "none": "no prompt",
    "floor_stock": "{k}-token\nprompt,\nstock",
    "floor": "{k}-token\nprompt",
    "be": "[BE]\n{k} vector{s}",
    "full_warm": "full,\ncached",
    "full_cold": "full,\ncold",
}


def draw(run: Run, figures: dict[str, Any], path: Path) -> None:
    """Write the PNG: TTFT in ms on a logarithmic axis."""
    from matplotlib.figure import Figure  # Figure without pyplot needs no display and loads faster
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    cases = figures["cases"]
    figure = Figure(figsize=(1.6 + 4.6 * len(cases), 5.0), layout="constrained")
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)
    rng = np.random.default_rng(0)
    for axis, case in zip(axes[0], cases, strict=True):
        names = list(case["arms"])
        for x, name in enumerate(names):
            arm = case["arms"][name]
            ttfts = [t * 1e3 for t, error in zip(arm["ttfts"], arm["errors"], strict=True) if not error]
            if not ttfts:
                continue
            colour = _COLOURS[name]
            jitter = x + rng.uniform(-0.38, -0.04, size=len(ttfts))
            axis.scatter(jitter, ttfts, s=11, color=colour, alpha=0.35, linewidths=0, zorder=2)
            median = arm["p50_ttft_ms"]
            axis.hlines(median, x - 0.42, x + 0.42, color=colour, linewidth=2.4, zorder=3)
            bold = "bold" if name == "be" else "normal"
            axis.annotate(
                f"{median:,.0f}",
                (x + 0.22, median),  # to the right of the dots, above the bar
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=10,
                fontweight=bold,
            )
        plural = "" if case["k"] == 1 else "s"
        axis.set_xticks(range(len(names)), [_NAMES[n].format(k=case["k"], s=plural) for n in names], fontsize=8.5)
        axis.set_xlim(-0.6, len(names) - 0.4)
        title = f"{case['prompt_tokens']:,}-token prompt, {case['question_tokens']}-token question"
        axis.set_title(title, fontsize=10.5, loc="left", pad=20)
        axis.annotate(
            _gain(case),
            (0, 1),
            xytext=(0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9,
            color=_COLOURS["be"],
        )
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="#e4e7eb", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    axes[0][0].set_ylabel("time to first token, ms (log scale)")
    figure.suptitle(_title(run), fontsize=10.5, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _gain(case: dict[str, Any]) -> str:
    ratios = case["ratios"]
    parts = [
        f"{ratios[key]['of_medians']:.0%} of {word}"
        for key, word in (
            ("be/full_cold", "the cold full prompt's time"),
            ("be/full_warm", "the cached full prompt's time"),
        )
        if key in ratios
    ]
    return f"[BE] takes {', '.join(parts)}" if parts else ""


def _title(run: Run) -> str:
    hardware = run.hardware
    device = ", ".join(hardware.get("gpus", [])) or f"{hardware.get('cpu')} ({hardware.get('cores')} cores)"
    return (
        f"{run.model} on {device}\n"
        f"{run.rounds_measured} interleaved rounds, {run.started:%Y-%m-%d}; dots: requests; bars and numbers: medians"
    )
