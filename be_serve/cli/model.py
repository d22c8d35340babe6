"""`be-serve model NAME`: prepare a model; print its folder and fingerprint."""

from __future__ import annotations

import json

import click

from be_serve.models import DEFAULT_MODEL


@click.command("model")
@click.argument("name", default=DEFAULT_MODEL)
def command(name: str) -> None:
    """Prepare a model and print its name, folder and fingerprint as JSON.

    The first use of a built-in model or a .gguf file converts it.
    """
    from be_serve.core.fingerprint import fingerprint_folder
    from be_serve.models import resolve_model

    model = resolve_model(name)
    result = {"name": model.name, "path": str(model.path), "fingerprint": str(fingerprint_folder(model.path))}
    click.echo(json.dumps(result))
