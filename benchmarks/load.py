"""Under load: bursts of concurrent chats at two servers in turns.

    plain        plugin   plain prompt of k tokens, tokens registered beside it
    plain_other  other    the same chats
    be           plugin   the token in the prompt's place
    be_other     other    the same, where the other server has tokens too

The other server is stock vLLM, to see what the plugin costs everybody else, or the plugin
with another injection, to compare the two. A burst is answered whole before the next
begins; a server rests while the other is timed. Figures are compared burst by burst.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import statistics
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import uuid4

from be_serve.child_server import Server, ServerError
from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from benchmarks.client import Sample, ServerClient
from benchmarks.machine import hardware, redact, versions
from benchmarks.prompts import Chat, fit_questions, fit_text, handbook
from benchmarks.servers import ServerOptions, plugin_server, stock_server
from benchmarks.stats import describe, paired_ratio
from benchmarks.tokens import make_token

QUESTIONS = 16
RATIOS = (("plain", "plain_other"), ("be", "plain"), ("be", "be_other"))
METRICS = ("tokens_per_s", "itl_ms", "ttft_ms")


@dataclass(frozen=True)
class LoadOptions:
    """What to measure, and on which servers. The command line fills it."""

    model: str
    folder: Path
    """The model's files, to make a token of."""
    out: Path
    servers: ServerOptions
    other: str = "stock"
    """`stock`, or the injection of the other server."""
    k: int = 1
    rounds: int = 200
    warmup: int = 3
    concurrency: int = 4
    question_tokens: int = 58
    max_tokens: int = 16
    registered: int = 100
    """Tokens that are registered, under ids of their own and with the same vectors."""
    active: int = 8
    """How many of them are asked for, in turns."""
    seed: int = 0

    @property
    def arms(self) -> tuple[str, ...]:
        return ("plain", "plain_other", "be") if self.other == "stock" else ("plain", "be", "be_other")


@dataclass
class Burst:
    """One arm's chats that were sent at the same moment."""

    seconds: float
    samples: list[Sample]

    def figures(self) -> dict[str, float] | None:
        """Output tokens a second, median inter-token latency and median TTFT; None where a chat failed."""
        if any(not sample.ok for sample in self.samples):
            return None
        itls = [itl for sample in self.samples for itl in sample.itls]
        return {
            "tokens_per_s": sum(sample.completion_tokens for sample in self.samples) / self.seconds,
            "itl_ms": 1e3 * statistics.median(itls) if itls else 0.0,
            "ttft_ms": 1e3 * statistics.median(sample.ttft for sample in self.samples),
        }


@dataclass
class LoadRun:
    """What was measured, and where."""

    options: LoadOptions
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    bursts: list[dict[str, Burst]] = field(default_factory=list)
    """A round each: arm -> burst."""
    interrupted: bool = False
    servers: dict[str, list[str]] = field(default_factory=dict)
    """The command of each server."""
    injection: dict[str, float] | None = None
    """The server's own histogram of the time a token costs a request: bucket's upper end in s -> share within it."""

    def result(self) -> dict[str, Any]:
        """All figures as plain data."""
        options = self.options
        whole: list[dict[str, dict[str, float]]] = []
        for one in self.bursts:
            found = {arm: figures for arm, burst in one.items() if (figures := burst.figures())}
            if len(found) == len(options.arms):
                whole.append(found)
        samples = [sample for one in self.bursts for burst in one.values() for sample in burst.samples]
        errors = sorted({sample.error for sample in samples if not sample.ok})
        shown = {**asdict(options), "folder": None, "out": None, "servers": None}  # commands stand below, redacted
        return {
            "benchmark": "load",
            "date": self.started.isoformat(timespec="seconds"),
            "command": redact(sys.argv),
            "options": shown,
            "hardware": hardware(),
            "versions": versions(),
            "servers": self.servers,
            "interrupted": self.interrupted,
            "rounds": len(whole),
            "failed_chats": sum(not sample.ok for sample in samples),
            "errors": errors[:5],
            "arms": {
                arm: {
                    "tokens_per_s": statistics.median(one[arm]["tokens_per_s"] for one in whole),
                    **describe([one[arm]["itl_ms"] for one in whole], "itl"),
                    **describe([one[arm]["ttft_ms"] for one in whole], "ttft"),
                }
                for arm in options.arms
            }
            if whole
            else {},
            "ratios": {
                f"{above}/{below}": {
                    metric: asdict(
                        paired_ratio(
                            [one[above][metric] for one in whole],
                            [one[below][metric] for one in whole],
                            seed=options.seed,
                        )
                    )
                    for metric in METRICS
                }
                for above, below in RATIOS
                if whole and above in options.arms and below in options.arms
            },
            "injection_seconds": self.injection,
        }


async def measure_load(options: LoadOptions, say: Callable[[str], None]) -> LoadRun:
    """Start both servers, register the tokens, and send the bursts.

    Ctrl-C during the rounds returns what was measured, with `interrupted` set.
    Raises InputError and ServerError.
    """
    run = LoadRun(options)
    async with AsyncExitStack() as stack:
        say("Starting two servers ...")
        fleet = await _Fleet.start(options, stack)
        run.servers = {name: redact(server.command) for name, server in fleet.servers.items()}
        say(f"Registering {options.registered} tokens ...")
        await fleet.register(options.registered)
        say(f"Warming up ({options.warmup} rounds) ...")
        for _ in range(options.warmup):
            for arm in options.arms:
                burst = await fleet.burst(arm)
                if burst.figures() is None:
                    errors = {sample.error for sample in burst.samples if not sample.ok}
                    raise ServerError(f"Arm {arm} failed while warming up: {'; '.join(sorted(errors))}")
        await _measure(run, fleet)
        run.injection = await fleet.injection()
    return run


