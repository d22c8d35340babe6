"""What a training run would do, and what it would cost on this machine: `be-serve train --plan`.

A few seconds of real work on the loaded model give the seconds of a decoding step, of a
training step, of a search row and of a scored token; the run's own counts multiply them.
Nothing is written.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from be_serve.core.prompts import read_prompt_file
from trainer.config import TrainConfig
from trainer.data.queries import Query, drop_near_duplicates, read_queries, split_held_out
from trainer.data.synthesis import messages
from trainer.data.teacher import Example, Teacher
from trainer.evaluation.arms import RESPONSE_TOKENS, score
from trainer.evaluation.clauses import CLAUSE_QUERIES, MAX_CLAUSES, prompt_clauses
from trainer.model.frozen import DTYPES, FrozenModel
from trainer.model.generate import Prefix, common_prefix
from trainer.model.memory import MemoryModel, free_bytes, held_bytes
from trainer.model.soft_token import Row
from trainer.optim.objectives import Distil, part_losses
from trainer.optim.places import CASES, SCORED
from trainer.optim.starts import SCORE_TOKENS, SCREEN_TOKENS, Search, search_size
from trainer.optim.validation import CHECKS

# Shares of a limit that texts fill on average, as measured with instruct models of 0.1 to 0.6 billion weights.
_ANSWER_FILL, _QUERY_FILL = 0.8, 0.5
_LONG_ANSWER = 150
_WHOLE_ANSWER = 120
"""Mean tokens of an answer that is written to its end."""
_QUERY_TOKENS, _DESCRIPTION_TOKENS, _DESCRIPTIONS = 48, 40, 8
_ASK_TOKENS = 80
_RIVALS = 2
"""Texts for the literal places that are measured."""
_SAMPLES = 12
_BATCH = 64
_TIMED_ROWS = 32
_LONG_STEP = 2.0
# An allocator's gaps between phases; charts and the report.
_GAPS, _REPORT = 1.25, 200 << 20
# A query that stands for those that the model would write.
_SAMPLE = "What should I know about this before I begin, and what do you advise me to do first?"


@dataclass(frozen=True)
class Timing:
    """Seconds of the pieces of work that all phases are made of, on this machine."""

    decode_step: float
    """Of a decoding step, whatever the rows."""
    decode_row: float
    """Of a decoding step, for each row."""
    position: float
    """Of a position in a pass without gradient."""
    search_position: float
    """Of a position of a search row, its share of the head's work included."""
    score_token: float
    """Of a response token's figures, for each arm."""
    step_position: float
    """Of a position in a training step."""

    def decode(self, rows: int, limit: int, mean: float) -> float:
        """Seconds to decode `rows` texts of up to `limit` tokens, `mean` on average.

        A row that has ended costs until half of its batch has, and later steps read more.
        """
        return math.ceil(rows / _BATCH) * limit * self.decode_step + 1.3 * rows * mean * self.decode_row


