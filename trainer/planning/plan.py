"""What a training run would do, and what it would cost on this machine.

The run's counts multiply the seconds of the pieces of work that `trainer.planning.timing` measured. Nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig
from trainer.data.aimed import QUERY_TOKENS
from trainer.data.recall import EACH
from trainer.data.synthesis import chats
from trainer.evaluation.answers import ARMS
from trainer.evaluation.arms import RESPONSE_TOKENS
from trainer.evaluation.clauses import CLAUSE_QUERIES
from trainer.evaluation.writing import MOST_ROWS
from trainer.model.frozen import DTYPES, FrozenModel
from trainer.model.memory import MemoryModel, free_bytes, held_bytes
from trainer.optim.places import CASES, SCORED
from trainer.optim.starts import SCORE_TOKENS, SCREEN_TOKENS, search_size
from trainer.optim.validation import CHECKS
from trainer.planning.timing import BATCH, Timing, measure
from trainer.planning.work import ANSWER_FILL, Work, survey
from trainer.text import sentences

# The share of its limit that an answer to an ask fills on average: one in five is a list, the others one question.
_QUERY_FILL = 0.25
_WHOLE_ANSWER = 120
"""Mean tokens of an answer that is written to its end."""
_DESCRIPTION_TOKENS, _DESCRIPTIONS = 40, 8
_ASK_TOKENS = 80
_RIVALS = 2
"""Texts for the literal places that are measured."""
_SAMPLES = 12
# An allocator's gaps between phases; charts and the report.
_GAPS, _REPORT = 1.25, 200 << 20


@dataclass(frozen=True)
class Plan:
    """What a run would do. `seconds` holds its phases; None where another machine does the work."""

    work: Work
    seconds: dict[str, float]
    peak_bytes: int
    free_bytes: int | None

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """An object of `train --plan --json`."""
        work, config = self.work, self.work.config
        return {
            "id": config.id,
            "model": config.model,
            "k": config.k,
            "prompt_tokens": work.prompt_tokens,
            "queries": {
                "source": "written" if work.written else "file",
                "training": len(work.training),
                "held_out": work.held_out,
            },
            "teacher": {
                "answers": len(work.training),
                "response_tokens": config.response_tokens,
                "writer": _writer(config),
            },
            "steps": config.reconstruct_steps + config.steps,
            "batch_size": config.batch_size,
            "evaluation": {"queries": work.held_out, "clauses": work.clauses, "answers": not config.scores_only},
            "phases": {name: round(value / 60, 3) for name, value in self.seconds.items()},
            "minutes": round(self.total / 60, 3),
            "peak_bytes": self.peak_bytes,
            "free_bytes": self.free_bytes,
        }

    def lines(self) -> list[str]:
        """The plan for a reader."""
        work, config = self.work, self.work.config
        writer = "the server at --writer-url, whose time is not counted" if config.writer_url else "the model"
        source = f"of the pool and by {writer} ({work.written})" if work.written else "from the file"
        what = {
            "load": "the model",
            "queries": f"{source}: {len(work.training)} to train on, {work.held_out} held out",
            "teacher": f"{len(work.training)} answers of up to {config.response_tokens} tokens, {_writer(config)}",
            "start": config.init.partition(":")[0] if config.learned else "words of the prompt",
            "training": f"{config.reconstruct_steps + config.steps} steps of {config.batch_size} queries",
            "evaluation": f"{work.held_out} queries, {work.clauses} sentences left out in turn",
        }
        free = "" if self.free_bytes is None else f", {self.free_bytes / 2**30:.1f} GiB are free beside what is held"
        return [
            f"Plan for {config.id}: k = {config.k}, a prompt of {work.prompt_tokens} tokens",
            *(f"  {name:<11}{value / 60:>7.1f} min  {what[name]}" for name, value in self.seconds.items()),
            f"  {'in all':<11}{self.total / 60:>7.1f} min",
            f"  peak memory {self.peak_bytes / 2**30:.1f} GiB{free}",
        ]


def make_plan(
    work: Work, model: FrozenModel, timing: Timing, *, load_seconds: float = 0.0, answered: bool = False
) -> Plan:
    """The plan of one run; `answered`: another run of the batch has the teacher's answers already."""
    config, count = work.config, len(work.training)
    chat = work.suffix + work.answer
    seconds = {"load": load_seconds, "queries": 0.0, "teacher": 0.0}
    if work.written and not config.writer_url:
        rows = chats(work.written)
        mean = _QUERY_FILL * QUERY_TOKENS
        # Each message is asked for with a sentence of the prompt, and scored.
        seconds["queries"] = timing.decode(rows, QUERY_TOKENS, mean) + rows * (_ASK_TOKENS + mean) * timing.position
    if not answered:
        seconds["teacher"] = (work.prompt_tokens + count * chat) * timing.position
        if _writer(config) == "decoded here":
            seconds["teacher"] += count * work.suffix * timing.position
            seconds["teacher"] += timing.decode(count, config.response_tokens, work.answer)
    recalled = min(EACH * len(sentences(work.prompt)), count) if config.recall else 0
    seconds["teacher"] += recalled * (work.suffix + work.sentence) * timing.position
    seconds["start"] = _start(work, timing) + _places(work, timing)
    size = min(config.batch_size, count)
    reconstructed = config.reconstruct_steps + (config.steps if config.lam < 1 else 0)
    recall = config.recall or 0.0
    response = (1 - recall) * work.answer + recall * min(work.sentence, config.response_tokens)
    positions = config.steps * size * work.row(response, work.trained)
    positions += reconstructed * (work.prompt_tokens + config.k)
    seconds["training"] = positions * timing.step_position
    validated = CHECKS * min(config.validation, count // 10) if config.steps else 0
    seconds["training"] += validated * work.row(work.answer, work.trained) * timing.position
    seconds["evaluation"] = _evaluation(work, model, timing)
    return Plan(work, seconds, _peak(work, model), free_bytes(model.device))


def plan_all(load: Callable[[], FrozenModel], runs: Sequence[tuple[TrainConfig, str | None]]) -> list[Plan]:
    """Load the model, time it on the run with the prompt of middle length, and plan all runs.

    A run is its settings and its prompt, None where the prompt is in the settings' file. Loading
    counts for the first; answers that runs share count once. Raises InputError as the runs would.
    """
    began = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - began
    works = [survey(config, model, prompt) for config, prompt in runs]
    timing = measure(model, sorted(works, key=lambda work: work.prompt_tokens)[len(works) // 2])
    plans: list[Plan] = []
    seen: set[tuple[Any, ...]] = set()
    for work in works:
        plans.append(
            make_plan(
                work,
                model,
                timing,
                load_seconds=0.0 if plans else loaded,
                answered=bool(work.config.queries) and work.answers_key in seen,
            )
        )
        seen.add(work.answers_key)
    return plans


def _start(work: Work, timing: Timing) -> float:
    config = work.config
    if config.init != "search" or not config.learned:
        return 0.0
    texts = _DESCRIPTIONS if config.learned > 1 else 0
    queries = min(config.search_queries, len(work.training))
    screened, scored = search_size(work.words, config.learned, queries, texts)
    rows = [work.row(min(tokens, work.answer), config.learned) for tokens in (SCREEN_TOKENS, SCORE_TOKENS)]
    positions = screened * rows[0] + scored * rows[1]
    written = timing.decode(texts, _DESCRIPTION_TOKENS, _DESCRIPTION_TOKENS) + work.prompt_tokens * timing.position
    return positions * timing.search_position + (written if texts else 0.0)


def _places(work: Work, timing: Timing) -> float:
    """Seconds to train the learned vectors alone and to choose the words of the literal places."""
    config = work.config
    room = config.k - config.learned
    if not room or config.keep_text is not None:
        return 0.0
    measured = _RIVALS * CASES
    row = work.row(min(SCORED, work.answer), room + config.learned)
    probed = work.row(work.answer, config.learned)
    scored = len(work.training) * (probed * timing.position + work.answer * timing.score_token)
    probe = bool(config.learned) * config.probe_steps * min(config.batch_size, len(work.training)) * probed
    return measured * row * timing.search_position + scored + probe * timing.step_position


def _evaluation(work: Work, model: FrozenModel, timing: Timing) -> float:
    config, queries = work.config, work.held_out
    mean = ANSWER_FILL * RESPONSE_TOKENS
    chat = work.suffix + mean
    arms: int = 3 + bool(config.summary) + (DTYPES[config.serving_dtype] != model.dtype)
    asked = min(CLAUSE_QUERIES, queries)
    positions: float = (arms + 1) * queries * chat + queries * work.suffix + work.prompt_tokens
    positions += work.clauses * (work.prompt_tokens + asked * chat)
    scored = (arms + 1) * queries * mean + (work.clauses + bool(work.clauses)) * asked * mean
    sampled = 0 if config.scores_only else min(_SAMPLES, queries)
    decoded = timing.decode(queries, RESPONSE_TOKENS, mean)
    if whole := 0 if config.scores_only else config.answer_tokens and min(config.answer_queries or queries, queries):
        longer = min(config.answer_tokens, _WHOLE_ANSWER)
        # Of the full prompt's answers the beginnings are there.
        rows = (len(ARMS) + 1) * whole  # one arm more tells what the full prompt says steadily
        batches = math.ceil(rows / MOST_ROWS)
        decoded += batches * config.answer_tokens * timing.decode_step
        decoded += 1.3 * (rows * longer - whole * mean) * timing.decode_row
        positions += len(ARMS) * whole * (work.suffix + longer)
        scored += len(ARMS) * whole * (longer - mean)
        sampled = 0
    if sampled:
        decoded += (2 + bool(config.summary)) * timing.decode(sampled, RESPONSE_TOKENS, mean)
    return positions * timing.position + scored * timing.score_token + decoded


def _peak(work: Work, model: FrozenModel) -> int:
    """What the process holds now, the model loaded, and the most that a phase adds."""
    config, memory = work.config, MemoryModel.of(model.causal_lm)
    width = round(work.row(work.answer, work.trained))
    batch = min(BATCH, len(work.training))
    phases = [
        memory.step(min(config.batch_size, len(work.training)) * width, width),
        memory.decoding(
            batch,
            prefix=work.prompt_tokens,
            width=work.suffix,
            new=config.response_tokens,
            shared=model.shares_prefix(),
        ),
        memory.scoring(
            work.held_out * RESPONSE_TOKENS,
            5,
            prefix=work.prompt_tokens,
            batch=min(BATCH, work.held_out),
            width=work.suffix + RESPONSE_TOKENS,
        ),
    ]
    return int(held_bytes(model.device) + _GAPS * max(phases) + (_REPORT if memory.on_cpu else 0))


def _writer(config: TrainConfig) -> str:
    if config.gold:
        return "from the file"
    if config.teacher_url:
        return "by the server at --teacher-url, whose time is not counted"
    return "by vLLM, whose time is not counted" if config.teacher == "vllm" else "decoded here"
