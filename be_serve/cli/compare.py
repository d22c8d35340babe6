"""`be-serve compare PROMPT_FILE`: compare training methods on one prompt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import click

from be_serve.cli.options import ModelChoice, json_option, model_options, seed_option

DEFAULT_METHODS = "truncate:4,memory:1,pt:1,kd:1,pt:4,kd:4"


@click.command("compare")
@click.argument("prompt_file")
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    show_default=True,
    help="Comma-separated METHOD:K. Methods: kd, joint, stages, memory, pt, truncate, fewshot.",
)
@model_options
@click.option("--queries", required=True, help="JSONL file of unlabeled queries.")
@click.option(
    "--held-out",
    type=click.IntRange(2),
    default=32,
    show_default=True,
    help="Queries kept for the evaluation: the last of the file.",
)
@click.option("--ae", help="[AE] file or `builtin`. The methods joint and stages need it.")
@click.option("--summary", help="Short text with the same intent. It is one more method in the table.")
@click.option("--steps", type=click.IntRange(1), default=240, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True)
@click.option("--lr", type=float, default=1e-2, show_default=True)
@click.option("--stop", multiple=True, help="Text that ends a response. \\n is a line break. Repeatable.")
@seed_option
@click.option("--run-dir", help="Run folder. [default: runs/compare-<prompt>-<digest>]")
@json_option
def command(
    prompt_file: str,
    methods: str,
    model: ModelChoice,
    queries: str,
    held_out: int,
    ae: str | None,
    summary: str | None,
    steps: int,
    batch_size: int,
    lr: float,
    stop: tuple[str, ...],
    seed: int,
    run_dir: str | None,
    as_json: bool,
) -> None:
    """Train each method on the same data for the same number of steps; print one table.

    To continue an interrupted comparison, run the same command again.
    """
    from be_serve.cli._training import stop_texts
    from be_serve.core.prompts import read_prompt_file
    from trainer.data.queries import drop_near_duplicates, read_queries, split_held_out
    from trainer.data.teacher import Teacher
    from trainer.optim.autoencoder import load_ae
    from trainer.studies.compare import Method, Setting, compare

    chosen = [Method.parse(text) for text in methods.split(",")]
    if summary:
        chosen.append(Method("summary", 1))
    frozen = model.load()
    prompt = read_prompt_file(prompt_file)
    key = [prompt, Path(queries).read_text(encoding="utf-8"), held_out, steps, batch_size, lr, stop, seed, frozen.name]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    folder = Path(run_dir) if run_dir else Path("runs") / f"compare-{Path(prompt_file).stem}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(frozen, prompt, folder, stop=stop_texts(stop))
    training, kept = split_held_out(drop_near_duplicates(read_queries(queries)), held_out, latest=True)
    lines = compare(
        teacher,
        teacher.examples(training, response_tokens=64),
        kept,
        chosen,
        Setting(steps=steps, batch_size=batch_size, lr=lr, seed=seed),
        folder,
        ae_1H=load_ae(ae, frozen) if ae else None,
        summary=summary,
    )
    click.echo(
        f"{len(training)} training queries, {len(kept)} held-out queries; {steps} steps per method, "
        f"batch size {batch_size}\n"
    )
    click.echo(
        f"{'method':<14}{'tokens':>7}{'KL':>9}{'rho':>8}  {'95 % interval':<16}{'gain retained':>14}{'top-1':>8}"
    )
    for line in lines:
        low, high = line.rho_interval
        click.echo(
            f"{line.method:<14}{line.k:>7}{line.figures['kl']:>9.3f}{line.rho:>8.3f}  {f'{low:.3f} to {high:.3f}':<16}"
            f"{line.gain_retained:>14.2f}{line.figures['top1']:>8.3f}"
        )
    result = {"prompt_file": prompt_file, "steps": steps, "methods": [line.to_json() for line in lines]}
    (folder / "compare.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(result))
