"""`be-serve run-batch`: answer the requests of an OpenAI batch file, with tokens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from be_serve.cli._serving import PassOnCommand
from be_serve.cli.options import plugin_options, plugin_variables
from be_serve.core.redaction import redact, redact_word
from be_serve.models import DEFAULT_MODEL

_FAULTY, _STOPPED = 2, 3
_NO_PORT = ("--host", "--port", "--uds", "--api-key", "--root-path", "--ssl-keyfile", "--ssl-certfile", "--headless")


@click.command("run-batch", cls=PassOnCommand)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("-i", "--input-file", required=True, metavar="FILE", help="JSONL file with one request per line.")
@click.option(
    "-o",
    "--output-file",
    required=True,
    metavar="FILE",
    help="JSONL file to write. The answers have the order of the requests.",
)
@click.option("--url", help="Send the requests to this running server. Without --url, the command loads MODEL.")
@click.option("--vllm-api-key", envvar="VLLM_API_KEY", help="vLLM's own API key of the server at --url.")
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Maximum number of concurrent requests.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    show_default=True,
    help="Maximum seconds for one answer.",
)
@click.option("--start-timeout", default=1800.0, show_default=True, help="Maximum seconds to load the model.")
@click.option("--fresh", is_flag=True, help="Rename an earlier output and its journal to .old and start again.")
@plugin_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    input_file: str,
    output_file: str,
    url: str | None,
    vllm_api_key: str | None,
    concurrency: int,
    timeout: float,
    start_timeout: float,
    fresh: bool,
    plugin: dict[str, Any],
) -> None:
    """Answer a file of text requests. It works as `vllm run-batch` and accepts be_id.

    A row: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}.
    Other URLs: /v1/completions, /v1/responses and /v1/messages. The command serves MODEL on a
    private socket until all rows are answered. Every option of `vllm serve` may follow. To
    continue an interrupted batch, run the same command again.

    Exit status: 0 all rows answered; 1 some rows refused or failed (see their `error`); 2 invalid
    command or file; 3 stopped before the end; 130 after Ctrl-C.
    """
    from tqdm import tqdm

    from be_serve.batch import Journal, check_output, connect, read_rows, run_rows, served_models
    from be_serve.core.errors import BatchStopped, InputError, ServerError
    from be_serve.process import Server

    def feed_to(where: str, key: str | None, uds: str | None = None, **options: Any) -> Any:
        async def feed() -> dict[str, Any]:
            width = min(concurrency, len(rows))
            with tqdm(total=len(rows), initial=len(journal), desc="batch", unit="row") as bar:
                async with connect(where, key=key, concurrency=width, timeout=timeout, uds=uds) as client:
                    return await run_rows(client, rows, journal, concurrency=width, done=bar.update, **options)

        return feed()

    async def models() -> str:
        async with connect(str(url), key=vllm_api_key, timeout=60.0) as client:
            return await served_models(client)

    async def here() -> dict[str, Any]:
        key = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="be-serve-") as folder:  # only this user can open it
            socket = Path(folder) / "server"
            line = [sys.executable, "-m", "be_serve.cli.main", "serve", model, *ctx.args, "--uds", str(socket)]
            env = {**os.environ, **plugin_variables(plugin), "VLLM_API_KEY": key}
            async with Server("model's", line, log=None, env=env, at=socket, timeout=start_timeout) as server:
                found: dict[str, Any] = await feed_to(server.url, key, server.socket, alive=lambda: server.alive)
                return found

    if url is not None:
        _refuse(ctx, ["model", "start_timeout", *(name for name in ctx.params if name.startswith("be_"))], "--url")
        if not url:
            raise InputError("--url is empty.")
    else:
        _refuse(ctx, ["vllm_api_key"], "its own server")
        if taken := sorted({a.split("=")[0] for a in ctx.args if a.split("=")[0].replace("_", "-") in _NO_PORT}):
            raise InputError(f"run-batch sets its own address and key. Omit {', '.join(taken)}.")
        if model.startswith("-"):
            raise InputError("Give the model before the options: be-serve run-batch MODEL -i FILE -o FILE [options].")
    rows = read_rows(input_file)
    output = check_output(output_file, input_file)
    try:
        made_by = (
            _made_by(model, ctx.args, plugin_variables(plugin)) if url is None else {"models": asyncio.run(models())}
        )
        with Journal(output, rows, made_by, fresh=fresh) as journal:
            failed: dict[str, Any] = {}
            if len(journal) < len(rows):
                failed = asyncio.run(here() if url is None else feed_to(url, vllm_api_key))
            journal.write(failed)
    except (BatchStopped, ServerError) as exc:
        click.secho(f"be-serve: {exc}", fg="red", err=True)
        faulty = isinstance(exc, ServerError) and exc.exit_status == _FAULTY
        raise click.exceptions.Exit(_FAULTY if faulty else _STOPPED) from exc
    answered = len(rows) - journal.refused - len(failed)
    click.echo(f"{answered} answered, {journal.refused} refused, {len(failed)} failed: {output}")
    if failed:
        click.echo("To retry the failed rows, run the same command again.", err=True)
    for be_id, digests in sorted(journal.digests.items()):
        if len(digests) > 1:
            click.echo(
                f"Token {be_id} was replaced during the batch. The x-be-digest header of each answer names the "
                "version.",
                err=True,
            )
    if failed or journal.refused:
        raise click.exceptions.Exit(1)


def _made_by(model: str, arguments: Sequence[str], settings: Mapping[str, str]) -> dict[str, str]:
    """Return what the answers depend on if the command loads the model: its name, and digests of options and files.

    Secrets are not part of the digests.
    """
    settings = {k: v for k, v in {**os.environ, **settings}.items() if k.startswith("BE_") and "KEY" not in k}
    # Secrets are removed first: the digest of a short password can be found by trying all passwords.
    options = [redact(arguments), sorted((name, redact_word(value)) for name, value in settings.items())]
    entries = [entry.partition("=") for entry in settings.get("BE_TOKEN", "").splitlines()]
    files = [Path(path) for _, _, path in entries]
    for given, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, inside = given.partition("=")
        if name == "--config":
            files.append(Path(inside if equals else value))
    # The server reports a missing file, so the digest takes it as empty.
    contents = [file.read_bytes() if file.is_file() else b"" for file in files]
    return {
        "model": model,
        "options": _digest(json.dumps(options).encode()),
        "files": _digest(*contents),
    }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _refuse(ctx: click.Context, names: Sequence[str], beside: str) -> None:
    """Raise InputError for options that have no effect with `beside`. The message hides their values (secrets)."""
    from be_serve.core.errors import InputError

    source = click.core.ParameterSource.COMMANDLINE
    given = [
        "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        for name in names
        if ctx.get_parameter_source(name) is source
    ]
    if beside == "--url":
        given += [a.split("=")[0] for a in ctx.args if a.startswith("--")]
    if given or (beside == "--url" and ctx.args):
        unused = ", ".join(given) or "further arguments"
        raise InputError(f"With {beside}, run-batch does not use {unused}. Omit {unused}.")
