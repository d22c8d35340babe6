"""A long time at saturation: is every answer right, is anything lost, does memory stay flat?

Each token's vectors are the embedding rows of a short text, so the right answer is known
without the plugin: stock vLLM's, to the same text as a plain system prompt, asked one at
a time before the load begins. Then many clients at once do what clients do, for minutes:

    token     a chat with a token; its answer is compared
    plain     a chat with the plain text; compared
    long      either with a message of several blocks, to fill the KV cache; the whole long answer is compared
    abort     a token's stream, given up after its first event
    churn     register a token under a new id, ask it (compared), remove it, ask again (404)
    attack    reach for another's row, vector or KV blocks (`ATTACKS`)

The server is given fewer rows than the tokens need and a small KV cache, so that rows
change their owner all the time and requests are preempted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
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

from be_serve.child_server import ServerError
from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from benchmarks.client import ServerClient, server_message
from benchmarks.machine import gpus, hardware, redact, versions
from benchmarks.prompts import Chat, question_text
from benchmarks.servers import ServerOptions, plugin_server, stock_server
from benchmarks.tokens import make_token

COMPARED = 8
"""Tokens of a short answer; all are compared."""
LONG, LONG_TOKENS, LONG_WORDS = 8, 96, 270
"""Long answers with a reference, their tokens, and the words of their messages: they grow into a block of their own."""
TIE = 0.35
"""Nats behind the likeliest token within which another order of sums may bring a token to the front (bfloat16)."""
MAX_MODEL_LEN = 1024
_GAP = 1024  # ids between the padded vocabulary and the first row (docs/operations.md)
_PADDING = 64  # of vLLM's vocabulary
ACTIONS = {"token": 50, "plain": 12, "long": 12, "abort": 12, "churn": 6, "attack": 8}
ATTACKS = {
    "raw_ids": "rows' ids as a prompt",
    "allowed_ids": "a row's id as the only one to sample",
    "logit_bias": "a row's id preferred by 100",
    "detokenize": "a row's id as text",
    "prompt_logprobs": "what the model thinks of the rows",
    "vector": "the vectors, by the admin API with and without its key",
    "blocks": "another token's KV blocks, with the same message and the same cache_salt",
}
_REFUSED = {"raw_ids": 400, "allowed_ids": 400, "logit_bias": 400, "prompt_logprobs": 400}
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
    kv_tokens: int = 4096
    """Tokens that the engine's KV cache holds."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The tokens of a greedy answer, and how clear each choice was."""

    tokens: tuple[str, ...]
    close: tuple[frozenset[str], ...]
    """The other tokens within `TIE` of the likeliest, at each place."""


@dataclass
class Count:
    """What became of the requests."""

    right: Counter[str] = field(default_factory=Counter)
    """By action, as are ties: those of `plain` have nothing to do with tokens."""
    ties: Counter[str] = field(default_factory=Counter)
    """Answers that took another token within `TIE` of the likeliest; what follows cannot be compared."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Errors that are not the client's, and answers that tell nothing."""
    attempts: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    void: Counter[str] = field(default_factory=Counter)
    """Attempts on blocks that had left the cache by then: they count as not made."""

    def judge(self, action: str, reference: Answer, got: Answer, what: dict[str, Any]) -> None:
        """Compare an answer with the right one, token by token."""
        for n, right in enumerate(reference.tokens):
            ours = got.tokens[n] if n < len(got.tokens) else None
            if ours == right:
                continue
            if ours in reference.close[n]:
                self.ties[action] += 1
            else:
                self.wrong.append({**what, "at": n, "got": got.tokens, "right": reference.tokens})
            return
        if len(got.tokens) == len(reference.tokens):
            self.right[action] += 1
        else:
            self.wrong.append({**what, "at": len(reference.tokens), "got": got.tokens, "right": reference.tokens})


