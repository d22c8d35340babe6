"""`be-serve model NAME`: prepare a model, print its folder and fingerprint."""

from __future__ import annotations

import json

import click

from be_serve.models import DEFAULT_MODEL


@click.command("model")
@click.argument("name", default=DEFAULT_MODEL)
def command(name: str) -> None:
    """Prepare a model (the built-in one is converted on first use) and print where it is."""
    from be_serve.core.fingerprint import fingerprint_folder
    from be_serve.models import resolve_model

    model = resolve_model(name)
    shown = {"name": model.name, "path": str(model.path), "fingerprint": str(fingerprint_folder(model.path))}
    click.echo(json.dumps(shown))
