"""`be-serve bench train`: time a training step and compare it with a plain training loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from be_serve.models import DEFAULT_MODEL


@click.command("train")
@click.argument("prompt_file")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Model name or folder.")
@click.option("--queries", required=True, help="JSONL file of queries.")
@click.option("--tokens", type=click.IntRange(1), default=1, show_default=True, help="Number of vectors k.")
@click.option("--steps", type=click.IntRange(1), default=12, show_default=True, help="Timed steps for each arm.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--response-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--examples", type=click.IntRange(2), default=64, show_default=True, help="Number of queries to use.")
@click.option(
    "--run-steps",
    type=click.IntRange(1),
    default=160,
    show_default=True,
    help="Steps of the run over which the cost of the teacher cache is spread.",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto")
@click.option("--arm", type=click.Choice(["plain", "be-serve"]), help="Run this arm only and report its peak memory.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def command(
    prompt_file: str,
    model: str,
    queries: str,
    tokens: int,
    steps: int,
    batch_size: int,
    response_tokens: int,
    examples: int,
    run_steps: int,
    device: str,
    dtype: str,
    arm: str | None,
    out: Path | None,
) -> None:
    """Time training steps of be-serve and of a plain loop, in alternation.

    The plain loop runs the teacher in every step and computes full logits. Peak memory is
    measured in a separate process for each arm.
    """
    import torch

    from be_serve.core.prompts import read_prompt_file
    from be_serve.models import resolve_model
    from trainer.data.queries import read_queries
    from trainer.data.teacher import Teacher
    from trainer.model.frozen import FrozenModel
    from trainer.model.memory import peak_bytes, reset_peak
    from trainer.provenance import versions
    from trainer.studies.speed import ARMS, measure

    found = resolve_model(model)
    frozen = FrozenModel.load(found.path, name=found.name, device=device, dtype=dtype)
    teacher = Teacher(frozen, read_prompt_file(prompt_file))
    made = teacher.examples(read_queries(queries)[:examples], response_tokens=response_tokens)
    start_KH = frozen.embed(frozen.slots.prompt_ids(teacher.prompt, template_kwargs=frozen.template_kwargs)[:tokens])
    arms = (arm,) if arm else ARMS
    reset_peak(frozen.device)
    measured = measure(teacher, made, start_KH, steps=steps, batch_size=batch_size, arms=arms)
    result: dict[str, Any] = {
        "prompt_tokens": len(frozen.slots.prompt_ids(teacher.prompt, template_kwargs=frozen.template_kwargs)),
        "k": tokens,
        "batch_size": batch_size,
        "response_tokens": response_tokens,
        "model": found.name,
        "device": torch.cuda.get_device_name() if frozen.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(frozen.dtype).removeprefix("torch."),
        "versions": versions(),
        **measured.to_json(run_steps, batch_size, len(made)),
    }
    if arm:
        result["peak_bytes"] = peak_bytes(frozen.device)
    else:
        for name in ARMS:
            result["arms"][name]["peak_bytes"] = _alone(name)["peak_bytes"]
        _print(result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(result))


def _alone(arm: str) -> dict[str, Any]:
    """Run this command for one arm and two steps in a separate process; return its JSON result."""
    words = [sys.executable, "-m", "be_serve.cli.main", *sys.argv[1:], "--arm", arm, "--steps", "2"]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def _print(result: dict[str, Any]) -> None:
    click.echo(f"{'':<10}{'s a step':>10}{'tokens/s':>10}{'peak GiB':>10}")
    for name, arm in result["arms"].items():
        click.echo(
            f"{name:<10}{arm['step_seconds']:>10.2f}{arm['tokens_per_second']:>10.0f}{arm['peak_bytes'] / 2**30:>10.2f}"
        )
    click.echo(
        f"speed-up {result['speed_up']:.2f}; {result['speed_up_with_cache']:.2f} including the teacher cache. "
        f"Losses differ by at most {result['largest_loss_difference']:.4f}."
    )