@dataclass
class SoakRun:
    """What was measured, and where."""

    options: SoakOptions
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    count: Count = field(default_factory=Count)
    distinct: float = 0.0
    """Share of pairs of tokens whose right answers differ, each question by itself: how far a mix-up would show."""
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Minute, and MiB of each of the server's processes, shared pages counted once (PSS)."""
    seconds: float = 0.0
    interrupted: bool = False
    command: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def growth(self) -> float | None:
        """Median memory of the last tenth over that of the second tenth, None for too few samples."""
        n = len(self.memory) // 10
        if not n:
            return None
        sizes = [sum(sizes.values()) for _, sizes in self.memory]
        return statistics.median(sizes[-n:]) / statistics.median(sizes[n : 2 * n])

    def slopes(self) -> dict[str, float]:
        """MiB a minute of each process over the last two thirds, by least squares; empty for too few samples."""
        late = self.memory[len(self.memory) // 3 :]
        if len(late) < 10:
            return {}
        minutes = [minute for minute, _ in late]
        names = sorted({name for _, sizes in late for name in sizes})
        return {
            name: statistics.linear_regression(minutes, [sizes.get(name, 0.0) for _, sizes in late]).slope
            for name in names
        }

    @property
    def clean(self) -> bool:
        """Whether every answer was right, nothing failed, and all was attempted and nothing reached."""
        count = self.count
        proven = bool(count.right) and all(count.attempts[kind] for kind in ATTACKS)
        return proven and not (count.wrong or count.failures or count.succeeded.total())

    def result(self) -> dict[str, Any]:
        """All figures as plain data."""
        count = self.count
        return {
            "benchmark": "soak",
            "date": self.started.isoformat(timespec="seconds"),
            "command": redact(sys.argv),
            "options": {**asdict(self.options), "folder": None, "out": None, "servers": None},
            "hardware": hardware(),
            "versions": versions(),
            "server": self.command,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "answers": {
                "wrong": len(count.wrong),
                **{name: {"right": count.right[name], "ties": count.ties[name]} for name in sorted(count.right)},
            },
            "wrong": count.wrong[:20],
            "distinct": self.distinct,
            "requests": dict(count.asked),
            "failures": dict(count.failures),
            "attempts": {
                kind: {"what": what, "made": count.attempts[kind], "succeeded": count.succeeded[kind]}
                for kind, what in ATTACKS.items()
            },
            "attempts_void": dict(count.void),
            "memory_mib": self.memory,
            "memory_growth": self.growth(),
            "memory_slopes_mib_a_minute": self.slopes(),
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
                "--be-injection=resident-rows",  # without rows there is nothing to attack
                f"--be-rows={options.rows}",
                f"--num-gpu-blocks-override={-(-options.kv_tokens // (16 if gpus() else 128))}",
                f"--max-num-seqs={options.clients}",
                *options.servers.plugin_args,
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
        for n, (be_id, token) in enumerate(itertools.islice(tokens.items(), LONG)):
            messages = chat.messages(str(token.manifest.prompt.text), _long_message(options.seed + n))
            body = _body(model, token) | {"messages": messages, "max_tokens": LONG_TOKENS}
            references[be_id, -1] = _answer(await client.call("POST", "/v1/chat/completions", json=body))
    return tokens, references


def _long_message(seed: int) -> str:
    return " ".join(question_text(seed, "long").split()[:LONG_WORDS])


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
        "top_logprobs": 8,
        "return_tokens_as_token_ids": True,  # two tokens may have one text
    }
    if token.manifest.template_kwargs:
        body["chat_template_kwargs"] = token.manifest.template_kwargs
    return body


def _answer(body: dict[str, Any]) -> Answer:
    places = body["choices"][0]["logprobs"]["content"]
    close = [
        frozenset(one["token"] for one in place["top_logprobs"] if one["logprob"] > place["logprob"] - TIE)
        - {place["token"]}
        for place in places
    ]
    return Answer(tuple(place["token"] for place in places), tuple(close))


def _distinct(references: dict[tuple[str, int], Answer]) -> float:
    by_question: dict[int, list[Answer]] = {}
    for (_, q), answer in references.items():
        if q < 0:
            continue  # each long message is asked of one token
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
            except Exception as exc:  # whatever it is, it is no right answer, and the others go on
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
        """A message of several blocks, and a long answer that others push out of the cache."""
        n = rng.randrange(min(LONG, len(self.tokens)))
        be_id = list(self.tokens)[n]
        use_token = rng.random() < 0.7
        body = self._chat(be_id, 0, use_token=use_token) | {"max_tokens": LONG_TOKENS}
        body["messages"][-1]["content"] = _long_message(self.options.seed + n)
        await self._compare("long" if use_token else "long, plain", be_id, -1, body)

    async def abort(self, rng: random.Random) -> None:
        """A stream that is given up after its first event."""
        be_id, q = self._pick(rng)
        body = self._chat(be_id, q, use_token=True) | {"stream": True, "max_tokens": 200}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                self._expect("abort", answer, 200)
                return
            async for line in answer.aiter_lines():
                if "choices" not in json.loads(line.removeprefix("data:")):
                    self.count.failures[f"abort: the stream began with {line}"[:200]] += 1
                return
        self.count.failures["abort: an empty stream"] += 1

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
        kind = rng.choice(list(ATTACKS))
        if kind == "blocks":
            await self._attack_blocks(rng)
            return
        self.count.attempts[kind] += 1
        be_id, q = self._pick(rng)
        first = -(-self.vocabulary // _PADDING) * _PADDING + _GAP
        row = first + rng.randrange(self.options.rows)
        if kind == "vector":
            await self._attack_vector(be_id)
        elif kind == "detokenize":
            answer = await self._post("/detokenize", {"model": self.model, "tokens": [row]})
            if answer.is_success and answer.json().get("prompt"):
                self.count.succeeded[kind] += 1
            elif answer.status_code != httpx.codes.BAD_REQUEST:
                self._expect(kind, answer, 200)
        elif kind == "raw_ids":
            raw = {"model": self.model, "prompt": [row] * 4, "max_tokens": 1}
            self._must_be_refused(kind, await self._post("/v1/completions", raw))
        else:
            options: dict[str, dict[str, Any]] = {
                "prompt_logprobs": {"prompt_logprobs": 1},
                "allowed_ids": {"allowed_token_ids": [row]},
                "logit_bias": {"logit_bias": {str(row): 100}},
            }
            use_token = kind == "prompt_logprobs" or rng.random() < 0.5
            body = self._chat(be_id, q, use_token=use_token) | options[kind]
            self._must_be_refused(kind, await self._post("/v1/chat/completions", body))

    def _must_be_refused(self, kind: str, answer: httpx.Response) -> None:
        if answer.is_success:
            self.count.succeeded[kind] += 1
        else:
            self._expect(kind, answer, _REFUSED[kind])

    async def _attack_vector(self, be_id: str) -> None:
        path = f"/v1/be/tokens/{be_id}"
        shut = await self.http.get(path)
        shown = await self.http.get(path, headers={"X-BE-Key": self.key})
        # An answer with fewer bytes than the vectors have numbers holds them in no encoding.
        if shut.is_success or len(shown.content) >= self.tokens[be_id].vectors.size:
            self.count.succeeded["vector"] += 1
        else:
            self._expect("vector, without the key", shut, 401)
            self._expect("vector, with the key", shown, 200)

    async def _attack_blocks(self, rng: random.Random) -> None:
        """One message with token A, then with B and A at once: only A may find its blocks, and must, to count."""
        a, b = rng.sample(list(self.tokens), 2)
        message = " ".join(_long_message(rng.getrandbits(32)).split()[:150])  # a block and a little

        async def cached(be_id: str) -> int | None:
            body = self._chat(be_id, 0, use_token=True) | {"max_tokens": 1, "cache_salt": "shared"}
            body["messages"][-1]["content"] = message
            answer = await self._post("/v1/chat/completions", body)
            if not self._expect("blocks", answer, 200):
                return None
            return (answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0

        await cached(a)
        others, own = await asyncio.gather(cached(b), cached(a))
        if others is None or own is None:
            return
        self.count.succeeded["blocks"] += bool(others)
        made = self.count.attempts if others or own else self.count.void
        made["blocks"] += 1

    async def _ask(self, name: str, be_id: str, q: int, *, use_token: bool, named: str | None = None) -> None:
        body = self._chat(be_id, q, use_token=use_token)
        if named:
            body["be_id"] = named
        await self._compare(name, be_id, q, body)

    async def _compare(self, name: str, be_id: str, q: int, body: dict[str, Any]) -> None:
        answer = await self._post("/v1/chat/completions", body)
        if self._expect(name, answer, 200):
            what = {"action": name, "token": be_id, "question": q}
            self.count.judge(name, self.references[be_id, q], _answer(answer.json()), what)

    def _chat(self, be_id: str, q: int, *, use_token: bool) -> dict[str, Any]:
        token = self.tokens[be_id]
        user = {"role": "user", "content": _question(q, self.options)}
        body = _body(self.model, token)
        if use_token:
            return {**body, "messages": [user], "be_id": be_id}
        return {**body, "messages": [{"role": "system", "content": token.manifest.prompt.text}, user]}

    def _pick(self, rng: random.Random) -> tuple[str, int]:
        return rng.choice(list(self.tokens)), rng.randrange(self.options.questions)

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
                    sizes = {name: size / 2**20 for name, size in resident(pid()).items()}
                    run.memory.append((passed / 60, sizes))
                bar.set_postfix(
                    right=run.count.right.total(), wrong=len(run.count.wrong), failed=run.count.failures.total()
                )
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


def resident(group: int) -> dict[str, int]:
    """Bytes of each process of a group by its name (Linux), a page that n share as 1/n of it in each (PSS)."""
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:  # field 5 of proc(5), the process group
                lines = (folder / "smaps_rollup").read_text().splitlines()
                bytes_ = next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                name = (folder / "comm").read_text().strip()
                found[name] = found.get(name, 0) + bytes_
        except (OSError, StopIteration):
            continue  # it has just ended
    return found


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
    memory, answers = result["memory_mib"], dict(result["answers"])
    wrong = answers.pop("wrong")
    attempts = result["attempts"]
    lines = [
        f"{sum(result['requests'].values())} actions in {result['seconds'] / 60:.1f} min: "
        + ", ".join(f"{count} {name}" for name, count in sorted(result["requests"].items())),
        f"answers compared: {sum(one['right'] for one in answers.values())} right, "
        f"{sum(one['ties'] for one in answers.values())} ties, {wrong} wrong "
        f"(two tokens' right answers differ in {100 * result['distinct']:.0f} % of pairs)",
        "right and ties: " + ", ".join(f"{name} {one['right']} and {one['ties']}" for name, one in answers.items()),
        f"attempts: {sum(kind['made'] for kind in attempts.values())} made, "
        f"{sum(kind['succeeded'] for kind in attempts.values())} succeeded; "
        + ", ".join(f"{kind} {count['made']}/{count['succeeded']}" for kind, count in attempts.items()),
        f"  not counted, for the blocks had left the cache: {sum(result['attempts_void'].values())}",
        f"errors that are not the client's: {sum(result['failures'].values())}",
        *(f"  {count} x {error}" for error, count in Counter(result["failures"]).most_common(10)),
    ]
    if memory:
        first, last = (sum(sizes.values()) for _, sizes in (memory[0], memory[-1]))
        lines.append(f"memory: {first:.0f} MiB at first, {last:.0f} at last")
    if slopes := result["memory_slopes_mib_a_minute"]:
        lines.append(
            f"the last tenth over the second tenth: {result['memory_growth']:.3f}; MiB a minute over the last two "
            "thirds: " + ", ".join(f"{name} {slope:+.2f}" for name, slope in slopes.items())
        )
    lines += [f"{name}: {value:.0f}" for name, value in sorted(result["metrics"].items())]
    return lines
