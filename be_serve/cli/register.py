"""`be-serve register FILE`: upload a token to a running server."""

from __future__ import annotations

import click

from be_serve.cli.options import remote_server_options


@click.command("register")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--id", "be_id", help="Register under this id instead of the one in the file.")
@click.option(
    "--match/--no-match",
    default=None,
    help="Also answer requests, of any client, whose system message is the prompt itself. [default: as it is]",
)
@click.option("--replace", is_flag=True, help="Make another file under the id a new version.")
@click.option(
    "--with-prompt",
    "prompt_file",
    type=click.Path(dir_okay=False),
    help="File with the token's prompt. The server stores the text and answers by it where the token cannot, for "
    "requests with `be_fallback`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the server's answer as JSON.")
@remote_server_options
def command(
    file: str,
    be_id: str | None,
    match: bool | None,
    replace: bool,
    prompt_file: str | None,
    as_json: bool,
    url: str,
    api_key: str,
    vllm_api_key: str | None,
) -> None:
    """Upload the token FILE; no restart is needed."""
    import json

    from be_serve.client import BEClient
    from be_serve.core.prompts import read_prompt_file

    prompt = read_prompt_file(prompt_file) if prompt_file else None
    with BEClient(url, api_key=api_key, vllm_api_key=vllm_api_key) as client:
        manifest, created = client.register(file, be_id=be_id, match=match, replace=replace, prompt=prompt)
    if as_json:
        click.echo(json.dumps({**manifest, "created": created}))
        return
    what = "Registered" if created else "Already registered:"
    click.echo(
        f"{what} {manifest['id']} version {manifest['version']}: k={manifest['k']} in place of "
        f"{manifest['prompt']['tokens']} tokens, digest {manifest['digest'][:16]}. "
        f'Send {{"be_id": "{manifest["id"]}"}} with a chat request. '
        f"Exact match is {'on' if manifest['match'] else 'off'}, "
        f"its full prompt {'can' if manifest.get('fallback') else 'cannot'} stand in for it (be_fallback)."
    )
