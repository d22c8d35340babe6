"""`be-serve remove ID`: take a token off a server."""

from __future__ import annotations

import click

from be_serve.cli.options import remote_server_options


@click.command("remove")
@click.argument("be_id", metavar="ID")
@click.option("--forget-prompt", is_flag=True, help="Also forget its prompt's text, where that was stored.")
@remote_server_options
def command(be_id: str, forget_prompt: bool, url: str, api_key: str, vllm_api_key: str | None) -> None:
    """Remove token ID with all its versions; it stops answering at once.

    A prompt stored with it goes on answering requests with `be_fallback`, unless --forget-prompt.
    """
    from be_serve.client import BEClient

    with BEClient(url, api_key=api_key, vllm_api_key=vllm_api_key) as client:
        kept = client.remove(be_id, prompt=forget_prompt)
    click.echo(f"Removed {be_id}.")
    if kept:
        click.echo(f"Its prompt is still stored, and answers be_fallback: be-serve remove {be_id} --forget-prompt.")
