"""`be-serve list`: list the tokens of a server."""

from __future__ import annotations

from typing import Any

import click

from be_serve.cli.options import remote_server_options


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the manifests as JSON.")
@remote_server_options
def command(as_json: bool, url: str, api_key: str, vllm_api_key: str | None) -> None:
    """List the tokens that are registered on a running server."""
    import json

    from be_serve.client import BEClient

    with BEClient(url, api_key=api_key, vllm_api_key=vllm_api_key) as client:
        tokens = client.list()
    if as_json:
        click.echo(json.dumps(tokens))
        return
    if not tokens:
        click.echo("The server has no tokens. Register one: be-serve register FILE")
        return
    click.echo(
        f"{'id':<32} {'ver':>3} {'k':>5} {'tokens':>7} {'rho':>6} {'verdict':<11} {'match':<5} {'prompt':<6}  model"
    )
    for token in tokens:
        rho = token["quality"].get("rho")
        rho_text = f"{rho:.3f}" if isinstance(rho, float) else "-"
        click.echo(
            f"{token['id']:<32} {token['version']:>3} {token['k']:>5} {token['prompt']['tokens']:>7} {rho_text:>6} "
            f"{_verdict(token):<11} {'yes' if token['match'] else 'no':<5} "
            f"{'yes' if token.get('fallback') else 'no':<6}  {token['base_model']['name']}"
        )


def _verdict(token: dict[str, Any]) -> str:
    """Return the trainer's verdict; `-` if the manifest holds none that is known (other tools write files, too)."""
    verdict = token["quality"].get("verdict")
    status = verdict.get("status") if isinstance(verdict, dict) else None
    return status if status in ("deployable", "lossy", "failed") else "-"
