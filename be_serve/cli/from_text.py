"""`be-serve from-text PROMPT_FILE`: write the prompt's input embeddings as a token."""

from __future__ import annotations

from pathlib import Path

import click

from be_serve.core.ids import validate_be_id


@click.command("from-text")
@click.argument("prompt_file")
@click.option("--model", help="Hugging Face name, folder, .gguf file or builtin:NAME. [default: the built-in model]")
@click.option("-o", "--output", required=True, help="Token file to write.")
@click.option("--id", "be_id", help="be_id of the token. [default: the output file's name without .safetensors]")
@click.option("--with-prompt", is_flag=True, help="Store the prompt's text in the token file.")
def command(prompt_file: str, model: str | None, output: str, be_id: str | None, with_prompt: bool) -> None:
    """Write the prompt's input embeddings as a token. The token answers exactly as the full prompt.

    The token is not compressed. Use it as a reference in tests and as a start for experiments.
    """
    from be_serve.core.prompts import read_prompt_file
    from be_serve.models import DEFAULT_MODEL, resolve_model

    be_id = validate_be_id(be_id or Path(output).name.removesuffix(".safetensors"), param="--id")
    prompt = read_prompt_file(prompt_file)
    found = resolve_model(model or DEFAULT_MODEL)

    from trainer.from_text import identity_token
    from trainer.model.frozen import FrozenModel

    frozen = FrozenModel.load(found.path, name=found.name, revision=found.revision, device="cpu")
    token = identity_token(frozen, prompt, be_id, with_prompt=with_prompt)
    digest = token.save(output)
    click.echo(f"{output}: {token.manifest.k} vectors of size {token.manifest.hidden_size}, SHA-256 {digest}")
