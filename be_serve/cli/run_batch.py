"""`be-serve run-batch`: answer an OpenAI batch file, tokens and all."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from be_serve.cli._serving import PASS_ON, prepare, takes_plugin_options


@click.command("run-batch", context_settings=PASS_ON)
@click.argument("model", default="builtin:smollm2-135m-instruct")
@click.option("-i", "--input-file", required=True, metavar="FILE", help="JSONL of requests, one a line.")
@click.option("-o", "--output-file", required=True, metavar="FILE", help="JSONL of answers to write, in their order.")
@click.option("--url", help="Send the file to this running server; no model is loaded.")
@click.option("--vllm-api-key", envvar="VLLM_API_KEY", help="The server's --api-key, where it has one.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=256, show_default=True, help="Requests in flight at one time."
)
@click.option("--fresh", is_flag=True, help="Forget the answers of an earlier run, and write the output anew.")
@takes_plugin_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    input_file: str,
    output_file: str,
    url: str | None,
    vllm_api_key: str | None,
    concurrency: int,
    fresh: bool,
    plugin: dict[str, Any],
) -> None:
    """Answer the requests of a file without a server, as `vllm run-batch` does, with be_id.

    A row: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}.
    Every option of `vllm serve` may follow. The same command continues an interrupted batch.
    """
    from tqdm import tqdm

    from be_serve.batch import Journal, check_output, connect, read_rows, run_rows
    from be_serve.core.errors import InputError

    rows = read_rows(input_file)
    output = check_output(output_file, fresh=fresh)
    journal = Journal.open(output, rows, url or model)
    width = min(concurrency, len(rows))

    async def feed(where: str, asgi: Any = None, key: str | None = None, **options: Any) -> dict[str, Any]:
        with tqdm(total=len(rows), initial=len(journal.answers), desc="batch", unit="row") as bar:
            async with connect(where, asgi=asgi, key=key, concurrency=width) as client:
                return await run_rows(client, rows, journal, concurrency=width, done=bar.update, **options)

    async def here(arguments: list[str]) -> dict[str, Any]:
        from be_serve.serving.vllm_app import open_app

        async with open_app(arguments) as app:
            return await feed("http://batch", app.asgi, app.key, alive=app.alive)

    if url:
        if ctx.args:
            raise InputError(f"--url takes a running server as it is: leave out {' '.join(ctx.args)}.")
        failed = asyncio.run(feed(url, key=vllm_api_key))
    else:
        failed = asyncio.run(here(prepare(model, ctx.args, plugin)))
    refused = sum(answer["error"] is not None for answer in journal.answers.values())
    journal.close(output, rows, failed)
    said = f"{len(rows) - refused - len(failed)} answered, {refused} refused, {len(failed)} failed: {output}"
    click.echo(said if not (refused or failed) else f"{said} (`error` of a row says why)")
