"""`python -m benchmarks.gpu`: run all measurements that need a GPU."""

from __future__ import annotations

import asyncio
import shlex
import sys
from datetime import datetime
from pathlib import Path

import click

from be_serve.cli.main import run_command
from be_serve.core.errors import InputError


@click.command("benchmarks.gpu", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--tiny",
    is_flag=True,
    help="Run every step with tiny shapes and few rounds. Works on a CPU; use it to try the command.",
)
@click.option("--steps", default="", help="Run these steps only, in this order: parity,ttft-llama-3.1-8b,... [all]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results. [runs/bench-gpu-DATE]")
@click.option(
    "--models", type=click.Path(path_type=Path), help="Folder for the models that the command makes. [OUT/models]"
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder with a tokenizer. [the built-in model's]")
@click.option("--rounds", type=click.IntRange(1), default=40, show_default=True, help="Rounds of each TTFT step.")
@click.option("--starts", type=click.IntRange(1), default=4, show_default=True, help="Server starts in the step plain.")
@click.option(
    "--soak-minutes", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Length of the step soak."
)
@click.option("--server-arg", "server_args", multiple=True, help="vLLM flag for every server. Repeatable.")
@click.option("--real", help="Model with real weights for the step quality. [the built-in model]")
@click.option("--prompt", type=click.Path(exists=True, path_type=Path), help="System prompt file for the step quality.")
@click.option(
    "--quality-arg",
    "quality_args",
    multiple=True,
    help="More options for `be-serve train` in the step quality. Repeatable.",
)
@click.option("--commit", help="Commit to name in the result, if the sources are outside a repository.")
@click.option("--fresh", is_flag=True, help="Ignore the earlier results in OUT.")
def main(
    tiny: bool,
    steps: str,
    out: Path | None,
    models: Path | None,
    tokenizer: Path | None,
    rounds: int,
    starts: int,
    soak_minutes: float,
    server_args: tuple[str, ...],
    real: str | None,
    prompt: Path | None,
    quality_args: tuple[str, ...],
    commit: str | None,
    fresh: bool,
) -> None:
    """Measure the paper's four model shapes on this machine's GPU: parity, safety, TTFT, plain traffic, training.

    After every step the command writes gpu.json, README.md (tables) and ttft.png into OUT. To continue an
    interrupted run, run the same command again.
    """
    from be_serve.models import DEFAULT_MODEL, resolve_model
    from benchmarks.common.machine import gpus
    from benchmarks.gpu.run import GpuRun
    from benchmarks.gpu.steps import Plan, small

    if not tiny and not gpus():
        raise InputError("nvidia-smi lists no GPU. Use --tiny to run every step with tiny shapes on a CPU.")
    out = (out or Path("runs") / f"bench-gpu-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    plan = Plan(
        out=out,
        models=(models or out / "models").resolve(),
        tokenizer=(tokenizer or resolve_model(DEFAULT_MODEL).path).resolve(),
        rounds=rounds,
        starts=starts,
        soak_minutes=soak_minutes,
        server_args=_words(server_args),
        real=real or DEFAULT_MODEL,
        prompt=prompt or _PROMPT,
        quality_args=_words(quality_args),
    )
    run = GpuRun.open(
        small(plan) if tiny else plan, lambda line: click.echo(line, err=True), commit=commit, fresh=fresh
    )
    status = asyncio.run(run.run([name for name in steps.split(",") if name]))
    click.echo((out / "README.md").read_text(encoding="utf-8") if run.state["steps"] else "Nothing was measured.")
    sys.exit(status)


def _words(values: tuple[str, ...]) -> tuple[str, ...]:
    """Split each argument into shell words, so that one argument can hold `--FLAG VALUE`."""
    return tuple(word for value in values for word in shlex.split(value))


_PROMPT = Path(__file__).resolve().parents[2] / "examples" / "personas" / "raylan-givens.txt"

if __name__ == "__main__":
    run_command(main, "benchmarks.gpu")
