"""Chart of ratios: one panel per metric, one row per ratio, one dot per start, one bar per 95 % interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.load.figures import headline

_PANELS = {"tokens_per_s": "tokens per second", "itl_ms": "inter-token latency", "ttft_ms": "time to first token"}
_CONTROL_COLOUR = "#7b8794"
_COLOUR = "#d1495b"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the PNG of a `LoadRun.result` that has at least one complete round."""
    from matplotlib.figure import Figure  # Figure without pyplot needs no display and loads faster
    from matplotlib.ticker import PercentFormatter

    ratios, beside = result["ratios"], result["options"]["other"]
    figure = Figure(figsize=(11.5, 1.5 + 0.62 * len(ratios)), layout="constrained")
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (metric, title) in zip(axes, _PANELS.items(), strict=True):
        for y, (name, metrics) in enumerate(reversed(ratios.items())):
            ratio = metrics[metric]
            colour = _CONTROL_COLOUR if name.startswith("again_other") else _COLOUR
            starts = ratio["of_medians_by_start"]
            axis.scatter(starts, [y] * len(starts), s=22, color=colour, alpha=0.4, linewidths=0, zorder=2)
            middle, interval = headline(ratio)
            if interval:
                axis.hlines(y, *interval, color=colour, linewidth=2.4, zorder=3)
            axis.vlines(middle, y - 0.2, y + 0.2, color=colour, linewidth=2.4, zorder=3)
            axis.annotate(
                f"{middle:.3f}",
                (middle, y + 0.2),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=9,
            )
        axis.axvline(1.0, color="#9aa5b1", linewidth=0.8, zorder=1)
        axis.set_title(title, fontsize=10.5, loc="left")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(axis="x", color="#e4e7eb", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
    names = [_name(name, beside) for name in reversed(ratios)]
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(-0.5, len(names) - 0.3)
    figure.suptitle(_title(result), fontsize=10.5, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _name(ratio: str, beside: str) -> str:
    other = "stock vLLM" if beside == "stock" else beside
    return {
        "plain/plain_other": f"plain chats,\nplugin / {other}",
        "be/plain": "token / plain chats,\nplugin",
        "be/be_other": f"chats with a token,\nplugin / {other}",
        "again_other/plain_other": f"plain chats, measured twice,\n{other} (control)",
    }[ratio]


def _title(result: dict[str, Any]) -> str:
    hardware, options = result["hardware"], result["options"]
    device = ", ".join(hardware.get("gpus", [])) or f"{hardware.get('cpu')} ({hardware.get('cores')} cores)"
    return (
        f"{options['model']} on {device}, {result['date'][:10]}: {result['rounds']} bursts of {options['concurrency']} "
        f"chats,\n{options['question_tokens']} tokens in, {options['max_tokens']} out; dots: starts of the servers, "
        "bars: 95 % intervals"
    )
