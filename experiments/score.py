"""Many tokens of one prompt on the same held-out queries, in one pass, with paired differences.

    python experiments/score.py PROMPT HELDOUT.jsonl TOKENS... --base TOKEN --out score.json

The shared arms (none, summary, full) are computed once. The difference of each token's rho
from the base's has a 95 % bootstrap interval over the queries, which both answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from be_serve.cli.options import ModelChoice, model_options
from be_serve.core.artifact import Token
from be_serve.core.prompts import read_prompt_file
from trainer.data.queries import read_queries
from trainer.data.teacher import Teacher
from trainer.evaluation.arms import RESPONSE_TOKENS, Arm, chats, rho_interval, score_arms


def difference(own_N: Tensor, base_N: Tensor, none_N: Tensor, lengths_Q: Tensor, draws: int = 2000) -> list[float]:
    """95 % interval of rho(own) - rho(base)."""
    own, base, none = (
        torch.stack([part.sum() for part in values.split(lengths_Q.tolist())]) for values in (own_N, base_N, none_N)
    )
    drawn = torch.randint(len(lengths_Q), (draws, len(lengths_Q)), generator=torch.Generator().manual_seed(0))
    ratios = (own - base)[drawn].sum(1) / none[drawn].sum(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975])).tolist()
    return [low, high]


@click.command()
@click.argument("prompt_file")
@click.argument("queries")
@click.argument("tokens", nargs=-1, required=True)
@click.option("--base", help="The token that the others are held against. [default: the first]")
@click.option("--summary", help="File with a short text of the same intent.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of the teacher's responses.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@model_options
def main(
    prompt_file: str,
    queries: str,
    tokens: tuple[str, ...],
    base: str | None,
    summary: str | None,
    cache: Path | None,
    out: Path,
    model: ModelChoice,
) -> None:
    """Score tokens side by side."""
    frozen = model.load()
    teacher = Teacher(frozen, read_prompt_file(prompt_file), cache)
    examples = teacher.examples(read_queries(queries), response_tokens=RESPONSE_TOKENS)
    reference = [example for example in examples if not teacher.recites(example)]
    asked = [example.query for example in reference]
    lengths_Q = torch.tensor([len(example.response) for example in reference])
    arms = {"none": Arm.of_ids(frozen, chats(frozen, asked, ""))}
    if summary:
        arms["summary"] = Arm.of_ids(frozen, chats(frozen, asked, read_prompt_file(summary)))
    for path in tokens:
        token = Token.load(path)
        token.check_model(frozen.fingerprint, frozen.hidden_size, served=frozen.name)
        vectors_KH = torch.from_numpy(token.vectors.copy())
        arms[Path(path).stem] = Arm.of_vectors(frozen, vectors_KH, asked, token.manifest.placement)
    scores = score_arms(frozen, reference, arms)
    none_N = scores["none"].kl_N
    base_N = scores[Path(base or tokens[0]).stem].kl_N
    found: dict[str, dict[str, Any]] = {}
    for name, arm in scores.items():
        found[name] = {
            **arm.means(lengths_Q),
            "rho": float(arm.kl_N.mean() / none_N.mean()),
            "rho_interval": list(rho_interval(arm.kl_N, none_N, lengths_Q)),
            "difference": difference(arm.kl_N, base_N, none_N, lengths_Q),
        }
    result = {
        "n_queries": len(reference),
        "n_tokens": int(lengths_Q.sum()),
        "recitals": len(examples) - len(reference),
        "base": Path(base or tokens[0]).stem,
        "arms": found,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo("| in the prompt's place | KL | rho | 95 % | rho less the base's, 95 % | first-token KL | top-1 |")
    click.echo("|---|---|---|---|---|---|---|")
    for name, row in sorted(found.items(), key=lambda item: item[1]["kl"]):
        low, high = row["rho_interval"]
        less, more = row["difference"]
        click.echo(
            f"| {name} | {row['kl']:.4f} | {row['rho']:.3f} | {low:.2f} to {high:.2f} | {less:+.3f} to {more:+.3f} | "
            f"{row['first_token_kl']:.3f} | {row['top1']:.2f} |"
        )


if __name__ == "__main__":
    main()
