"""`be-serve fit PROMPT_FILE`: estimate how many vectors a prompt's wording needs."""

from __future__ import annotations

import json
import re
import textwrap

import click

from be_serve.cli.options import ModelChoice, json_option, model_options

# Vectors lose this wording first: ids, numbers, addresses, code, schemas.
_VERBATIM = re.compile(r"\d{2,}|https?://|\S+@\S+|[{}<>`]|\b[A-Z]{2,}[-_]\w+")


@click.command("fit")
@click.argument("prompt_file")
@model_options
@json_option
def command(prompt_file: str, model: ModelChoice, as_json: bool) -> None:
    """Compare the bits of a prompt's wording with the bits that the model's vectors can store.

    Run `be-serve probe` once for the model first. The result covers wording only. It does not
    predict how much behaviour a token keeps: over 20 prompts of the default model the rank
    correlation was 0.14 (-0.37 to 0.59). To measure behaviour, train a token and run `eval`.
    """
    from be_serve.core.errors import InputError
    from be_serve.core.prompts import read_prompt_file
    from be_serve.models import be_home
    from trainer.studies.capacity import FITS, LOSES, load_capacity, will_it_fit

    frozen = model.load()
    capacity = load_capacity(be_home() / "capacity", frozen)
    if capacity is None:
        raise InputError(
            f"The capacity of {frozen.name} is not measured yet. Run: be-serve probe --model {frozen.name}"
        )
    result = will_it_fit(frozen, read_prompt_file(prompt_file), capacity)
    verbatim = [text for text, _ in result.clauses if _VERBATIM.search(text)]
    click.echo(f"demand {result.demand_bits:.0f} bits, capacity {result.bits_a_vector:.0f} bits per vector\n")
    click.echo(f"{'k':>3}{'demand / capacity':>20}")
    for k in (1, 2, 4, 8, 16):
        share = result.share(k)
        word = "keeps the wording" if share <= FITS else "loses details" if share <= LOSES else "loses the wording"
        click.echo(f"{k:>3}{share:>20.2f}  {word}")
    fewest = result.recommended_k()
    click.echo(
        f"\nto keep the wording: {f'--tokens {fewest}' if fewest else 'more than 16 vectors, or keep a part as text'}\n"
        "this does not predict the behaviour (Spearman 0.14 over 20 prompts): "
        "train with --tokens 4 or 16, then run eval"
    )
    if verbatim:
        click.echo("\nkeep these sentences as text (they contain numbers, names or schemas):")
        for text in verbatim:
            click.echo(textwrap.fill(text, 100, initial_indent="  - ", subsequent_indent="    "))
    if as_json:
        shares = {str(k): result.share(k) for k in (1, 2, 4, 8, 16)}
        clauses = [{"text": text, "bits": bits, "verbatim": text in verbatim} for text, bits in result.clauses]
        click.echo(
            json.dumps(
                {
                    "demand_bits": result.demand_bits,
                    "bits_a_vector": result.bits_a_vector,
                    "share": shares,
                    "recommended_k": fewest,
                    "clauses": clauses,
                }
            )
        )
