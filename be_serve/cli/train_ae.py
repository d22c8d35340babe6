"""`be-serve train-ae`: train the [AE] embedding of a model (stage 0)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import click

from be_serve.cli.options import ModelChoice, json_option, model_options, seed_option


@click.command("train-ae")
@click.option(
    "--corpus", multiple=True, required=True, help="Training text: .txt or .jsonl (field `text`), also .gz. Repeatable."
)
@model_options
@click.option("-o", "--output", required=True, help="[AE] file to write.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True)
@click.option("--length", type=click.IntRange(2), default=64, show_default=True, help="Tokens in each piece of text.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--packing",
    type=click.Choice(["none", "random", "filtered"]),
    default="none",
    show_default=True,
    help="none: each piece holds one text. random: four random texts. filtered: four related texts (Threshold "
    "Filtering Packing).",
)
@click.option("--lr", type=float, default=1e-2, show_default=True)
@seed_option
@click.option("--run-dir", help="Run folder. [default: runs/<output file's name>]")
@json_option
@click.argument("more", nargs=-1)
def command(
    corpus: tuple[str, ...],
    model: ModelChoice,
    output: str,
    steps: int,
    length: int,
    batch_size: int,
    packing: Literal["none", "random", "filtered"],
    lr: float,
    seed: int,
    run_dir: str | None,
    as_json: bool,
    more: tuple[str, ...],
) -> None:
    """Train [AE], the embedding that makes a frozen model repeat the text before it (Eq. 1).

    Train [AE] once for each model; `be-serve train --ae` uses it. MORE are further corpus files.
    To continue an interrupted run, run the same command again.
    """

    from trainer.optim.autoencoder import AEConfig, save_ae, train_ae

    frozen = model.load()
    config = AEConfig(steps=steps, length=length, batch_size=batch_size, lr=lr, seed=seed, packing=packing)
    folder = Path(run_dir) if run_dir else Path("runs") / Path(output).stem
    try:
        result = train_ae(frozen, [*corpus, *more], config, folder)
    except KeyboardInterrupt:
        click.echo(f"Stopped. The checkpoint is in {folder}. To continue, run the same command again.", err=True)
        raise
    loss = {"before": round(result.before, 4), "after": round(result.after, 4)}
    save_ae(output, result.ae_1H, frozen, {**dataclasses.asdict(config), "reconstruction": loss})
    click.echo(f"{output}: reconstruction of held-out text {result.before:.3f} -> {result.after:.3f} nats per token")
    click.echo(f"Run: {folder}")
    if as_json:
        click.echo(json.dumps({"output": output, "run_dir": str(folder), "reconstruction": loss}))
