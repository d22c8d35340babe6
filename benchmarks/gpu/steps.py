"""The steps, most important first: what each step measures, and on which model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from be_serve.core.errors import BEError, InputError, ServerError
from be_serve.core.redaction import hide, redact, secrets_of
from be_serve.models import DEFAULT_MODEL
from benchmarks.common.client import ServerClient
from benchmarks.common.machine import gpus
from benchmarks.common.servers import ServerOptions, stock_server
from benchmarks.gpu.parity import ParityOptions, measure_parity
from benchmarks.gpu.shapes import PAPER_CASES, SHAPES, Case, Shape, tiny

Say = Callable[[str], None]


class StepFailed(BEError):
    """A step failed. The message holds the reason."""

    code = "be_step_failed"


class Interrupted(StepFailed):
    """The user interrupted the step."""

    code = "be_step_interrupted"


@dataclass(frozen=True)
class Plan:
    """Options of `python -m benchmarks.gpu`."""

    out: Path
    models: Path
    """Folder of the models with random weights."""
    tokenizer: Path
    tiny: bool = False
    rounds: int = 40
    starts: int = 4
    """Number of starts of the two servers in the step `plain`."""
    soak_minutes: float = 2.0
    server_args: tuple[str, ...] = ()
    real: str = DEFAULT_MODEL
    """Model with real weights, for the step `quality`."""
    prompt: Path = Path("examples/personas/raylan-givens.txt")
    """System prompt of the step `quality`."""
    quality_args: tuple[str, ...] = ()
    """More options for `be-serve train` in the step `quality`."""

    def shape(self, name: str) -> Shape:
        """Return a shape by name, in its tiny form for a tiny plan."""
        return tiny(SHAPES[name]) if self.tiny else SHAPES[name]

    def folder(self, name: str) -> Path:
        """Return the model folder of a shape."""
        return self.models / (f"{name}-tiny" if self.tiny else name)

    def servers(self, name: str) -> ServerOptions:
        """Return the server options for a shape."""
        return ServerOptions(str(self.folder(name)), self.server_args)


@dataclass(frozen=True)
class Step:
    """One measurement. `run` returns its figures as plain data."""

    name: str
    about: str
    seconds: float
    """Approximate duration on an H100."""
    run: Callable[[Plan, Path, Say], Awaitable[dict[str, Any]]]
    model: str | None = None
    """Name of the shape that the step needs."""
    serves: bool = True
    """Whether the step starts servers, in the mode that the step `start` found."""
    repeats: bool = False
    """Whether the tiny form of another step runs the same code on the same architecture."""

    def about_seconds(self, tiny: bool) -> float:
        """Return the expected duration in seconds; for a tiny plan, on two cores."""
        return 30.0 if tiny else self.seconds


async def ensure_model(plan: Plan, name: str, say: Say) -> Path:
    """Return the folder of a shape's model; make the model if it is missing. Raises StepFailed."""
    folder = plan.folder(name)
    if not (folder / "config.json").exists():
        size = plan.shape(name).parameters * 2 / 1e9
        say(f"making {folder.name} with random weights ({size:.1f} GB) ...")
        command = ["benchmarks.gpu.weights", name, str(folder), "--tokenizer", str(plan.tokenizer)]
        await call([*command, *(["--tiny"] if plan.tiny else [])], log=plan.out / "models.log")
    return folder


