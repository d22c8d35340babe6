"""A long time at saturation: is every answer right, is anything lost, does memory stay flat?

Each token's vectors are the embedding rows of a short text, so the right answer is known
without the plugin: stock vLLM's, to the same text as a plain system prompt, asked one at
a time before the load begins. Then many clients at once do what clients do, for minutes:

    token     a chat with a token; its answer is compared
    plain     a chat with the plain text; compared
    long      either, with a message of several blocks and a long answer, to fill the KV cache
    abort     either, given up after the first event
    churn     register a token under a new id, ask it, remove it, ask again (404)
    attack    reach for another's row, vector or KV blocks (`ATTACKS`)

The server is given fewer rows than the tokens need and a small KV cache, so that rows
change their owner all the time and requests are preempted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from benchmarks.client import ServerClient, ServerError, server_message
from benchmarks.machine import hardware, redact, versions
from benchmarks.prompts import Chat, question_text
from benchmarks.servers import ServerOptions, plugin_server, stock_server
from benchmarks.tokens import make_token

COMPARED = 8
"""Tokens of an answer that are compared."""
TIE = 0.35
"""Nats between the two likeliest tokens below which another order of sums may turn them round (bfloat16)."""
MAX_MODEL_LEN = 1024
ACTIONS = {"token": 50, "plain": 12, "long": 12, "abort": 12, "churn": 6, "attack": 8}
ATTACKS = ("raw_ids", "allowed_ids", "detokenize", "prompt_logprobs", "vector", "blocks")
_ADJECTIVES = ("grumpy", "cheerful", "sleepy", "royal", "ancient", "nervous", "proud", "tiny")
_NOUNS = ("pirate", "lawyer", "cat", "wizard", "robot", "farmer", "poet", "sailor")


@dataclass(frozen=True)
class SoakOptions:
    """What to run, and how hard. The command line fills it."""

    model: str
    folder: Path
    """The model's files, to make tokens of."""
    out: Path
    servers: ServerOptions
    minutes: float = 30.0
    clients: int = 16
    tokens: int = 24
    questions: int = 4
    rows: int = 48
    blocks: int = 40
    """KV blocks of the engine."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The first tokens of a greedy answer, and how clear each choice was."""

    tokens: tuple[str, ...]
    gaps: tuple[float, ...]
    """Nats between the two likeliest tokens at each place."""


@dataclass
class Count:
    """What became of the requests."""

    right: int = 0
    tie: int = 0
    """Departs from the right answer where the two likeliest tokens were within `TIE`."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Errors that are not the client's."""
    attempts: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """How attempts were answered."""

    def judge(self, reference: Answer, got: Answer, what: dict[str, Any]) -> None:
        """Compare an answer with the right one, token by token."""
        for n, (ours, theirs) in enumerate(itertools.zip_longest(got.tokens, reference.tokens)):
            if ours != theirs:
                gap = reference.gaps[n] if n < len(reference.gaps) else 0.0
                if gap < TIE:
                    self.tie += 1
                else:
                    self.wrong.append({**what, "got": got.tokens, "right": reference.tokens, "gap": gap})
                return
        self.right += 1


