"""`be-serve run-batch`: answer an OpenAI batch file, tokens and all."""

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

_FAULTY, _STOPPED = 2, 3
_NO_PORT = ("--host", "--port", "--uds", "--api-key", "--root-path", "--ssl-keyfile", "--ssl-certfile", "--headless")


@click.command("run-batch", cls=PassOnCommand)
@click.argument("model", default="builtin:smollm2-135m-instruct")
@click.option("-i", "--input-file", required=True, metavar="FILE", help="JSONL of requests, one a line.")
@click.option("-o", "--output-file", required=True, metavar="FILE", help="JSONL of answers to write, in their order.")
@click.option("--url", help="Send the file to this running server; no model is loaded.")
@click.option("--vllm-api-key", envvar="VLLM_API_KEY", help="The --api-key of the server at --url, where it has one.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=256, show_default=True, help="Requests in flight at one time."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    show_default=True,
    help="Seconds that an answer may take.",
)
@click.option("--start-timeout", default=1800.0, show_default=True, help="Seconds until the model must be loaded.")
@click.option("--fresh", is_flag=True, help="Set an earlier output and its answers aside (.old), and begin anew.")
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
    """Answer a file of requests for text, as `vllm run-batch` does, with be_id.

    A row: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}};
    /v1/completions, /v1/responses and /v1/messages may be asked, too. MODEL is served on a port of this
    machine's own until the file is answered; every option of `vllm serve` may follow. The same
    command continues an interrupted batch.

    Exit status: 0 all answered, 1 rows were refused or failed (their `error` says why), 2 a
    faulty command or file, 3 stopped on the way, 130 after Ctrl-C.
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
        with tempfile.TemporaryDirectory(prefix="be-serve-") as folder:  # for this user alone
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
        _refuse(ctx, ["vllm_api_key"], "a server of its own")
        if taken := sorted({a.split("=")[0] for a in ctx.args if a.split("=")[0].replace("_", "-") in _NO_PORT}):
            raise InputError(f"run-batch has a port and a key of its own: leave out {', '.join(taken)}.")
        if model.startswith("-"):
            raise InputError("Name the model first: be-serve run-batch MODEL -i FILE -o FILE [options].")
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
        click.echo("The same command asks the failed rows again.", err=True)
    for be_id, digests in sorted(journal.digests.items()):
        if len(digests) > 1:
            click.echo(f"{be_id} was replaced meanwhile: the answers' x-be-digest headers tell by what.", err=True)
    if failed or journal.refused:
        raise click.exceptions.Exit(1)


def _made_by(model: str, arguments: Sequence[str], settings: Mapping[str, str]) -> dict[str, str]:
    """What the answers of a model that is loaded here depend on. Of its options the digest, without the secrets."""
    settings = {k: v for k, v in {**os.environ, **settings}.items() if k.startswith("BE_") and "KEY" not in k}
    # A digest of a short password would tell it to who tries them all, and answers do not depend on one.
    told = [redact(arguments), sorted((name, redact_word(value)) for name, value in settings.items())]
    entries = [entry.partition("=") for entry in settings.get("BE_TOKEN", "").splitlines()]
    files = [Path(path) for _, _, path in entries]
    for given, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, inside = given.partition("=")
        if name == "--config":
            files.append(Path(inside if equals else value))
    contents = [file.read_bytes() if file.is_file() else b"" for file in files]  # the server says what is wrong
    return {
        "model": model,
        "options": _digest(json.dumps(told).encode()),
        "files": _digest(*contents),
    }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _refuse(ctx: click.Context, names: Sequence[str], beside: str) -> None:
    """Raise InputError for options, given on the command line, that nobody would read. Values may be secret."""
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
        raise InputError(f"Beside {beside} nobody reads {', '.join(given) or 'further words'}: leave it out.")