async def call(arguments: list[str], *, log: Path) -> str:
    """Run `python -m ARGUMENTS` and return its standard output. Raises StepFailed with the last lines of the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", *arguments], stdout=asyncio.subprocess.PIPE, stderr=sink
        )
        try:
            out, _ = await process.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            raise
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        secrets = secrets_of(arguments, os.environ)
        shown = [
            f"{shlex.join(redact(arguments))} ended with status {process.returncode}:",
            *(hide(line, secrets) for line in tail),
        ]
        raise StepFailed("\n".join(shown))
    return out.decode("utf-8", "replace")


_GRAPHS_ONLY = json.dumps({"mode": 0, "cudagraph_mode": "FULL"})
MODES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vLLM's defaults", ()),
    ("CUDA graphs without torch.compile", ("--compilation-config", _GRAPHS_ONLY)),
    ("eager", ("--enforce-eager",)),
)
"""Server modes, fastest first. The fast modes can fail if PyTorch is not the version that vLLM was built for."""


async def start(plan: Plan, out: Path, say: Say) -> dict[str, Any]:
    """Return the first of `MODES` in which stock vLLM starts and answers. Raises StepFailed."""
    if not gpus():
        return {"mode": "--enforce-eager, on a CPU", "server_args": [], "seconds": 0.0, "failed": {}}
    name = "llama-3.2-1b"
    tried: dict[str, str] = {}
    for mode, arguments in MODES:
        say(f"starting stock vLLM: {mode} ...")
        options = ServerOptions(str(plan.folder(name)), (*plan.server_args, *arguments))
        try:
            async with stock_server(options, out, 1024) as server, ServerClient(server.url) as client:
                body = {"model": await client.model_id(), "prompt": "Hello", "max_tokens": 4}
                await client.call("POST", "/v1/completions", json=body)
                return {"mode": mode, "server_args": list(arguments), "seconds": server.start_seconds, "failed": tried}
        except ServerError as exc:
            tried[mode] = hide(str(exc))
            (out / "stock.log").rename(out / f"stock-{len(tried)}.log")
    raise StepFailed("vLLM did not start in any mode: " + "; ".join(f"{mode}: {why}" for mode, why in tried.items()))


async def parity(plan: Plan, out: Path, say: Say) -> dict[str, Any]:
    """Compare answers from vectors with answers from text."""
    few = {"questions": 4, "max_tokens": 8, "prompt_tokens": 64} if plan.tiny else {}
    name = "llama-3.2-1b"
    return await measure_parity(ParityOptions(name, plan.folder(name), out, plan.server_args, **few), say)


async def soak(plan: Plan, out: Path, say: Say) -> dict[str, Any]:
    """Overload a server and compare every answer."""
    from benchmarks.soak import SoakOptions
    from benchmarks.soak import soak as measure_soak

    name = "llama-3.2-1b"
    options = SoakOptions(name, plan.folder(name), out, plan.servers(name), minutes=plan.soak_minutes)
    run = await measure_soak(options, say)
    result = run.result()
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if run.interrupted:
        raise Interrupted("interrupted")
    kept = ("seconds", "answers", "wrong", "shown", "requests", "failures", "attempts", "metrics", "faults")
    return {key: result[key] for key in kept}


def ttft(name: str, cases: tuple[Case, ...]) -> Callable[[Plan, Path, Say], Awaitable[dict[str, Any]]]:
    """Return the step that measures a shape's time to first token at the given lengths."""

    async def step(plan: Plan, out: Path, say: Say) -> dict[str, Any]:
        from benchmarks.ttft.chart import draw
        from benchmarks.ttft.figures import analyse
        from benchmarks.ttft.report import table, write_json
        from benchmarks.ttft.run import TTFTOptions, measure_ttft

        lengths = PAPER_CASES[:1] if plan.tiny else cases
        options = TTFTOptions(
            model=name, out=out, servers=plan.servers(name), folder=plan.folder(name), cases=lengths, rounds=plan.rounds
        )
        run = await measure_ttft(options, say)
        figures = analyse(run)
        write_json(run, figures, out / "ttft.json")
        (out / "ttft.txt").write_text(table(run, figures) + "\n", encoding="utf-8")
        if run.samples:
            draw(run, figures, out / "ttft.png")
        if run.interrupted:
            raise Interrupted("interrupted")
        if run.stopped:
            raise StepFailed(run.stopped)
        return {
            "cases": [_table_figures(case) for case in figures["cases"]],
            "fit": figures["fit"],
            "rounds": plan.rounds,
        }

    return step


def _table_figures(case: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a case that the table needs. ttft.json holds all figures."""
    arms = {
        name: {key: arm[key] for key in ("p50_ttft_ms", "p99_ttft_ms", "cached_tokens", "failed")}
        for name, arm in case["arms"].items()
    }
    return {**{key: case[key] for key in ("prompt_tokens", "question_tokens", "ratios", "model")}, "arms": arms}


async def plain(plan: Plan, out: Path, say: Say) -> dict[str, Any]:
    """Measure the cost of the plugin for chats without a token."""
    from benchmarks.load import LoadOptions, measure_load
    from benchmarks.load.chart import draw

    name = "llama-3.2-1b"
    concurrency, registered = (4, 20) if plan.tiny else (16, 1000)
    options = LoadOptions(
        model=name,
        folder=plan.folder(name),
        out=out,
        servers=plan.servers(name),
        rounds=plan.rounds * 2,
        starts=plan.starts,
        max_tokens=16 if plan.tiny else 64,
        concurrency=concurrency,
        registered=registered,
    )
    run = await measure_load(options, say)
    if run.interrupted:
        raise Interrupted("interrupted")
    result = run.result()
    if not result["rounds"]:
        raise StepFailed(f"Every round had a failed chat: {'; '.join(result['errors'])}")
    (out / "load.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, out / "load.png")
    return {key: value for key, value in result.items() if key != "bursts"}


def train(name: str) -> Callable[[Plan, Path, Say], Awaitable[dict[str, Any]]]:
    """Return the step that measures time and peak memory of a shape's training step."""

    async def step(plan: Plan, out: Path, say: Say) -> dict[str, Any]:
        from benchmarks.common.prompts import fit_text, handbook

        count = _local_count(plan.tokenizer)
        prompt, queries = out / "prompt.txt", _questions(out, 8 if plan.tiny else 32)
        tokens = 64 if plan.tiny else PAPER_CASES[0][0]
        prompt.write_text(await fit_text(handbook(0), tokens, count), encoding="utf-8")
        size = ["--steps", "2", "--examples", "8", "--response-tokens", "8"] if plan.tiny else ["--examples", "32"]
        say(f"timing training steps of {name} ...")
        printed = await call(
            [
                *("be_serve.cli.main", "bench", "train", str(prompt), "--model", str(plan.folder(name))),
                *("--queries", str(queries), *size),
            ],
            log=out / "train.log",
        )
        return dict(json.loads(printed.strip().splitlines()[-1]))

    return step


def _local_count(tokenizer: Path) -> Callable[[str], Awaitable[int]]:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)

    async def count(text: str) -> int:
        return len(words.encode(text, add_special_tokens=False))

    return count


