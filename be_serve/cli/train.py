"""`be-serve train PROMPT_FILE`: train a token for a system prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from be_serve.core.errors import InputError
from be_serve.core.ids import validate_be_id
from be_serve.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from be_serve.cli._offline import OfflineDecoder
    from trainer.model.frozen import FrozenModel


@click.command("train")
@click.argument("prompt_file", required=False)
@click.option("--model", help="Hugging Face name, local folder or builtin:NAME. [default: the built-in model]")
@click.option("-o", "--output", help="Token file to write. [default: <prompt file>.safetensors here]")
@click.option("--id", "be_id", help="be_id of the token. [default: the output file's name]")
@click.option("--queries", help="JSONL of unlabeled queries. [default: the model writes its own]")
@click.option("--tokens", type=click.IntRange(1, 16), help="Number of vectors k. [default: 4]")
@click.option("--placement", type=click.Choice(["system", "block", "prefix"]), help="[default: system]")
@click.option("--recipe", type=click.Choice(["default", "paper"]), help="Set of defaults to start from.")
@click.option("--init", help="search, text:<words>, file:<tokens>, mean or random. [default: search]")
@click.option("--steps", type=click.IntRange(0), help="Steps of distillation. [default: 240]")
@click.option("--batch-size", type=click.IntRange(1), help="Queries a step. [default: 2]")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--tau", type=float, help="Distillation temperature (Eq. 3).")
@click.option("--lambda", "lam", type=float, help="Weight of distillation (Eq. 4); below 1 needs --ae.")
@click.option(
    "--ae",
    help="[AE] file of `train-ae`, or `builtin` for the default model's; turns the joint loss on (lambda 0.9).",
)
@click.option("--reconstruct-steps", type=click.IntRange(0), help="Steps of reconstruction alone before distillation.")
@click.option("--response-tokens", type=click.IntRange(1), help="Response tokens that count, each query.")
@click.option("--temperature", type=float, help="Sampling temperature of the teacher; 0 is greedy.")
@click.option("--keep-recitals", is_flag=True, default=None, help="Train on responses that recite the prompt, too.")
@click.option("--stop", multiple=True, help="A text that ends a response, as clients send it; \\n is a line break.")
@click.option(
    "--teacher",
    type=click.Choice(["here", "vllm"]),
    help="What writes the responses: this process, or a vLLM engine that ends before training. [default: here]",
)
@click.option(
    "--teacher-url", help="OpenAI-compatible server of the same model that writes the responses. [key: BE_TEACHER_KEY]"
)
@click.option("--teacher-model", help="The model's name on that server. [default: --model]")
@click.option("--gold", is_flag=True, default=None, help="Train on the file's `answer` fields.")
@click.option("--max-queries", type=click.IntRange(2), help="Use at most this many queries of the file.")
@click.option("--synthesise", type=click.IntRange(8), help="How many queries to write without --queries.")
@click.option("--held-out", type=click.IntRange(1), help="Queries kept for the final evaluation.")
@click.option("--scores-only", is_flag=True, default=None, help="Evaluate by KL alone: no answers, no clauses.")
@click.option("--summary", help="A short text of the same intent, evaluated beside the token.")
@click.option("--seed", type=int, help="The same seed gives the same token. [default: 0]")
@click.option("--device", help="auto, cpu, cuda, ... [default: auto]")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), help="Of the frozen model.")
@click.option("--with-prompt", is_flag=True, default=None, help="Write the prompt's text into the token file.")
@click.option("--config", help="Settings of an earlier run (run.yaml); options given here go before them.")
@click.option("--batch-file", help="JSONL of prompts to train side by side; -o is then a folder.")
@click.option("--run-dir", help="Run folder. [default: runs/<id>-<digest of the settings>]")
@click.option("--resume", help="Continue the run in this folder.")
@click.option("--fresh", is_flag=True, help="Forget a checkpoint that the run folder holds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def command(
    config: str | None,
    batch_file: str | None,
    run_dir: str | None,
    resume: str | None,
    fresh: bool,
    as_json: bool,
    recipe: str | None,
    **options: Any,
) -> None:
    """Train a token that replaces the system prompt in PROMPT_FILE.

    The same command, given again, continues an interrupted run; --fresh begins anew.
    With --batch-file a token for every prompt of the file is trained in one process.
    """
    from be_serve.cli._training import print_evaluation, short_digest
    from trainer.config import RECIPES, make_config, read_yaml

    given = _given(options)
    if resume:
        config, run_dir = str(Path(resume) / "run.yaml"), resume
    values = {**RECIPES[recipe or "default"], **(read_yaml(config) if config else {}), **given}
    if "ae" in given and "lam" not in values:
        values["lam"] = 0.9
    values.setdefault("model", DEFAULT_MODEL)
    if batch_file:
        if "prompt_file" in values or resume or "summary" in given:
            raise InputError("--batch-file names the prompts and their summaries; give no PROMPT_FILE and no --resume.")
        _train_batch(batch_file, values, run_dir, fresh=fresh, as_json=as_json)
        return
    if "prompt_file" not in values:
        raise InputError("Give a prompt file: be-serve train PROMPT_FILE.")
    values.setdefault("output", str(Path.cwd() / (Path(values["prompt_file"]).stem + ".safetensors")))
    if "id" not in values:
        values["id"] = validate_be_id(Path(values["output"]).name.removesuffix(".safetensors"), param="--output")
    settings = make_config(values)
    folder = Path(run_dir) if run_dir else Path("runs") / f"{settings.id}-{short_digest(settings)}"
    model, decoder = _load_model(values)

    from trainer.run import Run

    run = Run(settings, model, folder, decoder=decoder, say=_say)
    if fresh:
        run.forget()
    try:
        result = run.execute()
    except KeyboardInterrupt:
        _say(f"Stopped; the state is in {folder}. Continue with: be-serve train --resume {folder}")
        raise
    shown = {"output": settings.output, **result.to_json()}
    print_evaluation(result.evaluation)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    if before := result.before:
        seconds += (
            f"; all since the run was continued: its {before['steps']} steps before took {before['seconds']:.1f} s"
        )
    click.echo(
        f"\nToken:  {settings.output}\nRun:    {folder} (report.html, log.jsonl, curves.png, run.yaml)"
        f"\nTime:   {seconds}"
    )
    if as_json:
        click.echo(json.dumps(shown, ensure_ascii=False))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The settings named on the command line, paths made absolute."""
    from be_serve.cli._training import stop_texts
    from trainer.config import absolute_ae, absolute_init

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "stop" in given:
        given["stop"] = stop_texts(given["stop"])
    if "be_id" in given:
        given["id"] = validate_be_id(given.pop("be_id"), param="--id")
    for name in ("prompt_file", "queries", "output"):
        if name in given:
            given[name] = str(Path(given[name]).absolute())
    if "ae" in given:
        given["ae"] = absolute_ae(given["ae"], Path.cwd())
    if "init" in given:
        given["init"] = absolute_init(given["init"], Path.cwd())
    return given


