"""One table of many runs, for the documents: what differs between them, and what they keep.

    python experiments/table.py RUNS [--ids 'abl-*'] --out results/ablation

Reads evaluation.json and run.yaml of every finished run below RUNS; writes OUT.json and
prints the rows as Markdown. The JSON holds every setting of every run.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import click

from be_serve.core.errors import InputError
from trainer.config import TrainConfig

_FIGURES = ("kl", "top1", "first_token_kl")
_ELSEWHERE = {"id", "output", "prompt_file", "queries", "test_queries", "summary", "ae", "model"}


def read_run(folder: Path) -> dict[str, Any]:
    """Settings and figures of one finished run."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    config = TrainConfig.load(folder / "run.yaml")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row["kl"] for row in log[-10:] if "kl" in row]
    arms = evaluation["arms"]
    settings = {k: v for k, v in config.model_dump().items() if k not in _ELSEWHERE} | {"ae": bool(config.ae)}
    if files := config.init_files():
        settings["init"] = f"file:{','.join(Path(name).name for name in files)}"
    return {
        "id": config.id,
        "prompt": Path(config.prompt_file).stem,
        "settings": settings,
        "steps": len(log),
        "rho": evaluation["rho"],
        "rho_interval": evaluation["rho_interval"],
        "recitals": evaluation.get("recitals", 0),
        "rho_with_recitals": evaluation.get("rho_with_recitals", evaluation["rho"]),
        "rho_summary": arms["summary"]["kl"] / arms["none"]["kl"] if "summary" in arms else None,
        "gain_retained": evaluation["gain_retained"],
        "training_kl": sum(last) / len(last) if last else None,
        "arms": {name: {figure: arm[figure] for figure in _FIGURES} for name, arm in arms.items()},
        "n_queries": evaluation["n_queries"],
        "n_tokens": evaluation["n_tokens"],
    }


def line(run: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    low, high = run["rho_interval"]
    arms = run["arms"]
    summary = "" if run["rho_summary"] is None else f"{run['rho_summary']:.2f}"
    trained = "" if run["training_kl"] is None else f"{run['training_kl']:.3f}"
    return (
        f"| {run['id']} | {run['settings']['tokens']} | {run['steps']} | {arms['none']['kl']:.3f} | {summary} | "
        f"**{run['rho']:.3f}** | {low:.2f} to {high:.2f} | {run['gain_retained']:.2f} | {arms['be']['top1']:.2f} | "
        f"{trained} |"
    )


@click.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True))
@click.option("--ids", default="*", show_default=True, help="Which runs, as a pattern of their ids.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path without ending.")
def main(runs: Path, ids: str, out: Path) -> None:
    """Collect finished runs."""
    folders = [f.parent for f in runs.glob("*/evaluation.json") if fnmatch.fnmatch(f.parent.name, ids)]
    if not folders:
        raise InputError(f"No finished run {ids} below {runs}.")
    found = [read_run(folder) for folder in sorted(folders)]
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    click.echo("| run | k | steps | KL none | rho of the summary | rho | 95 % | gain | top-1 | last training KL |")
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    for run in sorted(found, key=lambda run: (run["prompt"], run["rho"])):
        click.echo(line(run))


if __name__ == "__main__":
    main()