async def _measure(run: LoadRun, fleet: _Fleet) -> None:
    from tqdm import tqdm

    options, rng = run.options, random.Random(f"order {run.options.seed}")  # noqa: S311
    with tqdm(total=options.rounds, unit="round", desc="load", file=sys.stderr) as bar:
        try:
            for _ in range(options.rounds):
                one: dict[str, Burst] = {}
                for arm in rng.sample(options.arms, len(options.arms)):
                    one[arm] = await fleet.burst(arm)
                run.bursts.append(one)
                bar.update()
        except asyncio.CancelledError:
            run.interrupted = True
            if task := asyncio.current_task():
                task.uncancel()


@dataclass
class _Fleet:
    """Two servers of our own, and as many clients of each as a burst has chats."""

    options: LoadOptions
    servers: dict[str, Server]
    clients: dict[str, list[ServerClient]]
    questions: list[str]
    floor: str
    chat: Chat
    model: str
    token: Token
    key: str
    number: int = 0

    @classmethod
    async def start(cls, options: LoadOptions, stack: AsyncExitStack) -> _Fleet:
        key, length = secrets.token_hex(16), _max_model_len(options)
        plugin = plugin_server(options.servers, options.out, length, admin_key=key)
        if options.other == "stock":
            other = stock_server(options.servers, options.out, length)
        else:
            own = ServerOptions(**{**vars(options.servers), "plugin_args": (f"--be-injection={options.other}",)})
            other = plugin_server(own, options.out / "other", length, admin_key=key)
        servers, clients = {"plugin": plugin, "other": other}, {}
        for name, server in servers.items():
            await stack.enter_async_context(server)
            made = [ServerClient(server.url) for _ in range(options.concurrency)]
            clients[name] = [await stack.enter_async_context(client) for client in made]
        model = await clients["other"][0].model_id()
        chat = Chat(clients["other"][0], model)
        await chat.prepare()
        labels = [f"load {n}" for n in range(QUESTIONS)]
        questions = await fit_questions(chat, options.question_tokens, labels, options.seed)
        floor = await fit_text(handbook(options.seed), options.k, chat.prompt_tokens)
        ids = await chat.plain_ids(floor)
        if len(ids) < options.k:
            raise InputError(f"Found no plain text of {options.k} tokens to make a token of.")
        token = make_token(options.folder, options.model, None, ids[: options.k], floor)
        chat.template_kwargs = token.manifest.template_kwargs
        return cls(options, servers, clients, questions, floor, chat, model, token, key)

    async def register(self, count: int) -> None:
        """The token under `count` ids on every server that takes tokens."""
        names = ["plugin"] if self.options.other == "stock" else ["plugin", "other"]
        for name in names:
            for i in range(max(count, self.options.active)):
                manifest = self.token.manifest.model_copy(update={"id": f"bench-load-{i}"})
                data = Token(manifest, self.token.vectors).to_bytes()
                await self.clients[name][0].call("POST", "/v1/be/tokens", content=data, headers={"X-BE-Key": self.key})

    async def burst(self, arm: str) -> Burst:
        """One burst of an arm. The server that is not asked rests."""
        asked = "other" if arm.endswith("_other") else "plugin"
        for name, server in self.servers.items():
            server.thaw() if name == asked else server.freeze()
        clients = self.clients[asked]
        await asyncio.gather(*(client.healthy() for client in clients))  # open connections
        bodies = [self._body(arm) for _ in clients]
        begin = perf_counter()
        samples = await asyncio.gather(*(client.chat(body) for client, body in zip(clients, bodies, strict=True)))
        return Burst(perf_counter() - begin, list(samples))

    def _body(self, arm: str) -> dict[str, Any]:
        question = self.questions[self.number % QUESTIONS]
        self.number += 1
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.chat.messages(self.floor, question),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": self.options.max_tokens,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "cache_salt": uuid4().hex,
        }
        if self.chat.template_kwargs:
            body["chat_template_kwargs"] = self.chat.template_kwargs
        if arm.startswith("be"):
            body["messages"] = [{"role": "user", "content": question}]
            body["be_id"] = f"bench-load-{self.number % self.options.active}"
        return body

    async def injection(self) -> dict[str, float] | None:
        """The share of requests with a token within each bucket of `be_serve_injection_seconds`."""
        for server in self.servers.values():
            server.thaw()
        with contextlib.suppress(ServerError, ValueError):
            text = await self.clients["plugin"][0].text("/metrics")
            found: dict[str, float] = {}
            for line in text.splitlines():
                if line.startswith("be_serve_injection_seconds_bucket"):
                    bound = line.partition('le="')[2].partition('"')[0]
                    found[bound] = found.get(bound, 0.0) + float(line.rpartition(" ")[2])
            total = found.get("+Inf", 0.0)
            return {bound: count / total for bound, count in found.items()} if total else None
        return None


def _max_model_len(options: LoadOptions) -> int:
    longest = options.question_tokens + options.k + options.max_tokens + 256
    return -(-longest // 128) * 128
