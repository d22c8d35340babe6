"""`be-serve bench load`: throughput and inter-token latency of concurrent chats."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from be_serve.cli.options import benchmark_server_options
from be_serve.models import DEFAULT_MODEL


@click.command("load")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Model name or folder.")
@click.option(
    "--beside",
    type=click.Choice(["stock", "prompt-embeds", "resident-rows"]),
    default="stock",
    show_default=True,
    help="The other server: stock vLLM, or vLLM with the plugin and this injection.",
)
@click.option("--rounds", type=click.IntRange(1), default=200, show_default=True, help="Bursts for each arm.")
@click.option(
    "--starts",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="How often both servers are started. The rounds are divided among the starts.",
)
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Untimed rounds after each start.")
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Chats in a burst.")
@click.option("--question-tokens", type=click.IntRange(8), default=58, show_default=True)
@click.option("--max-tokens", type=click.IntRange(2), default=16, show_default=True, help="Tokens in each answer.")
@click.option("--k", type=click.IntRange(1), default=1, show_default=True, help="Number of vectors in the token.")
@click.option(
    "--registered", type=click.IntRange(1), default=100, show_default=True, help="Number of registered tokens."
)
@click.option("--seed", default=0, show_default=True, help="Seed for texts, order and bootstrap.")
@click.option(
    "--kv-gib", type=click.IntRange(1), default=1, show_default=True, help="KV cache in GiB of each server on a CPU."
)
@benchmark_server_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results and logs. [runs/bench-load-DATE]")
def command(
    model: str,
    beside: str,
    rounds: int,
    starts: int,
    warmup: int,
    concurrency: int,
    question_tokens: int,
    max_tokens: int,
    k: int,
    registered: int,
    seed: int,
    kv_gib: int,
    server_args: tuple[str, ...],
    plugin_args: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure what the plugin costs chats without a token: bursts of concurrent chats to two servers in turn.

    The command writes load.json and load.png. The last printed line is one JSON object.
    """
    from be_serve.core.artifact import write_atomically
    from be_serve.models import resolve_model
    from benchmarks.common.servers import ServerOptions
    from benchmarks.load import LoadOptions, measure_load
    from benchmarks.load.chart import draw

    found = resolve_model(model)
    options = LoadOptions(
        model=model,
        folder=found.path,
        out=(out or Path("runs") / f"bench-load-{datetime.now():%Y%m%d-%H%M%S}").resolve(),
        servers=ServerOptions(model, server_args, plugin_args, kv_gib=kv_gib),
        other=beside,
        k=k,
        rounds=rounds,
        starts=starts,
        warmup=warmup,
        concurrency=concurrency,
        question_tokens=question_tokens,
        max_tokens=max_tokens,
        registered=registered,
        seed=seed,
    )
    run = asyncio.run(measure_load(options, lambda line: click.echo(line, err=True)))
    result = run.result()
    write_atomically(options.out / "load.json", f"{json.dumps(result, indent=1)}\n".encode())
    if result["rounds"]:
        draw(result, options.out / "load.png")
    click.echo("\n".join(_table(result, beside)))
    click.echo(json.dumps({key: result[key] for key in ("benchmark", "rounds", "failed_chats", "ratios")}))
    if run.interrupted:
        raise click.exceptions.Exit(130)


def _table(result: dict[str, Any], beside: str) -> list[str]:
    from benchmarks.load.figures import headline, within

    options = result["options"]
    lines = [
        f"{result['rounds']} bursts of {options['concurrency']} chats, {result['starts']} starts of the servers, "
        f"{options['question_tokens']} + {options['k']} tokens in and {options['max_tokens']} out; "
        f"{options['registered']} tokens registered; medians over bursts",
        "",
        f"{'arm':<14}{'tokens/s':>10}{'ITL ms':>10}{'TTFT ms':>10}",
    ]
    for arm, figures in result["arms"].items():
        lines.append(
            f"{arm:<14}{figures['tokens_per_s']:>10.1f}{figures['median_itl_ms']:>10.1f}{figures['median_ttft_ms']:>10.1f}"
        )
    lines += ["", f"ratios over pairs of starts, 95 % interval, (lowest to highest single start); _other is {beside}:"]
    for name, ratios in result["ratios"].items():
        for metric, ratio in ratios.items():
            middle, interval = headline(ratio)
            each = sorted(ratio["of_medians_by_start"])
            reach = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "only one pair"
            lines.append(f"  {name:<24}{metric:<14}{middle:.3f}  {reach:<16} ({each[0]:.3f} to {each[-1]:.3f})")
    for clock, found in result["injection_seconds"].items():
        words = {"wall": "time", "cpu": "CPU time"}[clock]
        lines += ["", f"{words} that the plugin takes for a request with a token: p99 at most {within(found, 0.99)} s"]
    if result["failed_chats"]:
        lines += ["", f"{result['failed_chats']} chats failed: {'; '.join(result['errors'])}"]
    return lines
