"""`be-serve remove ID`: remove a token from a server."""

from __future__ import annotations

import click

from be_serve.cli.options import remote_server_options


@click.command("remove")
@click.argument("be_id", metavar="ID")
@click.option("--forget-prompt", is_flag=True, help="Also delete the stored text of the token's prompt.")
@remote_server_options
def command(be_id: str, forget_prompt: bool, url: str, api_key: str, vllm_api_key: str | None) -> None:
    """Remove all versions of token ID. New requests with this id fail at once.

    A stored prompt stays and still answers requests with `be_fallback`. --forget-prompt deletes it.
    """
    from be_serve.client import BEClient

    with BEClient(url, api_key=api_key, vllm_api_key=vllm_api_key) as client:
        kept = client.remove(be_id, prompt=forget_prompt)
    click.echo(f"Removed {be_id}.")
    if kept:
        click.echo(
            f"Its prompt stays stored and answers be_fallback. To delete it: be-serve remove {be_id} --forget-prompt"
        )
