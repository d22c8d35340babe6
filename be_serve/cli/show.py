"""`be-serve show ID`: print the manifest of a token on a server."""

from __future__ import annotations

import click

from be_serve.cli.options import remote_server_options


@click.command("show")
@click.argument("be_id", metavar="ID")
@remote_server_options
def command(be_id: str, url: str, api_key: str, vllm_api_key: str | None) -> None:
    """Print the manifest of token ID as JSON."""
    import json

    from be_serve.client import BEClient

    with BEClient(url, api_key=api_key, vllm_api_key=vllm_api_key) as client:
        click.echo(json.dumps(client.show(be_id), indent=2))