@dataclass
class SoakRun:
    """What was measured, and where."""

    options: SoakOptions
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    count: Count = field(default_factory=Count)
    distinct: float = 0.0
    """Share of pairs of tokens whose right answers differ, each question by itself: how far a mix-up would show."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Minute, and MiB resident in all of the server's processes."""
    seconds: float = 0.0
    interrupted: bool = False
    command: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def growth(self) -> float | None:
        """Median memory of the last tenth over that of the second tenth, None for too few samples."""
        n = len(self.memory) // 10
        if not n:
            return None
        sizes = [size for _, size in self.memory]
        return statistics.median(sizes[-n:]) / statistics.median(sizes[n : 2 * n])

    @property
    def clean(self) -> bool:
        """Whether every answer was right and nothing failed or was reached."""
        return not (self.count.wrong or self.count.failures or self.count.succeeded)

    def result(self) -> dict[str, Any]:
        """All figures as plain data."""
        count = self.count
        return {
            "benchmark": "soak",
            "date": self.started.isoformat(timespec="seconds"),
            "command": redact(sys.argv),
            "options": {**asdict(self.options), "folder": None, "out": None},
            "hardware": hardware(),
            "versions": versions(),
            "server": self.command,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "answers": {"right": count.right, "tie": count.tie, "wrong": len(count.wrong)},
            "wrong": count.wrong[:20],
            "distinct": self.distinct,
            "requests": dict(count.asked),
            "failures": dict(count.failures),
            "attempts": {kind: {"made": count.attempts[kind], "succeeded": count.succeeded[kind]} for kind in ATTACKS},
            "attempts_answered": dict(count.refused),
            "memory_mib": self.memory,
            "memory_growth": self.growth(),
            "metrics": self.metrics,
        }


async def soak(options: SoakOptions, say: Callable[[str], None]) -> SoakRun:
    """Ask stock vLLM for the right answers, then load a server with tokens.

    Ctrl-C during the load returns what was measured, with `interrupted` set.
    Raises InputError and ServerError.
    """
    run = SoakRun(options)
    say("Asking stock vLLM for the right answers ...")
    tokens, references = await _references(options)
    run.distinct = _distinct(references)
    key = secrets.token_hex(16)
    own = ServerOptions(
        **{
            **vars(options.servers),
            "plugin_args": (
                *options.servers.plugin_args,
                f"--be-rows={options.rows}",
                f"--num-gpu-blocks-override={options.blocks}",
                f"--max-num-seqs={options.clients}",
            ),
        }
    )
    async with AsyncExitStack() as stack:
        say("Starting the server with tokens ...")
        server = await stack.enter_async_context(plugin_server(own, options.out, MAX_MODEL_LEN, admin_key=key))
        run.command = redact(server.command)
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=server.url,
                timeout=httpx.Timeout(300.0),
                trust_env=False,
                limits=httpx.Limits(max_connections=None),
            )
        )
        clients = _Clients(options, http, key, tokens, references, run.count)
        await clients.register()
        await _load(run, clients, lambda: server.pid)
        if server.alive:
            run.metrics = await _metrics(http)
        else:
            run.count.failures["the server ended"] += 1
    return run


async def _references(options: SoakOptions) -> tuple[dict[str, Token], dict[tuple[str, int], Answer]]:
    """The tokens by id, and stock vLLM's answers by id and question, asked one after the other."""
    rng = random.Random(f"soak {options.seed}")  # noqa: S311
    texts = [f"You are a {a} {n}." for a in _ADJECTIVES for n in _NOUNS]
    if options.tokens > len(texts):
        raise InputError(f"At most {len(texts)} tokens can be made.")
    tokens: dict[str, Token] = {}
    references: dict[tuple[str, int], Answer] = {}
    async with stock_server(options.servers, options.out, MAX_MODEL_LEN) as stock, ServerClient(stock.url) as client:
        model = await client.model_id()
        chat = Chat(client, model)
        await chat.prepare()
        if not chat.system_role:
            raise InputError("The soak needs a model whose template takes a system message.")
        for n, text in enumerate(rng.sample(texts, options.tokens)):
            ids = await chat.plain_ids(text)
            token = make_token(options.folder, options.model, None, ids, text)
            chat.template_kwargs = token.manifest.template_kwargs
            be_id = f"soak-{n}"
            manifest = token.manifest.model_copy(update={"id": be_id})
            tokens[be_id] = Token(manifest, token.vectors)
            for q in range(options.questions):
                body = _body(model, token) | {"messages": chat.messages(text, _question(q, options))}
                references[be_id, q] = _answer(await client.call("POST", "/v1/chat/completions", json=body))
    return tokens, references


