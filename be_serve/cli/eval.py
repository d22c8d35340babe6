"""`be-serve eval T.safetensors`: compare a token with no prompt, a summary and the full prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("eval")
@click.argument("token_file")
@click.option(
    "--with",
    "others",
    multiple=True,
    help="Another token in the same slot, after the first one. --prompt must then contain both prompts. Repeatable.",
)
@click.option("--prompt", "prompt_file", required=True, help="File with the prompt that the token replaces.")
@click.option("--queries", required=True, help="JSONL file of queries that the training did not use.")
@click.option("--model", help="[default: the model named in the token file]")
@click.option("--summary", help="Short text with the same intent. It is one more arm.")
@click.option("--max-queries", type=click.IntRange(1), help="Use the first queries only.")
@click.option(
    "--stop",
    multiple=True,
    help="Text that ends a response. \\n is a line break. Repeatable. [default: as in training]",
)
@click.option(
    "--clauses",
    is_flag=True,
    help="Measure how much of each of the prompt's first 16 sentences the token keeps, on 16 queries.",
)
@click.option(
    "--checks",
    help="JSON file with checks on the form and words of the answers (format: `trainer/evaluation/checkers.py`).",
)
@click.option(
    "--check-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Length of the answers for --checks, in tokens.",
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Length of the answers on which facts, ends and loops are counted, in tokens. 0 writes none.",
)
@click.option("--answer-queries", type=click.IntRange(1), help="Maximum number of these answers. [default: all]")
@click.option("--turns", type=click.IntRange(2, 12), help="Also measure conversations of this many turns.")
@click.option("--off-topic", is_flag=True, help="Also measure questions unrelated to the prompt.")
@click.option(
    "--judge-url",
    help="OpenAI-compatible server of a judge model. The command sends the prompt and the answers to the judge. "
    "[key: BE_JUDGE_KEY]",
)
@click.option("--judge-model", help="Name of the judge model on the server at --judge-url.")
@click.option("--report", type=click.Path(path_type=Path), help="HTML report to write.")
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=12,
    show_default=True,
    help="Answers generated for each arm. The command prints three; the JSON holds all.",
)
@click.option("--serving-dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def command(
    token_file: str,
    others: tuple[str, ...],
    prompt_file: str,
    queries: str,
    model: str | None,
    summary: str | None,
    max_queries: int | None,
    stop: tuple[str, ...],
    clauses: bool,
    checks: str | None,
    check_tokens: int,
    answer_tokens: int,
    answer_queries: int | None,
    turns: int | None,
    off_topic: bool,
    judge_url: str | None,
    judge_model: str | None,
    report: Path | None,
    samples: int,
    serving_dtype: str,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Evaluate TOKEN_FILE: KL(full || arm) in nats per token, on the greedy answers of the full prompt."""
    from be_serve.cli._training import print_evaluation, stop_texts, trained_stop
    from be_serve.core.artifact import Token, check_vectors
    from be_serve.core.errors import InputError
    from be_serve.core.prompts import prompt_sha256, read_prompt_file
    from be_serve.models import resolve_model
    from trainer.evaluation.checkers import read_checks

    if judge_url and not (judge_model and samples):
        raise InputError("--judge-url needs --judge-model and --samples above 0.")
    if others and report:
        raise InputError("--report describes one token. Omit --report or --with.")
    token = Token.load(token_file)
    tokens = [token, *map(Token.load, others)]
    wanted = read_checks(checks) if checks else []
    for one in tokens:
        check_vectors(one.vectors, dtype=serving_dtype)
        if one.manifest.placement != token.manifest.placement:
            raise InputError("Tokens in one slot must have the same placement.")
        if one.manifest.template_kwargs != token.manifest.template_kwargs or trained_stop(one) != trained_stop(token):
            raise InputError("Tokens in one slot must have the same template variables and stop texts.")
    prompt = read_prompt_file(prompt_file)
    if not others and prompt_sha256(prompt) != token.manifest.prompt.sha256:
        click.echo("Warning: the token was trained for another prompt (the SHA-256 differs).", err=True)
    made_for = token.manifest.base_model
    try:
        found = resolve_model(model or made_for.name, revision=None if model else made_for.revision)
    except InputError as exc:
        if model:
            raise
        raise InputError(
            f"{exc} The token tells its model's name ({made_for.name}), not where it lies: give --model."
        ) from exc

    import torch
    from tqdm import tqdm

    from trainer.data.chat_server import Endpoint
    from trainer.data.queries import read_queries
    from trainer.data.teacher import Teacher
    from trainer.evaluation.evaluate import evaluate, evaluation_steps
    from trainer.evaluation.pairwise import JUDGE_KEY, RIVALS, judge_pairs
    from trainer.evaluation.report_html import write_report
    from trainer.evaluation.robustness import measure_off_topic, measure_turns
    from trainer.evaluation.verdict import judge
    from trainer.model.frozen import FrozenModel

    server = (
        Endpoint(judge_url, judge_model, role="judge", key_variable=JUDGE_KEY) if judge_url and judge_model else None
    )
    chats = read_queries(queries)[:max_queries]
    frozen = FrozenModel.load(
        found.path,
        name=found.name,
        device=device,
        dtype=dtype,
        template_kwargs=token.manifest.template_kwargs,
    )
    for one in tokens:
        one.check_model(frozen.fingerprint, frozen.hidden_size, served=found.name)
    ends = stop_texts(stop) or trained_stop(token)
    if ends:
        click.echo(f"Responses end at {ends}{'' if stop else ' (from the token file)'}.", err=True)
    teacher = Teacher(frozen, prompt, stop=ends)
    vectors_KH = torch.cat([torch.from_numpy(one.vectors.copy()) for one in tokens])
    given: dict[str, Any] = {"clauses": clauses, "answer_tokens": answer_tokens, "answer_queries": answer_queries}
    total = evaluation_steps(prompt, len(chats), summary=bool(summary), **given)
    with tqdm(total=total, desc="evaluating") as bar:
        evaluation = evaluate(
            teacher,
            chats,
            vectors_KH,
            placement=token.manifest.placement,
            summary=summary,
            serving_dtype=serving_dtype,
            samples=samples,
            **given,
            checks=wanted,
            check_tokens=check_tokens,
            progress=lambda count: bar.update(count) and None,
        )
    if turns:
        evaluation.turns = measure_turns(teacher, chats, vectors_KH, token.manifest.placement, turns=turns)
    if off_topic:
        evaluation.off_topic = measure_off_topic(teacher, vectors_KH, token.manifest.placement)
    fault = None
    if server:
        try:
            with tqdm(total=2 * len(RIVALS) * len(evaluation.samples), desc="judging") as bar:
                evaluation.judged = judge_pairs(
                    server, prompt, evaluation.samples, progress=lambda count: bar.update(count) and None
                )
        except InputError as exc:  # raised at the end, so that the measured figures are printed first
            fault = exc
    print_evaluation(evaluation)
    if report:
        write_report(report, token.manifest, evaluation, judge(evaluation))
    if as_json:
        click.echo(json.dumps({**evaluation.to_json(), "verdict": judge(evaluation).to_json()}, ensure_ascii=False))
    if fault:
        raise fault
