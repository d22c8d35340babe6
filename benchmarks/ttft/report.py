"""Write the result: a table for people, JSON for programs, and one summary line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from be_serve.core.artifact import write_atomically
from benchmarks.ttft.figures import Run

SCHEMA_VERSION = 1
_HEAD = ("arm", "server", "tokens", "cached", "p50", "p90", "p99", "mean", "failed")


def table(run: Run, figures: dict[str, Any]) -> str:
    """Return the printed report as plain text."""
    lines = [_title(run)]
    labels = {arm.name: arm.label for arm in run.arms}
    for case in figures["cases"]:
        lines += [
            "",
            f"{case['prompt_tokens']}-token prompt, {case['question_tokens']}-token question, k = {case['k']}; "
            f"the chat template adds {case['template_tokens']} tokens. TTFT in ms:",
        ]
        rows = [_row(name, labels[name], arm) for name, arm in case["arms"].items()]
        lines += _align([("", *_HEAD), *rows], 3)
        lines += ["", *_ratio_lines(case), *_model_lines(case)]
    lines += ["", *_fit_lines(figures["fit"])]
    if figures["round_trip_ms"] is not None:
        lines.append(
            f"An empty request takes {figures['round_trip_ms']:.1f} ms (median): the share of network and client."
        )
    lines += [f"Note: {note}" for note in (*run.notes, *figures["notes"])]
    lines += ["", "Bounds (valid for the default model on a CPU with at least 100 rounds):"]
    lines += [*(_verdict_line(v) for v in figures["verdicts"])]
    return "\n".join(lines)


def _title(run: Run) -> str:
    hardware = run.hardware
    device = ", ".join(hardware.get("gpus", [])) or f"{hardware.get('cpu')}, {hardware.get('cores')} cores"
    state = ""
    if run.interrupted or run.stopped:
        state = f" ({'interrupted' if run.interrupted else 'stopped early'}, {run.rounds} rounds requested)"
    return (
        f"TTFT of {run.model} on {device}, {hardware.get('memory_gib')} GiB; "
        f"{run.rounds_measured} interleaved rounds{state}, {run.started:%Y-%m-%d %H:%M}"
    )


def _row(name: str, label: str, arm: dict[str, Any]) -> tuple[str, ...]:
    cached = "-" if arm["cached_tokens"] is None else str(arm["cached_tokens"])
    lengths = sorted({n for n, error in zip(arm["input_lens"], arm["errors"], strict=True) if not error})
    tokens = "-".join(str(n) for n in (lengths[:1] + lengths[-1:] if len(lengths) > 1 else lengths)) or "?"
    figures = [f"{arm[f'{p}_ttft_ms']:.1f}" if arm["completed"] else "-" for p in ("p50", "p90", "p99", "mean")]
    return (label, name, arm["server"], tokens, cached, *figures, str(arm["failed"]))


def _align(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Return aligned rows. The first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _ratio_lines(case: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("", "ratio of medians", "95 % interval", "median of ratios", "95 % interval", "ms saved", "pairs")
    ]
    for name, r in case["ratios"].items():
        rows.append(
            (
                name.replace("/", " / "),
                f"{r['of_medians']:.3f}",
                _interval(r["of_medians_ci95"]),
                f"{r['median_of_ratios']:.3f}",
                _interval(r["median_of_ratios_ci95"]),
                f"{r['saved_ms']:.1f}",
                str(r["pairs"]),
            )
        )
    return _align(rows, 1)


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} .. {ends[1]:.3f}"


def _model_lines(case: dict[str, Any]) -> list[str]:
    model = case["model"]
    lines = [f"  Eq. 5: NormFLOPs {model['norm_flops']:.3f}, speed-up at most {model['speedup_bound']:.1f}x"]
    if "overhead_fraction" in model:
        measured = case["ratios"].get("be/full_cold", {}).get("of_medians")
        lines[0] += (
            f". Eq. 6: overhead_fraction {model['overhead_fraction']:.3f}, predicted be / full_cold "
            f"{model['predicted_ratio']:.3f}" + (f"; measured {measured:.3f}" if measured else "")
        )
    return lines


def _fit_lines(fit: dict[str, Any] | None) -> list[str]:
    if fit is None:
        return []
    return [
        f"Fit: TTFT = {fit['alpha_ms']:.1f} ms + {fit['beta_ms_per_token']:.3f} ms per token (least squares of the "
        f"relative error over {fit['points']} medians",
        f"of the uncached plain arms; the largest relative error is {fit['largest_relative_residual']:.0%}).",
    ]


def _verdict_line(verdict: dict[str, Any]) -> str:
    word = {True: "PASS", False: "MISS", None: "----"}[verdict["pass"]]
    value = "not measured" if verdict["value"] is None else f"{verdict['value']:.3f}"
    return f"{word}  {verdict['bound']} at {verdict['case']} tokens: {value} (bound {verdict['limit']:.2f})"


def write_json(run: Run, figures: dict[str, Any], path: Path) -> None:
    """Write every figure and every raw sample."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "ttft",
        "date": run.started.isoformat(timespec="seconds"),
        "model_id": run.model,
        "k": run.k,
        "rounds": run.rounds,
        "rounds_measured": run.rounds_measured,
        "passes_per_round": 1 + run.close,
        "interrupted": run.interrupted,
        "stopped": run.stopped or None,
        "seed": run.seed,
        "max_tokens": run.max_tokens,
        "command": run.command,
        "settings": run.settings,
        "token": run.token,
        "servers": run.servers,
        "hardware": run.hardware,
        "versions": run.versions,
        "arms": {a.name: {"server": a.server, "sends": a.content, "warm": a.warm, "label": a.label} for a in run.arms},
        **figures,
        "notes": [*run.notes, *figures["notes"]],
    }
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def summary(run: Run, figures: dict[str, Any], *, json_path: Path, png_path: Path | None) -> str:
    """Return one JSON object on one line: the last line of the command's output."""
    cases = {
        case["case"]: {
            "p50_ttft_ms": {n: round(a["p50_ttft_ms"], 3) if a["completed"] else None for n, a in case["arms"].items()},
            "ratios": {
                name: {"value": round(r["of_medians"], 4), "ci95": [round(end, 4) for end in r["of_medians_ci95"]]}
                for name, r in case["ratios"].items()
            },
        }
        for case in figures["cases"]
    }
    return json.dumps(
        {
            "benchmark": "ttft",
            "model": run.model,
            "k": run.k,
            "rounds": run.rounds_measured,
            "interrupted": run.interrupted,
            "failed": figures["failed"],
            "cases": cases,
            "verdicts": [{**v, "value": v["value"] and round(v["value"], 4)} for v in figures["verdicts"]],
            "json": str(json_path),
            "png": str(png_path) if png_path else None,
        }
    )
