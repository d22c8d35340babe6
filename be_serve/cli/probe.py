"""`be-serve probe`: measure how many bits one vector of a model can store."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from be_serve.cli.options import ModelChoice, json_option, model_options, seed_option

if TYPE_CHECKING:
    from trainer.model.frozen import FrozenModel


@click.command("probe")
@model_options
@click.option(
    "--corpus",
    multiple=True,
    help="File with texts to store: .txt or .jsonl (field `text`), also .gz. Repeatable. [default: random words]",
)
@click.option("--texts", type=click.IntRange(1), default=4, show_default=True, help="Number of texts.")
@click.option("--length", type=click.IntRange(2), default=64, show_default=True, help="Tokens in each text.")
@click.option("--tokens", type=click.IntRange(1, 16), default=1, show_default=True, help="Number of vectors k.")
@click.option("--one-step", is_flag=True, help="Predict each text in one forward pass from two vectors, e and m.")
@click.option("--shared", is_flag=True, help="With --one-step: train one m for all texts.")
@click.option(
    "--curve",
    is_flag=True,
    help="With --one-step: measure accuracy on the path between two solutions of the first text.",
)
@click.option(
    "--restarts",
    type=click.IntRange(1),
    help="With --one-step: random starts for each text. The best start counts. [default: 1; 2 for --curve]",
)
@click.option("--steps", type=click.IntRange(1), default=600, show_default=True)
@click.option("--lr", type=float, default=1e-2, show_default=True)
@seed_option
@click.option("--run-dir", help="Run folder. [default: runs/probe-<digest>]")
@json_option
def command(
    model: ModelChoice,
    corpus: tuple[str, ...],
    texts: int,
    length: int,
    tokens: int,
    one_step: bool,
    shared: bool,
    curve: bool,
    restarts: int | None,
    steps: int,
    lr: float,
    seed: int,
    run_dir: str | None,
    as_json: bool,
) -> None:
    """Train vectors to reproduce texts and measure their capacity (Kuratov et al., arXiv 2502.13063).

    `be-serve fit` uses the stored result. With --one-step the model receives no text: position i
    of [e, m, m, ...] predicts token i. To continue an interrupted probe, run the same command again.
    """
    from be_serve.core.errors import InputError
    from be_serve.models import be_home
    from trainer.optim.autoencoder import TextBatches
    from trainer.studies.capacity import probe, save_capacity

    if (shared or curve or restarts or one_step) and not (one_step and tokens == 1 and not (shared and curve)):
        raise InputError(
            "--one-step does not allow --tokens above 1. --shared, --curve and --restarts need --one-step. "
            "Give only one of --shared and --curve."
        )
    frozen = model.load()
    if corpus:
        batches = TextBatches(frozen, corpus, length=length, batch_size=1, seed=seed)
        pieces = [batch[0] for batch in itertools.islice(batches, texts)]
    else:
        pieces = [_random_words(frozen, length, f"{seed}/{n}") for n in range(texts)]
    if any(len(piece) < length for piece in pieces):
        raise InputError(
            f"A text has fewer than {length} tokens: the tokenizer has too few words. Give a smaller --length."
        )
    key = json.dumps(
        [str(frozen.fingerprint), str(frozen.dtype), pieces, tokens, one_step, shared, curve, restarts, steps, lr, seed]
    )
    folder = Path(run_dir or f"runs/probe-{hashlib.sha256(key.encode()).hexdigest()[:8]}")
    if one_step:
        if curve:
            result = _run_curve(frozen, pieces, folder, restarts or 2, steps, lr, seed)
        else:
            result = _run_one_step(frozen, pieces, folder, shared, restarts or 1, steps, lr, seed)
        if as_json:
            click.echo(json.dumps(result))
        return
    capacity = probe(frozen, pieces, folder, k=tokens, steps=steps, lr=lr, seed=seed)
    path = save_capacity(be_home() / "capacity", frozen, capacity)
    click.echo(f"{'text':<6}{'tokens':>8}{'bits':>9}{'with k':>9}{'gain':>9}{'exact prefix':>14}")
    for n, text in enumerate(capacity.texts):
        click.echo(
            f"{n:<6}{text.tokens:>8}{text.bits_alone:>9.0f}{text.bits_with:>9.0f}{text.gain:>9.0f}{text.exact_prefix:>14}"
        )
    click.echo(f"{capacity.bits_a_vector:.0f} bits per vector (k={tokens}, {steps} steps); written to {path}")
    if as_json:
        click.echo(json.dumps({**asdict(capacity), "bits_a_vector": capacity.bits_a_vector}))


def _run_one_step(
    model: FrozenModel,
    texts: list[list[int]],
    folder: Path,
    shared: bool,
    restarts: int,
    steps: int,
    lr: float,
    seed: int,
) -> dict[str, Any]:
    """Run the one-step probe, print its table and return it as plain data."""
    from trainer.studies.one_step import probe_one_step

    found = probe_one_step(model, texts, folder, shared=shared, restarts=restarts, steps=steps, lr=lr, seed=seed)
    click.echo(f"{'text':<6}{'tokens':>8}{'accuracy':>10}{'mean':>8}{'C_tokens':>10}{'H_LM, bits':>12}")
    for n, text in enumerate(found):
        click.echo(
            f"{n:<6}{text.tokens:>8}{text.accuracy:>10.3f}{text.mean_accuracy:>8.3f}{text.exact_prefix:>10}{text.bits:>12.0f}"
        )
    click.echo(
        f"one step, {'one m for all texts' if shared else 'one m for each text'}; best and mean of {restarts} "
        f"start{'s' if restarts > 1 else ''}; {steps} steps"
    )
    return {"shared": shared, "restarts": restarts, "steps": steps, "texts": [asdict(text) for text in found]}


def _run_curve(
    model: FrozenModel, texts: list[list[int]], folder: Path, restarts: int, steps: int, lr: float, seed: int
) -> dict[str, Any]:
    """Measure and print the accuracy between two solutions of the first text; return it as plain data."""
    from trainer.studies.one_step import connect

    found = connect(model, texts[0], folder, restarts=restarts, steps=steps, lr=lr, seed=seed)
    click.echo(f"{'t':<6}{'line':>8}{'Bezier':>8}   accuracy on the path between two solutions of one text")
    for i, (line, bezier) in enumerate(zip(found.line, found.bezier, strict=True)):
        click.echo(f"{i / (len(found.line) - 1):<6.1f}{line:>8.3f}{bezier:>8.3f}")
    click.echo(f"accuracy of {restarts} starts: {' '.join(f'{share:.3f}' for share in found.starts)}")
    return {"restarts": restarts, "steps": steps, **asdict(found)}


def _random_words(model: FrozenModel, length: int, seed: str) -> list[int]:
    """Return the ids of `length` words, drawn uniformly from the vocabulary so that no model can guess them."""
    decode = model.tokenizer.decode
    rng = random.Random(seed)  # noqa: S311
    ids = range(min(model.vocab_size, len(model.tokenizer)))
    words = (i for i in rng.sample(ids, len(ids)) if decode([i])[:1] == " " and decode([i])[1:].isalpha())
    return list(itertools.islice(words, length))