@dataclass(frozen=True)
class Work:
    """What one run would work on."""

    config: TrainConfig
    prompt: str
    prompt_tokens: int
    training: list[Query]
    held_out: int
    written: int
    """Queries that the model would write; 0 with a file of queries."""
    suffix: int
    """Mean tokens of a chat behind the prompt."""
    answer: float
    """Mean tokens of an answer to a training query."""
    words: int
    """Distinct tokens of the prompt that a search would screen."""
    clauses: int

    @property
    def answers_key(self) -> tuple[Any, ...]:
        """Runs of a batch with the same key share the teacher's answers."""
        config = self.config
        return (self.prompt, config.queries, config.max_queries, config.response_tokens, config.temperature)

    def row(self, answer: float, k: int) -> float:
        """Mean positions of a student's row with k vectors."""
        return self.suffix + k + 4 + answer

    @property
    def trained(self) -> int:
        """Vectors that a training step feeds: places that stay are computed once."""
        return min(self.config.trained, self.prompt_tokens)


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
        source = f"of the pool and by the model ({work.written})" if work.written else "from the file"
        what = {
            "load": "the model",
            "queries": f"{source}: {len(work.training)} to train on, {work.held_out} held out",
            "teacher": f"{len(work.training)} answers of up to {config.response_tokens} tokens, {_writer(config)}",
            "start": f"{config.init.partition(':')[0]}",
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


def survey(config: TrainConfig, model: FrozenModel, prompt: str | None = None) -> Work:
    """What a run of these settings would work on. Raises InputError as the run itself would."""
    prompt = read_prompt_file(config.prompt_file) if prompt is None else prompt
    ids = model.slots.prompt_ids(prompt, template_kwargs=model.template_kwargs)
    config = config.resolved(len(ids))
    test = read_queries(config.test_queries) if config.test_queries else []
    if config.queries:
        found = drop_near_duplicates(read_queries(config.queries), beside=test)
        training, held_out = split_held_out(found, config.held_out, latest=True)
        training, held = training[: config.max_queries], len(held_out)
        written = 0
    else:
        written = config.synthesise
        held = max(1, min(config.held_out, written // 5))
        training = [Query(({"role": "user", "content": _SAMPLE},))] * (written - held)
        training = training[: config.max_queries]
    chats = [Teacher(model, prompt).chat_ids(query) for query in training[:_BATCH]]
    shared = _shared(model, prompt)
    return Work(
        config=config,
        prompt=prompt,
        prompt_tokens=len(ids),
        training=training,
        held_out=len(test) or held,
        written=written,
        suffix=round(statistics.mean(max(1, len(chat) - shared) for chat in chats)),
        answer=min(_ANSWER_FILL * config.response_tokens, _LONG_ANSWER),
        words=len(Search(model, [], config.placement)._words(ids)),
        clauses=0 if config.scores_only else len(prompt_clauses(prompt)[:MAX_CLAUSES]),
    )


def measure(model: FrozenModel, work: Work) -> Timing:
    """Time a decoding batch, a scoring pass, a row of the search and a training step of typical length."""
    config = work.config
    queries = [work.training[i % len(work.training)] for i in range(_TIMED_ROWS)]
    chats = [Teacher(model, work.prompt).chat_ids(query) for query in queries]
    shared = min(_shared(model, work.prompt), common_prefix(chats))
    prefix = Prefix(model, model.embed(chats[0][:shared]))
    suffixes = [chat[shared:] for chat in chats]
    few, many = _decoding(prefix, suffixes[:4]), _decoding(prefix, suffixes)
    per_row = max(0.0, (many - few) / (_TIMED_ROWS - 4))
    answer = [*suffixes[0], *chats[0]][: round(min(work.answer, 64))] or [1]
    rows = [Row((), suffix, answer) for suffix in suffixes[:4]]
    states: list[torch.Tensor] = []
    seconds = _timed(lambda: states.extend(prefix.states(rows)))
    examples = [Example(q, list(answer), state.cpu()) for q, state in zip(queries, states, strict=False)]
    scored = _timed(lambda: score(model, examples[:2], {"full": states[:2], "be": states[:2]}))
    distil = Distil(model, examples, placement=config.placement, batch_size=min(config.batch_size, 4), tau=config.tau)
    vectors_KH = torch.zeros(work.trained, model.hidden_size, device=model.device, requires_grad=True)
    part = distil.parts(vectors_KH, 0)[0]

    def learn() -> None:
        part_losses(model, [part])[0].backward()

    first = _timed(learn)
    step = first if first > _LONG_STEP else min(first, _timed(learn))  # the first of a process is slow
    search = Search(model, examples[:1], config.placement)
    candidates = [[1] * config.learned] * 16
    tokens = min(SCREEN_TOKENS, len(answer))
    looked = _timed(lambda: search._score(candidates, search._cases, tokens))
    return Timing(
        decode_step=max(0.0, few - 4 * per_row),
        decode_row=per_row,
        position=seconds / sum(row.length(0) for row in rows),
        search_position=looked / (16 * (distil.rows[0].length(config.learned) - len(answer) + tokens)),
        score_token=scored / (2 * 2 * len(answer)),
        step_position=step / part.positions,
    )


def make_plan(
    work: Work, model: FrozenModel, timing: Timing, *, load_seconds: float = 0.0, answered: bool = False
) -> Plan:
    """The plan of one run; `answered`: another run of the batch has the teacher's answers already."""
    config, count = work.config, len(work.training)
    chat = work.suffix + work.answer
    seconds = {"load": load_seconds, "queries": 0.0, "teacher": 0.0}
    if work.written:
        rows = messages(work.written)
        mean = _QUERY_FILL * _QUERY_TOKENS
        # Each message is asked for with a sentence of the prompt, and scored.
        seconds["queries"] = timing.decode(rows, _QUERY_TOKENS, mean) + rows * (_ASK_TOKENS + mean) * timing.position
    if not answered:
        seconds["teacher"] = (work.prompt_tokens + count * chat) * timing.position
        if _writer(config) == "decoded here":
            seconds["teacher"] += count * work.suffix * timing.position
            seconds["teacher"] += timing.decode(count, config.response_tokens, work.answer)
    seconds["start"] = _start(work, timing) + _places(work, timing)
    size = min(config.batch_size, count)
    reconstructed = config.reconstruct_steps + (config.steps if config.lam < 1 else 0)
    positions = config.steps * size * work.row(work.answer, work.trained)
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
    if config.init != "search":
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
    probe = config.probe_steps * min(config.batch_size, len(work.training)) * probed
    return measured * row * timing.search_position + scored + probe * timing.step_position


def _evaluation(work: Work, model: FrozenModel, timing: Timing) -> float:
    config, queries = work.config, work.held_out
    mean = _ANSWER_FILL * RESPONSE_TOKENS
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
        decoded += 3 * timing.decode(whole, config.answer_tokens, longer) - timing.decode(whole, RESPONSE_TOKENS, mean)
        positions += 3 * whole * (work.suffix + longer)
        scored += 3 * whole * longer
        sampled = 0
    if sampled:
        decoded += (2 + bool(config.summary)) * timing.decode(sampled, RESPONSE_TOKENS, mean)
    return positions * timing.position + scored * timing.score_token + decoded


def _peak(work: Work, model: FrozenModel) -> int:
    """What the process holds now, the model loaded, and the most that a phase adds."""
    config, memory = work.config, MemoryModel.of(model.causal_lm)
    width = round(work.row(work.answer, work.trained))
    batch = min(_BATCH, len(work.training))
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
            batch=min(_BATCH, work.held_out),
            width=work.suffix + RESPONSE_TOKENS,
        ),
    ]
    return int(held_bytes(model.device) + _GAPS * max(phases) + (_REPORT if memory.on_cpu else 0))


def _shared(model: FrozenModel, prompt: str) -> int:
    """Ids that all chats under a prompt begin with."""
    chats = [Teacher(model, prompt).chat_ids(Query(({"role": "user", "content": text},))) for text in ("1", "Why?")]
    return common_prefix(chats)


def _writer(config: TrainConfig) -> str:
    if config.gold:
        return "from the file"
    if config.teacher_url:
        return "by the server at --teacher-url, whose time is not counted"
    return "by vLLM, whose time is not counted" if config.teacher == "vllm" else "decoded here"


def _decoding(prefix: Prefix, suffixes: Sequence[Sequence[int]]) -> float:
    """Seconds of one decoding step."""
    few, more = (_timed(lambda n=n: prefix.generate(suffixes, n, stop=[])) for n in (1, 4))  # type: ignore[misc]
    return max(0.0, (more - few) / 3)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
