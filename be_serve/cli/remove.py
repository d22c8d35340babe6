"""`be-serve remove ID`: take a token off a server."""

from __future__ import annotations

import click

from be_serve.cli.remote import server_options


@click.command("remove")
@click.argument("be_id", metavar="ID")
@click.option("--with-prompt", is_flag=True, help="Also forget its prompt's text, where that was stored.")
@server_options
def command(be_id: str, with_prompt: bool, url: str, api_key: str, vllm_api_key: str | None) -> None:
    """Remove token ID with all its versions; it stops answering at once.

    A prompt stored with it goes on answering requests with `be_fallback`, unless --with-prompt.
    """
    from be_serve.client import BEClient

    with BEClient(url, api_key=api_key, vllm_api_key=vllm_api_key) as client:
        client.remove(be_id, prompt=with_prompt)
    click.echo(f"Removed {be_id}.")
