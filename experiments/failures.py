"""Each failure mode of the sources, brought about on purpose by its cause, and what our detectors say.

    python experiments/failures.py PROMPT_FILE QUERIES.jsonl --out failures.json

memory             reconstruction alone, without [AE]: the paper's copy trigger
copying            tuned on answers that recite the prompt, as some of the teacher's do
refusal            tuned on answers that refuse, as a safety-tuned teacher's would
template_collapse  tuned on a few answers of one form, for many epochs
fast               a learning rate a hundred times too high
repetition         tuned on answers that loop, as a small teacher's do
persona_drift      first turns only, few queries, many epochs: measured over six turns

`memory` and `fast` are causes from the sources that may bring about nothing on a model at hand.

For each the share of answers with its signature is recorded for the token and for
the full prompt, and whether the verdict names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from be_serve.cli.options import ModelChoice, model_options
from be_serve.core.digests import digest_of
from be_serve.core.prompts import read_prompt_file
from trainer.data.queries import Query, drop_near_duplicates, read_queries, split_held_out
from trainer.data.teacher import Teacher
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.robustness import measure_turns
from trainer.evaluation.verdict import judge
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import SoftToken
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Distil, Memorise, Stage, Tune
from trainer.optim.starts import random_start

K = 4
REFUSAL = "I'm sorry, but as an AI language model I cannot take on a role or share personal opinions."
LOOP = "It is a long way. " * 12
OPTIONS = "A) Yes, of course. B) No, never. C) It depends on the day."


def gold(teacher: Teacher, queries: Sequence[Query], answer: str) -> Distil:
    """A stage on the given answer to every query."""
    asked = [replace(query, answer=answer) for query in queries]
    return Distil(teacher.model, teacher.examples(asked, response_tokens=32, gold=True))


def cases(teacher: Teacher, training: Sequence[Query], steps: int) -> dict[str, tuple[Stage, int, float]]:
    """What is trained for each failure: the stage, its steps, its learning rate."""
    model = teacher.model
    ids = model.tokenizer.encode(teacher.prompt, add_special_tokens=False)
    own = teacher.examples(training[:64], response_tokens=64)
    return {
        "memory": (Memorise(model, ids), 5 * steps, 1e-2),
        "copying": (Tune(gold(teacher, training[:64], model.tokenizer.decode(ids[:32]))), 5 * steps, 1e-2),
        "refusal": (Tune(gold(teacher, training[:64], REFUSAL)), steps, 1e-2),
        "template_collapse": (Tune(gold(teacher, training[:8], OPTIONS)), steps, 1e-2),
        "fast": (Distil(model, own), steps, 1.0),
        "repetition": (Tune(gold(teacher, training[:64], LOOP)), steps, 1e-2),
        "persona_drift": (Distil(model, own[:8]), steps, 3e-2),
    }


def train(model: FrozenModel, stage: Stage, steps: int, lr: float, folder: Path, key: list[object]) -> Tensor:
    """The vectors [K, H] of one failure; `key` is all that decides its curve."""
    folder.mkdir(parents=True, exist_ok=True)
    start = random_start(model, K, 0).vectors_KH.to(model.device)
    training = Training(SoftToken(start), [(stage, steps)], Optimisation(lr), folder=folder, digest=digest_of(key))
    fit(model, [training])
    if training.fault:
        raise training.fault
    return training.token.vectors.detach()


def record(
    name: str, teacher: Teacher, held_out: Sequence[Query], vectors_KH: Tensor, say: Callable[[str], None]
) -> dict[str, Any]:
    """Signatures, turns and the verdict of a token made to fail."""
    evaluation = evaluate(teacher, held_out[:16], vectors_KH, samples=12)
    if name == "persona_drift":
        evaluation.turns = measure_turns(teacher, held_out, vectors_KH, "system", turns=6)
    verdict = judge(evaluation)
    ours, full = evaluation.signatures["be"], evaluation.signatures["full"]
    signature = {"memory": "copying", "fast": "repetition"}.get(name, name)
    words = "persona drift" if name == "persona_drift" else f"{signature.replace('_', ' ')} in "
    found = {
        "share": ours.get(signature),
        "share_full": full.get(signature),
        "named_by_the_verdict": any(words in reason for reason in verdict.reasons),
        "verdict": verdict.to_json(),
        "rho": evaluation.rho,
        "signatures": evaluation.signatures,
        "turns": evaluation.turns,
        "answers": [sample["be"] for sample in evaluation.samples[:3]],
    }
    say(f"{name}: {found['share']} (full {found['share_full']}), named: {found['named_by_the_verdict']}; {verdict}")
    return found


@click.command()
@click.argument("prompt_file")
@click.argument("queries")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True)
@click.option("--only", multiple=True, help="One of the failures; may be repeated.")
@click.option("--run-dir", type=click.Path(path_type=Path), default=Path("runs/failures"), show_default=True)
@model_options
def main(
    prompt_file: str, queries: str, out: Path, steps: int, only: tuple[str, ...], run_dir: Path, model: ModelChoice
) -> None:
    """Bring about each failure, and say whether it is detected."""
    torch.manual_seed(0)
    frozen = model.load()
    run_dir.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(frozen, read_prompt_file(prompt_file), run_dir)
    training, held_out = split_held_out(drop_near_duplicates(read_queries(queries)), 48)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for name, (stage, own_steps, lr) in cases(teacher, training, steps).items():
        if not only or name in only:
            vectors_KH = train(
                frozen,
                stage,
                own_steps,
                lr,
                run_dir / name,
                [name, teacher.prompt, [q.chat_json() for q in training], own_steps, lr, str(frozen.fingerprint)],
            )
            found[name] = record(name, teacher, held_out, vectors_KH, click.echo)
            out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