def _load_model(values: dict[str, Any]) -> tuple[FrozenModel, OfflineDecoder | None]:
    """The frozen model, and the engine beside it where one was asked for."""
    from be_serve.cli._offline import OfflineDecoder
    from be_serve.models import resolve_model
    from trainer.model.frozen import FrozenModel

    found = resolve_model(values["model"])
    model = FrozenModel.load(
        found.path,
        name=found.name,
        revision=found.revision,
        device=values.get("device", "auto"),
        dtype=values.get("dtype", "auto"),
    )
    return model, OfflineDecoder(str(found.path), model) if values.get("teacher") == "vllm" else None


def _train_batch(batch_file: str, values: dict[str, Any], run_dir: str | None, *, fresh: bool, as_json: bool) -> None:
    """Train every prompt of the file; exit 2 where one of them failed."""
    from trainer.batch import read_batch, train_batch

    entries = read_batch(batch_file)
    folder = Path(run_dir) if run_dir else Path("runs") / Path(batch_file).stem
    output = Path(values.pop("output", Path.cwd()))
    model, decoder = _load_model(values)
    try:
        outcomes = train_batch(
            model, entries, values, output=output, run_dir=folder, say=_say, fresh=fresh, decoder=decoder
        )
    except KeyboardInterrupt:
        _say(f"Stopped; the states are in {folder}. The same command continues.")
        raise
    click.echo(f"\n{'id':<24}{'k':>3}{'KL none':>10}{'KL be':>10}{'rho':>8}  {'verdict':<12}token")
    for outcome in outcomes:
        if outcome.result is None:
            click.echo(f"{outcome.id:<24}{'finished before' if outcome.skipped else f'FAILED: {outcome.fault}'}")
            continue
        evaluation = outcome.result.evaluation
        kl = {name: evaluation.arms[name]["kl"] for name in ("none", "be")}
        click.echo(
            f"{outcome.id:<24}{evaluation.k:>3}{kl['none']:>10.3f}{kl['be']:>10.3f}{evaluation.rho:>8.3f}  "
            f"{outcome.result.token.manifest.quality['verdict']['status']:<12}"
            f"{output / outcome.id}.safetensors"
        )
    if as_json:
        click.echo(json.dumps({"tokens": [outcome.to_json() for outcome in outcomes]}, ensure_ascii=False))
    failed = sum(outcome.fault is not None for outcome in outcomes)
    if failed:
        raise InputError(f"{failed} of {len(outcomes)} prompts failed; the reasons are above. The others are trained.")


def _say(text: str) -> None:
    click.echo(text, err=True)
