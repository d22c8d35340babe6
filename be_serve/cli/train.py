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
@click.option("--model", help="Hugging Face name, folder, .gguf file or builtin:NAME. [default: the built-in model]")
@click.option("-o", "--output", help="Token file to write. [default: <prompt file>.safetensors in the current folder]")
@click.option("--id", "be_id", help="be_id of the token. [default: the output file's name without .safetensors]")
@click.option("--queries", help="JSONL file of unlabeled queries. [default: be-serve's messages, and the model's own]")
@click.option("--tokens", type=click.IntRange(1, 16), help="Learned vectors. Without --places, there are no others.")
@click.option(
    "--places",
    type=click.IntRange(1, 64),
    help="Number of vectors in all. They begin as words of the prompt, all but --tokens of them if that is given: "
    "whoever has the token file and the model can read these words. [default: 64, at most half of the prompt's tokens]",
)
@click.option(
    "--freeze-literal", is_flag=True, default=None, help="Leave these words as they are. Training moves the others."
)
@click.option(
    "--no-literal",
    is_flag=True,
    help="Choose no words. Learned vectors still begin at some: for a secret prompt add --init random.",
)
@click.option(
    "--keep-text",
    help="Words for these vectors, in place of those that the trainer chooses. With --freeze-literal they stay.",
)
@click.option(
    "--recall",
    type=click.FloatRange(0, 0.9),
    help="Share of the examples that are sentences of the prompt. [default: 0.25 where the trainer chooses words]",
)
@click.option("--placement", type=click.Choice(["system", "block", "prefix"]), help="[default: system]")
@click.option("--recipe", type=click.Choice(["default", "paper"]), help="Set of default values.")
@click.option("--init", help="Initial vectors: search, text:<words>, file:<tokens>, mean or random. [default: search]")
@click.option("--steps", type=click.IntRange(0), help="Steps of distillation. [default: 480]")
@click.option("--batch-size", type=click.IntRange(1), help="Queries per step. [default: 2]")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--tau", type=float, help="Distillation temperature (Eq. 3).")
@click.option(
    "--lambda", "lam", type=float, help="Weight of the distillation loss (Eq. 4). A value below 1 needs --ae."
)
@click.option(
    "--ae",
    help="[AE] file from `train-ae`, or `builtin` for the default model. Enables the joint loss (lambda 0.9).",
)
@click.option("--reconstruct-steps", type=click.IntRange(0), help="Steps of pure reconstruction before distillation.")
@click.option("--response-tokens", type=click.IntRange(1), help="Maximum response tokens in the loss, per query.")
@click.option("--temperature", type=float, help="Sampling temperature of the teacher. 0 is greedy.")
@click.option("--keep-recitals", is_flag=True, default=None, help="Also train on responses that recite the prompt.")
@click.option(
    "--stop", multiple=True, help="Text that ends a response, as clients send it. \\n is a line break. Repeatable."
)
@click.option(
    "--teacher",
    type=click.Choice(["here", "vllm"]),
    help="Where the teacher writes responses: in this process, or in a vLLM engine that ends before training. "
    "[default: here]",
)
@click.option(
    "--teacher-url",
    help="OpenAI-compatible server of the same model. The server writes the responses. [key: BE_TEACHER_KEY]",
)
@click.option("--teacher-model", help="Name of the model on the server at --teacher-url. [default: --model]")
@click.option(
    "--gold",
    is_flag=True,
    default=None,
    help="Train on the `answer` fields of --queries, not on the teacher's responses.",
)
@click.option("--max-queries", type=click.IntRange(2), help="Maximum number of queries from --queries.")
@click.option(
    "--synthesise",
    type=click.IntRange(8),
    help="Number of queries without --queries. The model writes up to three in four. [default: 300]",
)
@click.option(
    "--writer-url",
    help="OpenAI-compatible server of a larger model. It writes the queries in the model's place, and is sent the "
    "sentences of the prompt. [key: BE_WRITER_KEY]",
)
@click.option("--writer-model", help="Name of the model on the server at --writer-url.")
@click.option("--held-out", type=click.IntRange(1), help="Queries kept for the evaluation: the last of a file.")
@click.option("--test-queries", help="JSONL file of queries that are only measured on. [default: the held-out ones]")
@click.option(
    "--answer-tokens",
    type=click.IntRange(0),
    help="Length of the answers on which facts, ends and loops are counted, in tokens. 0 writes none. [default: 512]",
)
@click.option("--answer-queries", type=click.IntRange(1), help="Maximum number of these answers. [default: all]")
@click.option(
    "--scores-only", is_flag=True, default=None, help="Evaluate KL only. Generate no answers and measure no sentences."
)
@click.option("--summary", help="Short text with the same intent. The evaluation compares the token with it.")
@click.option("--seed", type=int, help="Random seed. The same seed gives the same token. [default: 0]")
@click.option("--device", help="auto, cpu, cuda, ... [default: auto]")
@click.option(
    "--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), help="Data type of the frozen model."
)
@click.option("--with-prompt", is_flag=True, default=None, help="Store the prompt's text in the token file.")
@click.option("--config", help="Settings file of an earlier run (run.yaml). Command-line options override it.")
@click.option("--batch-file", help="JSONL file of prompts. Train one token for each. -o is then a folder.")
@click.option("--run-dir", help="Run folder. [default: runs/<id>-<digest of the settings>]")
@click.option("--resume", help="Continue the run in this folder.")
@click.option(
    "--fresh",
    is_flag=True,
    help="Delete the run folder's checkpoint, result and generated responses, then start again.",
)
@click.option(
    "--plan", "only_plan", is_flag=True, help="Print what would be done, with estimated minutes and memory. Do nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def command(
    config: str | None,
    batch_file: str | None,
    run_dir: str | None,
    resume: str | None,
    fresh: bool,
    only_plan: bool,
    as_json: bool,
    recipe: str | None,
    **options: Any,
) -> None:
    """Train a token that replaces the system prompt in PROMPT_FILE.

    To continue an interrupted run, run the same command again. --fresh starts again.

    With --batch-file, one process trains a token for every prompt of the file.
    """
    from be_serve.cli._training import print_evaluation, short_digest
    from trainer.config import RECIPES, TrainConfig, make_config, read_yaml

    given = _given(options)
    if resume:
        config, run_dir = str(Path(resume) / "run.yaml"), resume
    values = TrainConfig.overridden({**RECIPES[recipe or "default"], **(read_yaml(config) if config else {})}, given)
    if "ae" in given and "lam" not in values:
        values["lam"] = 0.9
    values.setdefault("model", DEFAULT_MODEL)
    if batch_file:
        if "prompt_file" in values or resume or "summary" in given:
            raise InputError("--batch-file names the prompts and summaries. Omit PROMPT_FILE, --resume and --summary.")
        if only_plan:
            _plan_batch(batch_file, values, as_json=as_json)
        else:
            _train_batch(batch_file, values, run_dir, fresh=fresh, as_json=as_json)
        return
    if "prompt_file" not in values:
        raise InputError("Give a prompt file: be-serve train PROMPT_FILE")
    values.setdefault("output", str(Path.cwd() / (Path(values["prompt_file"]).stem + ".safetensors")))
    if "id" not in values:
        values["id"] = validate_be_id(Path(values["output"]).name.removesuffix(".safetensors"), param="--output")
    settings = make_config(values)
    if only_plan:
        from be_serve.cli._training import print_plans

        print_plans(values, [(settings, None)], _load_model, as_json=as_json)
        return
    folder = Path(run_dir) if run_dir else Path("runs") / f"{settings.id}-{short_digest(settings)}"
    model, decoder = _load_model(values)

    from trainer.run import Run

    run = Run(settings, model, folder, decoder=decoder, say=_say)
    if fresh:
        run.forget()
    try:
        result = run.execute()
    except KeyboardInterrupt:
        _say(f"Stopped. The checkpoint is in {folder}. To continue: be-serve train --resume {folder}")
        raise
    summary = {"output": settings.output, **result.to_json()}
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
        click.echo(json.dumps(summary, ensure_ascii=False))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings given on the command line, with absolute paths."""
    from be_serve.cli._training import stop_texts
    from trainer.config import absolute_ae, absolute_init

    if options.pop("no_literal"):
        options["literal"] = False
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "stop" in given:
        given["stop"] = stop_texts(given["stop"])
    if "be_id" in given:
        given["id"] = validate_be_id(given.pop("be_id"), param="--id")
    for name in ("prompt_file", "queries", "test_queries", "output"):
        if name in given:
            given[name] = str(Path(given[name]).absolute())
    if "ae" in given:
        given["ae"] = absolute_ae(given["ae"], Path.cwd())
    if "init" in given:
        given["init"] = absolute_init(given["init"], Path.cwd())
    return given


def _load_model(values: dict[str, Any]) -> tuple[FrozenModel, OfflineDecoder | None]:
    """Return the frozen model, and an offline vLLM engine if `teacher` is `vllm`."""
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


def _plan_batch(batch_file: str, values: dict[str, Any], *, as_json: bool) -> None:
    """Print the plan of every prompt of the file, and their sum."""
    from be_serve.cli._training import print_plans
    from trainer.batch import entry_config, read_batch

    entries = read_batch(batch_file)
    output = Path(values.pop("output", Path.cwd()))
    found = [(entry_config(entry, values, output), entry.prompt) for entry in entries]
    print_plans(values, found, _load_model, as_json=as_json, batch=True)


def _train_batch(batch_file: str, values: dict[str, Any], run_dir: str | None, *, fresh: bool, as_json: bool) -> None:
    """Train a token for every prompt of the file. Raises InputError (exit status 2) if one failed."""
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
        _say(f"Stopped. The checkpoints are in {folder}. To continue, run the same command again.")
        raise
    click.echo(f"\n{'id':<24}{'k':>3}{'KL none':>10}{'KL be':>10}{'rho':>8}  {'verdict':<12}token")
    for outcome in outcomes:
        if outcome.result is None:
            click.echo(f"{outcome.id:<24}{'already finished' if outcome.skipped else f'FAILED: {outcome.fault}'}")
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
        raise InputError(
            f"{failed} of {len(outcomes)} prompts failed. The reasons are above. The other tokens are trained."
        )


def _say(text: str) -> None:
    click.echo(text, err=True)
