"""Helpers of the training commands: printed tables and names of run folders."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from be_serve.core.artifact import Token
    from trainer.config import TrainConfig
    from trainer.evaluation.evaluate import Evaluation
    from trainer.model.frozen import FrozenModel

_PRINTED_SAMPLES = 3
"""Number of printed samples. The JSON holds all samples."""
_SAMPLE_LINES = 6
"""Lines of each printed answer at most."""


def short_digest(settings: TrainConfig) -> str:
    """Return eight hex digits of the SHA-256 of the settings and of the files that they name."""
    sha = hashlib.sha256(json.dumps(settings.model_dump(), sort_keys=True).encode())
    for name in (settings.prompt_file, *settings.files()):
        if Path(name).is_file():
            sha.update(hashlib.sha256(Path(name).read_bytes()).digest())
    return sha.hexdigest()[:8]


def stop_texts(given: Sequence[str]) -> list[str]:
    """Return the `--stop` options with `\\n` replaced by a line break; empty ones are dropped."""
    return [text.replace("\\n", "\n") for text in given if text]


def trained_stop(token: Token) -> list[str]:
    """Return the stop texts of the token's training from its manifest; empty if the manifest names none."""
    found = token.manifest.recipe.get("stop")
    return [text for text in found if isinstance(text, str) and text] if isinstance(found, list) else []


def _print_answers(evaluation: Evaluation) -> None:
    if evaluation.rho_default is not None:
        click.echo(f"KL(be) / KL(template_default) = {evaluation.rho_default:.3f}")
    for n, line in enumerate(evaluation.answers.lines()):
        click.echo(f"  {line}" if n else line)


def print_plans(
    values: dict[str, Any],
    runs: Sequence[tuple[TrainConfig, str | None]],
    load: Callable[[dict[str, Any]], tuple[FrozenModel, object]],
    *,
    as_json: bool,
    batch: bool = False,
) -> None:
    """Load the model, time it, and print the plan of each run (settings, and its prompt if that is in no file).

    The timing uses the prompt of middle length. Raises InputError for what a run would refuse.
    """
    from trainer.planning.plan import plan_all

    plans = plan_all(lambda: load(values)[0], runs)
    for plan in plans:
        click.echo("\n".join(plan.lines()))
    minutes = sum(plan.total for plan in plans) / 60
    if batch:
        click.echo(f"{len(plans)} tokens: {minutes:.1f} min in all")
    click.echo("Nothing was trained or written.")
    if as_json:
        found = [plan.to_json() for plan in plans]
        summed = {
            "tokens": found,
            "minutes": round(minutes, 3),
            "peak_bytes": max(plan.peak_bytes for plan in plans),
            "free_bytes": plans[0].free_bytes,
        }
        click.echo(json.dumps(summed if batch else found[0], ensure_ascii=False))


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the table of arms, the verdict and a few samples."""
    from trainer.evaluation.verdict import judge

    click.echo(f"\n{evaluation.n_queries} held-out queries, {evaluation.n_tokens} tokens of the full prompt's answers")
    click.echo(f"{'arm':<18}{'KL(full||arm)':>14}{'top-1':>8}{'first KL':>10}{'NLL':>8}")
    for name, row in evaluation.arms.items():
        label = f"{name} (k={evaluation.k})" if name == "be" else name
        click.echo(f"{label:<18}{row['kl']:>14.4f}{row['top1']:>8.3f}{row['first_token_kl']:>10.4f}{row['nll']:>8.3f}")
    low, high = evaluation.rho_interval
    click.echo(
        f"rho = KL(be) / KL(none) = {evaluation.rho:.3f}, 95 % interval {low:.3f} to {high:.3f} "
        "(0: the full prompt, 1: no prompt)"
    )
    click.echo(
        f"gain retained, in log-likelihood of those answers: {evaluation.gain_retained:.2f} (1: the full prompt)"
    )
    _print_answers(evaluation)
    if evaluation.recitals:
        click.echo(
            f"excluded: {evaluation.recitals} queries, because the full prompt's answer recites the prompt "
            f"(the token's answer recites it for {evaluation.recitals_be}; "
            f"rho with these queries {evaluation.rho_with_recitals:.3f})"
        )
    if evaluation.compliance:
        for line in evaluation.compliance.lines():
            click.echo(f"  {line}")
    for turn in evaluation.turns:
        click.echo(f"  turn {turn['turn']}: KL none {turn['none']:.3f}, be {turn['be']:.3f}, rho {turn['rho']:.3f}")
    if evaluation.off_topic:
        off_topic = evaluation.off_topic
        click.echo(
            f"  off topic: KL none {off_topic['none']:.3f}, be {off_topic['be']:.3f}, rho {off_topic['rho']:.3f}"
        )
    for effect in sorted(evaluation.clauses, key=lambda c: -c.kl):
        kept = "too few tokens to measure" if effect.retained is None else f"token keeps {effect.retained:.0%}"
        click.echo(f"  sentence effect KL {effect.kl:.3f}, {kept}: {textwrap.shorten(effect.text, 70)}")
    if evaluation.samples:
        shares = [
            f"{name.replace('_', ' ')} {share:.0%} ({evaluation.signatures['full'][name]:.0%})"
            for name, share in evaluation.signatures["be"].items()
        ]
        click.echo(f"failure signatures in {len(evaluation.samples)} answers, token (full prompt): {', '.join(shares)}")
    for rival, tally in evaluation.judged.items():
        score = "no readable verdict" if tally.score is None else f"score {tally.score:.2f} (0.50: no difference)"
        click.echo(
            f"judge, token against {rival}: token {tally.wins} better, {tally.ties} equal, {tally.losses} worse, "
            f"{tally.unreadable} unreadable; {score}"
        )
    click.echo(f"verdict: {judge(evaluation)}")
    for sample in evaluation.samples[:_PRINTED_SAMPLES]:
        click.echo()
        for name, text in sample.items():
            lines = textwrap.TextWrapper(
                100,
                initial_indent=f"{name:>8}: ",
                subsequent_indent=" " * 10,
                max_lines=_SAMPLE_LINES,
                placeholder=" [...]",
            )
            click.echo(lines.fill(" ".join(text.split())))