async def quality(plan: Plan, out: Path, say: Say) -> dict[str, Any]:
    """Train and evaluate a token on real weights; return the figures of the training run.

    The tiny form trains on Qwen3's random weights and a file of questions. It shows only that the step runs.
    """
    real, more = plan.real, plan.quality_args
    if plan.tiny:
        real = str(await ensure_model(plan, "qwen3-4b", say))
        few = ("--steps", "2", "--response-tokens", "8", "--held-out", "2", "--init", "mean", "--scores-only")
        more = ("--queries", str(_questions(out, 10)), *few, *more)
    say(f"training a token of {real} ...")
    printed = await call(
        [
            *("be_serve.cli.main", "train", str(plan.prompt), "--model", real),
            *("-o", str(out / "token.safetensors"), "--run-dir", str(out / "run"), "--json", *more),
        ],
        log=out / "train.log",
    )
    return dict(json.loads(printed.strip().splitlines()[-1]))


def _questions(out: Path, count: int) -> Path:
    """Write a file of questions for the trainer and return its path."""
    from benchmarks.common.prompts import question_text

    path = out / "queries.jsonl"
    asked = [" ".join(question_text(0, f"train {n}").split()[:20]) for n in range(count)]
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in asked), encoding="utf-8")
    return path


_LONGER: tuple[Case, ...] = ((8_000, 58),)
STEPS = (
    Step("start", "find the mode in which vLLM starts", 110, start, "llama-3.2-1b", serves=False),
    Step("parity", "compare answers from vectors with answers from text", 240, parity, "llama-3.2-1b"),
    Step(
        "ttft-llama-3.1-8b",
        "time to first token, 8B",
        250,
        ttft("llama-3.1-8b", (*PAPER_CASES, *_LONGER, (16_000, 58))),
        "llama-3.1-8b",
    ),
    Step("plain", "cost of the plugin for plain chats", 720, plain, "llama-3.2-1b"),
    Step("train-llama-3.1-8b", "training step, 8B", 90, train("llama-3.1-8b"), "llama-3.1-8b", serves=False),
    Step("train-qwen3-4b", "training step, 4B", 60, train("qwen3-4b"), "qwen3-4b", serves=False, repeats=True),
    *(
        Step(
            f"ttft-{name}",
            f"time to first token, {name}",
            220,
            ttft(name, (*PAPER_CASES, *_LONGER)),
            name,
            repeats=name.startswith("llama"),
        )
        for name in ("qwen3-4b", "llama-3.2-3b", "llama-3.2-1b")
    ),
    Step("soak", "overload, every answer compared", 200, soak, "llama-3.2-1b"),
    Step("quality", "train and evaluate a token on real weights", 300, quality, serves=False),
)


def chosen(names: tuple[str, ...], tiny: bool = False) -> tuple[Step, ...]:
    """Return the named steps in the given order; without names, all steps. Raises InputError for an unknown name.

    Without names, a tiny run skips steps whose tiny form repeats another step.
    """
    known = {step.name: step for step in STEPS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"Unknown step {unknown[0]!r}. Available steps: {', '.join(known)}.")
    return tuple(known[name] for name in names) if names else tuple(s for s in STEPS if not (tiny and s.repeats))


def small(plan: Plan) -> Plan:
    """Return the tiny form of a plan: each step takes a minute or less on two cores."""
    return replace(plan, tiny=True, rounds=2, starts=1, soak_minutes=0.2)
