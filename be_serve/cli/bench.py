"""`be-serve bench ttft`: time to first token of a token, compared with the full prompt, cold and cached."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from be_serve.cli.bench_load import command as load_command
from be_serve.cli.bench_soak import command as soak_command
from be_serve.cli.bench_train import command as train_command
from be_serve.cli.options import benchmark_server_options
from be_serve.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from benchmarks.ttft.figures import Run


@click.group("bench")
def command() -> None:
    """Measure a server over HTTP, or a training step."""


command.add_command(load_command, "load")
command.add_command(soak_command, "soak")
command.add_command(train_command, "train")


def _parse_cases(_: click.Context, __: click.Parameter, value: str) -> tuple[tuple[int, int], ...]:
    cases = []
    for part in value.split(","):
        prompt, colon, question = part.strip().partition(":")
        if not (colon and prompt.isdecimal() and question.isdecimal() and int(prompt) and int(question)):
            raise click.BadParameter(f"{part!r} is not PROMPT:QUESTION in tokens. Example: 1584:58.")
        cases.append((int(prompt), int(question)))
    if len(set(cases)) < len(cases):
        raise click.BadParameter("the list has the same case twice. Remove one.")
    return tuple(cases)


@command.command("ttft")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Model name or folder.")
@click.option("--revision", help="Revision of a Hugging Face model.")
@click.option(
    "--url",
    help="URL of a running server with the plugin. Without --url, the benchmark starts and stops its own servers.",
)
@click.option("--baseline-url", help="URL of a running stock vLLM, for the plain and full-prompt arms. Needs --url.")
@click.option("--be-id", help="Token that the server at --url already has. Give its number of vectors with --k.")
@click.option(
    "--token",
    "token_file",
    type=click.Path(path_type=Path),
    help="Token file to measure. [default: the benchmark makes a token]",
)
@click.option("--k", default=1, show_default=True, type=click.IntRange(1, 4096), help="Number of vectors in the token.")
@click.option(
    "--cases",
    default="337:26,1584:58,3000:58",
    show_default=True,
    callback=_parse_cases,
    help="Comma-separated PROMPT:QUESTION lengths in tokens.",
)
@click.option(
    "--arms", help="Measure these arms only, for example floor,be. Saves time if questions are slow. [default: all six]"
)
@click.option(
    "--prompt-file", type=click.Path(path_type=Path), help="File with a prompt of yours, in place of the built-in text."
)
@click.option(
    "--question-tokens",
    default=58,
    show_default=True,
    type=click.IntRange(min=1),
    help="Question length in tokens, with --prompt-file.",
)
@click.option("--rounds", default=100, show_default=True, type=click.IntRange(min=1), help="Number of timed rounds.")
@click.option(
    "--close",
    default=2,
    show_default=True,
    type=click.IntRange(min=0),
    help="Extra passes in each round over the arms be and floor only, for a narrower interval of their ratio.",
)
@click.option(
    "--warmup",
    default=3,
    show_default=True,
    type=click.IntRange(min=1),
    help="Untimed rounds before the first timed round.",
)
@click.option("--quick", is_flag=True, help="Run 10 rounds of the paper's two cases only.")
@click.option("--max-tokens", default=2, show_default=True, type=click.IntRange(min=1), help="Tokens in each answer.")
@click.option("--seed", default=0, show_default=True, help="Seed for texts, order and bootstrap.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results and logs. [runs/bench-ttft-DATE]")
@benchmark_server_options
@click.option(
    "--kv-gib",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="KV cache in GiB of each server that the benchmark starts on a CPU.",
)
@click.option("--start-timeout", default=600.0, show_default=True, help="Seconds that a server may take to start.")
@click.option(
    "--freeze/--no-freeze",
    default=True,
    show_default=True,
    help="Suspend the idle server during requests to the other one. Applies to servers that the benchmark starts.",
)
@click.option(
    "--pause",
    type=click.FloatRange(min=0),
    help="Seconds to wait before a request to the other server. [1.2 for --url and --baseline-url on one host, else 0]",
)
@click.option(
    "--admin-key",
    envvar="BE_ADMIN_KEY",
    help="Admin key of the server at --url, to register a token. [env BE_ADMIN_KEY]",
)
@click.option("--api-key", envvar="VLLM_API_KEY", help="vLLM's own API key of the servers. [env VLLM_API_KEY]")
@click.option("--check", is_flag=True, help="Exit with status 1 if a bound is missed or not measured.")
@click.pass_context
def ttft(
    ctx: click.Context,
    model: str,
    revision: str | None,
    url: str | None,
    baseline_url: str | None,
    be_id: str | None,
    token_file: Path | None,
    k: int,
    cases: tuple[tuple[int, int], ...],
    arms: str | None,
    prompt_file: Path | None,
    question_tokens: int,
    rounds: int,
    close: int,
    warmup: int,
    quick: bool,
    max_tokens: int,
    seed: int,
    out: Path | None,
    server_args: tuple[str, ...],
    plugin_args: tuple[str, ...],
    kv_gib: int,
    start_timeout: float,
    freeze: bool,
    pause: float | None,
    admin_key: str | None,
    api_key: str | None,
    check: bool,
) -> None:
    """Measure the time to first token of a [BE] token and of five other arms.

    The command starts a server with the plugin and a stock vLLM server, or uses --url and
    --baseline-url. It interleaves the requests of all arms. It prints a table and writes
    ttft.json (every sample) and ttft.png. The last printed line is one JSON object.
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if baseline_url and not url:
        raise click.UsageError("--baseline-url needs --url. Without both, the benchmark starts its own servers.")
    if be_id and (not url or token_file):
        raise click.UsageError("--be-id names a token of the server at --url. Give --url, and do not give --token.")
    if prompt_file and "cases" in given:
        raise click.UsageError(
            "--prompt-file sets the prompt length. Set the question length with --question-tokens, not with --cases."
        )
    if quick:
        rounds = rounds if "rounds" in given else 10
        warmup = warmup if "warmup" in given else 1
        cases = cases if "cases" in given else cases[:2]
    if prompt_file:
        cases = ((0, question_tokens),)

    import asyncio

    from be_serve.core.artifact import Token
    from be_serve.core.prompts import read_prompt_file
    from be_serve.models import resolve_model
    from benchmarks.common.servers import ServerOptions
    from benchmarks.ttft.run import TTFTOptions, measure_ttft

    token = Token.load(token_file) if token_file else None
    if k > 1024 and not any(argument.startswith("--be-rows") for argument in plugin_args):
        plugin_args = (*plugin_args, "--be-rows", str(k))
    resolved = resolve_model(model, revision=revision) if not (url and (be_id or token)) else None
    options = TTFTOptions(
        model=model,
        out=(out or Path("runs") / f"bench-ttft-{datetime.now():%Y%m%d-%H%M%S}").resolve(),
        servers=ServerOptions(model, server_args, plugin_args, kv_gib, start_timeout),
        folder=resolved.path if resolved else None,
        revision=resolved.revision if resolved else revision,
        url=url,
        baseline_url=baseline_url,
        be_id=be_id,
        token=token,
        admin_key=admin_key,
        api_key=api_key,
        k=token.manifest.k if token else k,
        rounds=rounds,
        close=close,
        warmup=warmup,
        cases=cases,
        arms=tuple(name.strip() for name in arms.split(",")) if arms else (),
        prompt=read_prompt_file(prompt_file) if prompt_file else None,
        max_tokens=max_tokens,
        seed=seed,
        freeze=freeze,
        pause=pause,
    )
    try:
        run = asyncio.run(measure_ttft(options, lambda line: click.echo(line, err=True)))
    except asyncio.CancelledError:  # SIGTERM before the first round
        raise click.Abort from None
    if status := _report(run, options.out, check):
        sys.exit(status)


def _report(run: Run, out: Path, check: bool) -> int:
    """Write and print the result; return the exit status."""
    from benchmarks.ttft.chart import draw
    from benchmarks.ttft.figures import analyse
    from benchmarks.ttft.report import summary, table, write_json

    figures = analyse(run)
    json_path, png_path = out / "ttft.json", out / "ttft.png"
    write_json(run, figures, json_path)
    if run.samples:
        draw(run, figures, png_path)
    click.echo(table(run, figures))
    click.echo(summary(run, figures, json_path=json_path, png_path=png_path if run.samples else None))
    if run.stopped:
        click.secho(f"be-serve: {run.stopped}", fg="red", err=True)
        return 2
    if run.interrupted:
        return 130
    return int(check and not all(verdict["pass"] for verdict in figures["verdicts"]))
