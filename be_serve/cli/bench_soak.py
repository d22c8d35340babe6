"""`be-serve bench soak`: a long time at saturation, every answer compared."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path

import click

from be_serve.cli.options import benchmark_server_options


@click.command("soak")
@click.option("--model", default="builtin:smollm2-135m-instruct", show_default=True, help="Model name or folder.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True)
@click.option("--clients", type=click.IntRange(1), default=16, show_default=True, help="Clients at one time.")
@click.option("--tokens", type=click.IntRange(2, 64), default=24, show_default=True, help="Tokens on the server.")
@click.option("--rows", type=click.IntRange(8), default=48, show_default=True, help="Rows, fewer than the tokens need.")
@click.option(
    "--kv-tokens", type=click.IntRange(1024), default=4096, show_default=True, help="Tokens that the KV cache holds."
)
@click.option("--seed", default=0, show_default=True, help="Seed of texts and actions.")
@click.option("--kv-gib", type=click.IntRange(1), default=1, show_default=True, help="KV cache of a server on a CPU.")
@benchmark_server_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results and logs [runs/bench-soak-DATE].")
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
    """Abuse a server for a while: too few rows, a full KV cache, tokens that come and go, attacks.

    Answers are compared with stock vLLM's to the tokens' texts. Writes soak.json. Exit
    status 1 where an answer was wrong, an attack succeeded, a request failed by our fault,
    memory grew, or the run was too short or too easy to show any of it.
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