def _question(number: int, options: SoakOptions) -> str:
    return " ".join(question_text(options.seed, f"soak {number}").split()[:24])


def _body(model: str, token: Token) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "temperature": 0,
        "max_tokens": COMPARED,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 2,
    }
    if token.manifest.template_kwargs:
        body["chat_template_kwargs"] = token.manifest.template_kwargs
    return body


def _answer(body: dict[str, Any]) -> Answer:
    places = body["choices"][0]["logprobs"]["content"][:COMPARED]
    top = [[one["logprob"] for one in place["top_logprobs"]] for place in places]
    return Answer(
        tuple(place["token"] for place in places),
        tuple(max(pair) - min(pair) if len(pair) > 1 else 0.0 for pair in top),
    )


def _distinct(references: dict[tuple[str, int], Answer]) -> float:
    by_question: dict[int, list[Answer]] = {}
    for (_, q), answer in references.items():
        by_question.setdefault(q, []).append(answer)
    pairs = [a.tokens != b.tokens for answers in by_question.values() for a, b in itertools.combinations(answers, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0


@dataclass
class _Clients:
    """What each client of the crowd does, one action after the other."""

    options: SoakOptions
    http: httpx.AsyncClient
    key: str
    tokens: dict[str, Token]
    references: dict[tuple[str, int], Answer]
    count: Count
    model: str = ""
    vocabulary: int = 0
    fresh: itertools.count[int] = field(default_factory=itertools.count)

    async def register(self) -> None:
        """Register every token. Raises ServerError."""
        models = (await self.http.get("/v1/models")).json()["data"]
        self.model = next(one["id"] for one in models if not one.get("parent"))
        config = json.loads((self.options.folder / "config.json").read_text(encoding="utf-8"))
        self.vocabulary = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
        for token in self.tokens.values():
            await self._put(token)

    async def work(self, number: int, until: float) -> None:
        """One client's life: actions by their weights, until the time is over."""
        rng = random.Random(f"client {self.options.seed} {number}")  # noqa: S311
        names, weights = list(ACTIONS), list(ACTIONS.values())
        do: dict[str, Callable[[random.Random], Awaitable[None]]] = {name: getattr(self, name) for name in names}
        while time.monotonic() < until:
            (name,) = rng.choices(names, weights)
            self.count.asked[name] += 1
            try:
                await do[name](rng)
            except (httpx.HTTPError, ServerError, LookupError, ValueError) as exc:
                self.count.failures[f"{name}: {type(exc).__name__}: {exc}"[:200]] += 1
                if isinstance(exc, httpx.ConnectError):
                    return  # the server is gone; the count says so

    async def token(self, rng: random.Random) -> None:
        """A chat with a token."""
        await self._ask("token", *self._pick(rng), use_token=True)

    async def plain(self, rng: random.Random) -> None:
        """A chat with the text of a token as a plain system prompt."""
        await self._ask("plain", *self._pick(rng), use_token=False)

    async def long(self, rng: random.Random) -> None:
        """A message of several blocks, and a long answer: only that it comes is checked."""
        be_id, q = self._pick(rng)
        body = self._chat(be_id, q, use_token=rng.random() < 0.7)
        body["messages"][-1]["content"] = self._long_message(rng)
        body["max_tokens"] = 150
        self._expect("long", await self._post("/v1/chat/completions", body), 200)

    async def abort(self, rng: random.Random) -> None:
        """A stream that is given up after its first event."""
        be_id, q = self._pick(rng)
        body = self._chat(be_id, q, use_token=rng.random() < 0.7) | {"stream": True, "max_tokens": 200}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._expect("abort", answer, 200)
                return
            async for _ in answer.aiter_raw():
                return

    async def churn(self, rng: random.Random) -> None:
        """A token that comes, answers and goes."""
        be_id, q = self._pick(rng)
        token = self.tokens[be_id]
        own = Token(token.manifest.model_copy(update={"id": f"churn-{next(self.fresh)}"}), token.vectors)
        await self._put(own)
        await self._ask("churn", be_id, q, use_token=True, named=own.manifest.id)
        gone = await self.http.delete(f"/v1/be/tokens/{own.manifest.id}", headers={"X-BE-Key": self.key})
        self._expect("churn, remove", gone, 200)
        body = self._chat(be_id, q, use_token=True) | {"be_id": own.manifest.id}
        self._expect("churn, removed", await self._post("/v1/chat/completions", body), 404)

    async def attack(self, rng: random.Random) -> None:
        """One attempt at what must not be had."""
        kind = rng.choice(ATTACKS)
        self.count.attempts[kind] += 1
        be_id, q = self._pick(rng)
        row = self.vocabulary + rng.randrange(self.options.rows)
        if kind == "blocks":
            return await self._attack_blocks(rng)
        if kind == "vector":
            shown = await self.http.get(f"/v1/be/tokens/{be_id}", headers={"X-BE-Key": self.key})
            flat = [round(float(x), 4) for x in self.tokens[be_id].vectors[0][:4]]
            reached = any(f"{x:.4f}" in shown.text for x in flat if x)
            return self._attempted(kind, shown, reached=reached)
        if kind == "detokenize":
            answer = await self._post("/detokenize", {"model": self.model, "tokens": [row]})
            return self._attempted(kind, answer, reached=answer.is_success and bool(answer.json().get("prompt")))
        if kind == "prompt_logprobs":
            body = self._chat(be_id, q, use_token=True) | {"prompt_logprobs": 1}
            answer = await self._post("/v1/chat/completions", body)
        elif kind == "allowed_ids":
            body = self._chat(be_id, q, use_token=rng.random() < 0.5) | {"allowed_token_ids": [row]}
            answer = await self._post("/v1/chat/completions", body)
        else:
            body = {"model": self.model, "prompt": [row] * 4, "max_tokens": 1}
            answer = await self._post("/v1/completions", body)
        self._attempted(kind, answer, reached=answer.is_success)

    async def _attack_blocks(self, rng: random.Random) -> None:
        """The same long message with two tokens of one owner: the second must find no blocks of the first."""
        first, second = rng.sample(list(self.tokens), 2)
        message = self._long_message(rng)
        answers = []
        for be_id in (first, second):
            body = self._chat(be_id, 0, use_token=True) | {"max_tokens": 1, "cache_salt": "shared"}
            body["messages"][-1]["content"] = message
            answers.append(await self._post("/v1/chat/completions", body))
        reached = False
        if answers[1].is_success:
            details = answers[1].json()["usage"].get("prompt_tokens_details") or {}
            reached = bool(details.get("cached_tokens"))
        self._attempted("blocks", answers[1], reached=reached)

    def _attempted(self, kind: str, answer: httpx.Response, *, reached: bool) -> None:
        self.count.refused[f"{kind}: {answer.status_code}"] += 1
        if reached:
            self.count.succeeded[kind] += 1
        if answer.status_code >= 500:
            self._expect(kind, answer, 200)

    async def _ask(self, name: str, be_id: str, q: int, *, use_token: bool, named: str | None = None) -> None:
        body = self._chat(be_id, q, use_token=use_token)
        if named:
            body["be_id"] = named
        answer = await self._post("/v1/chat/completions", body)
        if self._expect(name, answer, 200):
            what = {"action": name, "token": be_id, "question": q}
            self.count.judge(self.references[be_id, q], _answer(answer.json()), what)

    def _chat(self, be_id: str, q: int, *, use_token: bool) -> dict[str, Any]:
        token = self.tokens[be_id]
        user = {"role": "user", "content": _question(q, self.options)}
        body = _body(self.model, token)
        if use_token:
            return {**body, "messages": [user], "be_id": be_id}
        return {**body, "messages": [{"role": "system", "content": token.manifest.prompt.text}, user]}

    def _pick(self, rng: random.Random) -> tuple[str, int]:
        return rng.choice(list(self.tokens)), rng.randrange(self.options.questions)

    def _long_message(self, rng: random.Random) -> str:
        return " ".join(question_text(rng.getrandbits(32), "long").split()[: rng.randrange(200, 420)])

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def _put(self, token: Token) -> None:
        answer = await self.http.post("/v1/be/tokens", content=token.to_bytes(), headers={"X-BE-Key": self.key})
        if answer.status_code not in (200, 201):
            raise ServerError(f"Registration answered {answer.status_code}: {server_message(answer.content)}")

    def _expect(self, name: str, answer: httpx.Response, status: int) -> bool:
        if answer.status_code == status:
            return True
        self.count.failures[f"{name}: HTTP {answer.status_code}: {server_message(answer.content)}"[:200]] += 1
        return False


async def _load(run: SoakRun, clients: _Clients, pid: Callable[[], int]) -> None:
    """Let the crowd in, and look at the memory while it is there."""
    from tqdm import tqdm

    begin = time.monotonic()
    until = begin + 60 * run.options.minutes
    crowd = [asyncio.create_task(clients.work(n, until)) for n in range(run.options.clients)]
    try:
        with tqdm(total=round(60 * run.options.minutes), unit="s", desc="soak", file=sys.stderr) as bar:
            while not all(task.done() for task in crowd):
                await asyncio.sleep(1)
                passed = time.monotonic() - begin
                bar.update(min(round(passed), bar.total) - bar.n)
                if len(run.memory) <= passed / 5:
                    run.memory.append((passed / 60, resident(pid()) / 2**20))
                bar.set_postfix(right=run.count.right, wrong=len(run.count.wrong), failed=run.count.failures.total())
        await asyncio.gather(*crowd)
    except asyncio.CancelledError:
        run.interrupted = True
        if task := asyncio.current_task():
            task.uncancel()
    finally:
        for one in crowd:
            one.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        run.seconds = time.monotonic() - begin


def resident(group: int) -> int:
    """Bytes resident in all processes of a process group (Linux)."""
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:  # field 5 of proc(5), the process group
                total += int((folder / "statm").read_text().split()[1]) * page
        except OSError:
            continue  # it has just ended
    return total


async def _metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """The server's own counters that tell whether the load was what it should be."""
    text = (await http.get("/metrics")).text
    wanted = ("vllm:num_preemptions_total", "be_serve_row_writes_total", "be_serve_resident_tokens")
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name.startswith(wanted) and not name.endswith("_created"):
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


def summary(result: dict[str, Any]) -> Sequence[str]:
    """The figures as lines for people."""
    answers, memory = result["answers"], result["memory_mib"]
    made = sum(kind["made"] for kind in result["attempts"].values())
    succeeded = sum(kind["succeeded"] for kind in result["attempts"].values())
    lines = [
        f"{sum(result['requests'].values())} actions in {result['seconds'] / 60:.1f} min: "
        + ", ".join(f"{count} {name}" for name, count in sorted(result["requests"].items())),
        f"answers compared: {answers['right']} right, {answers['tie']} ties, {answers['wrong']} wrong "
        f"(two tokens' right answers differ in {100 * result['distinct']:.0f} % of pairs)",
        f"attempts: {made} made, {succeeded} succeeded; "
        + ", ".join(f"{kind} {count['made']}/{count['succeeded']}" for kind, count in result["attempts"].items()),
        f"errors that are not the client's: {sum(result['failures'].values())}",
        *(f"  {count} x {error}" for error, count in sorted(result["failures"].items())[:10]),
    ]
    if memory:
        lines.append(f"memory: {memory[0][1]:.0f} MiB at first, {memory[-1][1]:.0f} at last")
    if result["memory_growth"] is not None:
        lines.append(f"memory of the last tenth over the second tenth: {result['memory_growth']:.3f}")
    lines += [f"{name}: {value:.0f}" for name, value in sorted(result["metrics"].items())]
    return lines
