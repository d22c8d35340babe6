"""`be-serve register FILE`: register a token on a running server."""

from __future__ import annotations

import click

from be_serve.cli.options import remote_server_options


@click.command("register")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--id", "be_id", help="Register the token under this id, not under the id in the file.")
@click.option(
    "--match/--no-match",
    default=None,
    help="Also use the token for requests from any client whose system message is exactly the prompt. "
    "[default: unchanged]",
)
@click.option("--replace", is_flag=True, help="If the id exists with another file, register FILE as a new version.")
@click.option(
    "--with-prompt",
    "prompt_file",
    type=click.Path(dir_okay=False),
    help="File with the token's prompt. The server stores the text. For requests with `be_fallback`, the server uses "
    "the text if it cannot use the token.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the server's response as JSON.")
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
    """Upload the token FILE to a running server. The server does not restart."""
    import json

    from be_serve.client import BEClient
    from be_serve.core.prompts import read_prompt_file

    prompt = read_prompt_file(prompt_file) if prompt_file else None
    with BEClient(url, api_key=api_key, vllm_api_key=vllm_api_key) as client:
        manifest, created = client.register(file, be_id=be_id, match=match, replace=replace, prompt=prompt)
    if as_json:
        click.echo(json.dumps({**manifest, "created": created}))
        return
    status = "Registered" if created else "Already registered:"
    click.echo(
        f"{status} {manifest['id']} version {manifest['version']}: k={manifest['k']} replaces "
        f"{manifest['prompt']['tokens']} prompt tokens, digest {manifest['digest'][:16]}. "
        f'To use it, add {{"be_id": "{manifest["id"]}"}} to a chat request. '
        f"Exact match: {'on' if manifest['match'] else 'off'}. "
        f"Stored prompt for be_fallback: {'yes' if manifest.get('fallback') else 'no'}."
    )
