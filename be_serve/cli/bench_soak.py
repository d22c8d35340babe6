"""`be-serve bench soak`: overload a server for minutes and compare every answer."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path

import click

from be_serve.cli.options import benchmark_server_options
from be_serve.models import DEFAULT_MODEL


@click.command("soak")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Model name or folder.")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Length of the run."
)
@click.option("--clients", type=click.IntRange(1), default=16, show_default=True, help="Concurrent clients.")
@click.option(
    "--tokens", type=click.IntRange(2, 64), default=24, show_default=True, help="Number of registered tokens."
)
@click.option(
    "--rows",
    type=click.IntRange(8),
    default=48,
    show_default=True,
    help="Rows for vectors. Choose fewer than the tokens need.",
)
@click.option(
    "--kv-tokens", type=click.IntRange(1024), default=4096, show_default=True, help="Size of the KV cache in tokens."
)
@click.option("--seed", default=0, show_default=True, help="Seed for texts and actions.")
@click.option(
    "--kv-gib", type=click.IntRange(1), default=1, show_default=True, help="KV cache in GiB of each server on a CPU."
)
@benchmark_server_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results and logs. [runs/bench-soak-DATE]")
def command(
    model: str,
    minutes: float,
    clients: int,
    tokens: int,
    rows: int,
    kv_tokens: int,
    seed: int,
    kv_gib: int,
    server_args: tuple[str, ...],
    plugin_args: tuple[str, ...],
    out: Path | None,
) -> None:
    """Overload a server: too few rows, a full KV cache, tokens registered and removed, attacks.

    Stock vLLM answers the tokens' texts first; these answers are the reference. The command
    writes soak.json. Exit status 1: a wrong answer, a successful attack, a server error, growing
    memory, or a run too short or too light to detect these faults.
    """
    from be_serve.core.artifact import write_atomically
    from be_serve.models import resolve_model
    from benchmarks.common.servers import ServerOptions
    from benchmarks.soak import SoakOptions, soak, summary

    options = SoakOptions(
        model=model,
        folder=resolve_model(model).path,
        out=(out or Path("runs") / f"bench-soak-{datetime.now():%Y%m%d-%H%M%S}").resolve(),
        servers=ServerOptions(model, server_args, plugin_args, kv_gib=kv_gib),
        minutes=minutes,
        clients=clients,
        tokens=tokens,
        rows=rows,
        kv_tokens=kv_tokens,
        seed=seed,
    )
    run = asyncio.run(soak(options, lambda line: click.echo(line, err=True)))
    result = run.result()
    write_atomically(options.out / "soak.json", f"{json.dumps(result, indent=1)}\n".encode())
    click.echo("\n".join(summary(result)))
    click.echo(
        json.dumps({key: result[key] for key in ("benchmark", "answers", "attempts", "memory_growth", "faults")})
    )
    if run.interrupted:
        raise click.exceptions.Exit(130)
    if result["faults"]:
        raise click.exceptions.Exit(1)
