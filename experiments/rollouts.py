"""A token's own answers to queries, as a file of gold answers: data for an on-policy finish.

    python experiments/rollouts.py TOKEN QUERIES.jsonl --out rollouts.jsonl
    be-serve train PROMPT --queries rollouts.jsonl --gold --init file:TOKEN ...

Training then minimises KL(full || be) where the token itself leads, in place of where the
full prompt's answers led.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch

from be_serve.cli.options import ModelChoice, model_options
from be_serve.core.artifact import Token
from trainer.data.queries import read_queries, write_queries
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm


@click.command()
@click.argument("token_file")
@click.argument("queries_file")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--max-queries", type=click.IntRange(1))
@click.option("--temperature", type=float, default=0.0, show_default=True)
@model_options
def main(
    token_file: str, queries_file: str, out: Path, max_queries: int | None, temperature: float, model: ModelChoice
) -> None:
    """Write QUERIES_FILE with the answers that TOKEN_FILE gives."""
    frozen = model.load()
    token = Token.load(token_file)
    token.check_model(frozen.fingerprint, frozen.hidden_size, served=frozen.name)
    queries = read_queries(queries_file)[:max_queries]
    arm = Arm.of_vectors(frozen, torch.from_numpy(token.vectors.copy()), queries, token.manifest.placement)
    made = arm.prefix.generate(arm.suffixes, RESPONSE_TOKENS, temperature=temperature)
    answers = [frozen.tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
    write_queries(out, [replace(query, answer=text) for query, text in zip(queries, answers, strict=True) if text])


if __name__ == "__main__":
    main()
