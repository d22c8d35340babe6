"""Measure the time to first token of [BE], no prompt, a plain k-token prompt and the full prompt.

This is the paper's Table 5 with two more arms. `full_warm` is the full prompt with a cached
prefix, the fair comparison for a token. `floor` is a plain prompt with as many tokens as the
token has vectors, on the same server: the lowest time that a token can reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from be_serve.core.addresses import warn_of_clear_text
from be_serve.core.artifact import Token
from be_serve.core.errors import InputError, ServerError
from be_serve.core.fingerprint import chat_template_text
from be_serve.core.redaction import redact, redact_word
from be_serve.core.slots import pinned_template_kwargs
from be_serve.process import Server
from benchmarks.common.client import ServerClient
from benchmarks.common.machine import hardware, versions
from benchmarks.common.prompts import Chat, fit_questions, fit_text, handbook
from benchmarks.common.servers import ServerOptions, engine_settings, plugin_server, start_all, stock_server
from benchmarks.common.tokens import BENCH_ID, make_token, register
from benchmarks.ttft.figures import Run
from benchmarks.ttft.rounds import Rounds
from benchmarks.ttft.workload import Case, ServerName, arms_for

SPIN_SECONDS = 1.2
"""A vLLM worker spins for one second after its last step (SpinCondition); this value adds a margin."""
PAPER_CASES = ((337, 26), (1584, 58), (3000, 58))
"""(prompt, question) lengths in tokens: RoleLLM and GSM8K of the paper's Table 8, and a longer prompt."""


@dataclass(frozen=True)
class TTFTOptions:
    """Options of `be-serve bench ttft`: arms, lengths and servers."""

    model: str
    out: Path
    servers: ServerOptions
    folder: Path | None = None
    """Folder of the model; needed to make a token."""
    revision: str | None = None
    url: str | None = None
    """URL of a running server with the plugin; None starts one."""
    baseline_url: str | None = None
    """URL of a running stock server. None starts one; with `url`, None runs all arms on the server at `url`."""
    be_id: str | None = None
    """Id of a token that the server at `url` already has."""
    token: Token | None = None
    """Token to measure; None makes one (see `benchmarks.common.tokens`)."""
    admin_key: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    k: int = 1
    rounds: int = 100
    close: int = 2
    """Extra passes in each round over the arms be and floor only."""
    warmup: int = 3
    cases: tuple[tuple[int, int], ...] = PAPER_CASES
    arms: tuple[str, ...] = ()
    """Names of the arms to measure; empty for all."""
    prompt: str | None = None
    """The user's prompt. It replaces the built-in text; `cases` then sets the question lengths only."""
    max_tokens: int = 2
    seed: int = 0
    freeze: bool = True
    """Suspend the idle one of our servers during requests to the other (see `Server.freeze`)."""
    pause: float | None = None
    """Seconds to wait before a request to the other server; None: see `rest`."""

    @property
    def plugin_only(self) -> bool:
        """Whether there is no stock server to compare with."""
        return self.url is not None and self.baseline_url is None


async def measure_ttft(options: TTFTOptions, say: Callable[[str], None]) -> Run:
    """Run the benchmark and return its samples. `say` receives one line per step.

    During the timed rounds, Ctrl-C and SIGTERM return the samples so far with `interrupted` set, and
    a failing server returns them with `stopped` set. Before the timed rounds these events raise.
    Raises InputError and ServerError.
    """
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    run = new_run(options)
    async with AsyncExitStack() as stack:
        fleet = _Fleet(options, stack, say)
        await fleet.open()
        counting = fleet.clients["plugin" if options.plugin_only else "stock"]
        chat = Chat(counting, await counting.model_id(), _template_kwargs(options))
        await chat.prepare()

        say("Making prompts and questions of exact length ...")
        floor = await fit_text(handbook(options.seed), options.k, chat.prompt_tokens)
        run.cases = await make_cases(chat, options, floor)
        token = options.token
        if token is None and options.be_id is None:
            token = await _token_of(floor, chat, options)
            run.token = {"made_here": True}

        be_id = await fleet.give(token)
        run.token |= {"be_id": be_id, "k": options.k, "recipe": token.manifest.recipe if token else None}
        run.servers = await fleet.describe()
        rounds = Rounds(
            run=run,
            chat=chat,
            clients=fleet.clients,
            models={name: await client.model_id() for name, client in fleet.clients.items()},
            be_id=be_id,
            own=fleet.own,
            warmup=options.warmup,
            freeze=options.freeze,
            pause=rest(options),
        )
        say(f"Warming up ({options.warmup} rounds) ...")
        await rounds.warm_up()
        await rounds.measure()
    return run


def new_run(options: TTFTOptions) -> Run:
    """Return a run without samples, with its options, machine and versions."""
    run = Run(
        model=options.model,
        k=options.k,
        seed=options.seed,
        rounds=options.rounds,
        close=options.close,
        max_tokens=options.max_tokens,
        arms=arms_for(options.plugin_only, options.arms),
        started=datetime.now().astimezone(),
        command=redact(sys.argv),
        hardware=hardware(),
        versions=versions(),
        settings=_settings(options),
    )
    if options.url is not None:
        run.notes.append("hardware and versions describe the client. The benchmark did not start the servers.")
    if options.plugin_only:
        run.notes.append("without --baseline-url, all arms ran on the plugin server, with its flags.")
    return run


@dataclass
class _Fleet:
    """The two servers, started here or given by URL, and one client for each."""

    options: TTFTOptions
    stack: AsyncExitStack
    say: Callable[[str], None]
    clients: dict[ServerName, ServerClient] = field(default_factory=dict)
    own: dict[ServerName, Server] = field(default_factory=dict)
    admin_key: str = field(default_factory=lambda: secrets.token_hex(16))
    """Key of the admin API of the plugin server that is started here."""

    async def open(self) -> None:
        """Connect to the servers with a URL, then start the others. Raises ServerError."""
        urls: dict[ServerName, str | None] = {"plugin": self.options.url}
        if not self.options.plugin_only:
            urls["stock"] = self.options.baseline_url
        for name, url in urls.items():
            if url is not None:
                await self._connect(name, url)
        self.own = {name: self._server(name) for name, url in urls.items() if url is None}
        if not self.own:
            return
        self.say(f"Starting {' and '.join(self.own)} server ...")
        await start_all(self.stack, self.own.values())
        for name, server in self.own.items():
            self.say(f"  {name} up after {server.start_seconds:.0f} s at {server.url}")
            await self._connect(name, server.url)

    def _server(self, name: ServerName) -> Server:
        options = self.options
        if name == "stock":
            return stock_server(options.servers, options.out, max_model_len(options))
        return plugin_server(options.servers, options.out, max_model_len(options), admin_key=self.admin_key)

    async def _connect(self, name: ServerName, url: str) -> None:
        client = await self.stack.enter_async_context(ServerClient(url, api_key=self.options.api_key))
        if not await client.healthy():
            raise ServerError(f"No server answers at {client.url}/health. Start the server or correct the URL.")
        self.clients[name] = client

    async def give(self, token: Token | None) -> str:
        """Register the token on the plugin server; return its be_id. Raises InputError and ServerError."""
        options = self.options
        if options.url is not None and options.be_id is not None:
            return options.be_id
        assert token is not None
        client = self.clients["plugin"]
        if options.url is None:
            await register(client, token.manifest.id, token, self.admin_key)
            return token.manifest.id
        return await self.stack.enter_async_context(_registered(client, token, options.admin_key))

    async def describe(self) -> dict[str, dict[str, Any]]:
        """Return address, versions and flags of the servers, for the result."""
        return {
            name: {
                "url": client.url,
                "started_here": name in self.own,
                "command": redact(self.own[name].command) if name in self.own else None,
                "env": engine_settings(self.own[name].env) if name in self.own else None,
                "start_seconds": round(self.own[name].start_seconds, 1) if name in self.own else None,
                "vllm_version": await client.version(),
                "model": await client.model_id(),
            }
            for name, client in self.clients.items()
        }


@contextlib.asynccontextmanager
async def _registered(client: ServerClient, token: Token, admin_key: str | None) -> AsyncIterator[str]:
    """Register the token on a running server under a new id; yield the id; remove the token at the end."""
    if not admin_key:
        raise InputError(
            "To measure a running server, name one of its tokens (--be-id), or give its admin key "
            "(--admin-key or BE_ADMIN_KEY) so that the benchmark can register a token."
        )
    be_id = f"{BENCH_ID}-{uuid4().hex[:8]}"
    address = urlsplit(client.url)
    warn_of_clear_text(address.scheme, address.hostname or "")
    await register(client, be_id, token, admin_key)
    try:
        yield be_id
    finally:
        await client.call("DELETE", f"/v1/be/tokens/{be_id}", headers={"X-BE-Key": admin_key})


async def _token_of(floor: str, chat: Chat, options: TTFTOptions) -> Token:
    """Return a token that holds the plain prompt's embeddings, so that both must give the same answers."""
    if options.folder is None:
        raise InputError(
            "The benchmark needs the model's files to make a token. Give --model, or a token (--token, --be-id)."
        )
    ids = await chat.plain_ids(floor)
    if len(ids) != options.k:  # the tokenizer merges the prompt's tokens with those around it
        ids = (ids * options.k)[: options.k]
    return make_token(options.folder, options.model, options.revision, ids, floor)


async def make_cases(chat: Chat, options: TTFTOptions, floor: str) -> list[Case]:
    """Return the cases with their texts. The server counts the tokens. Raises InputError and ServerError."""
    cases = []
    for wanted, question in options.cases:
        prompt = options.prompt or await fit_text(handbook(options.seed), wanted, chat.prompt_tokens)
        passes = options.warmup + options.rounds * (1 + options.close)
        labels = [f"{wanted}:{question} pass {n}" for n in range(passes)]
        questions = await fit_questions(chat, question, labels, options.seed)
        cases.append(
            Case(
                prompt=prompt,
                prompt_tokens=await chat.prompt_tokens(prompt),
                question_tokens=question,
                template_tokens=await chat.count("", questions[0]) - question,
                floor=floor,
                k=options.k,
                questions=tuple(questions),
            )
        )
    return cases


def max_model_len(options: TTFTOptions) -> int:
    """Return the context length for our servers: longest chat, chat template and answer, in blocks of 128 tokens."""
    # Assumes at least two bytes per token, which holds for prose in every tokenizer.
    prompts = [len(options.prompt.encode()) // 2] if options.prompt else [p for p, _ in options.cases]
    longest = max(prompts) + max(q for _, q in options.cases) + options.k + options.max_tokens + 256
    return -(-longest // 128) * 128


def rest(options: TTFTOptions) -> float:
    """Return the seconds to wait before a request to the other server, so that the idle worker stops spinning.

    The wait is 0 for our own servers, which are suspended, and for servers on two machines.
    """
    if options.pause is not None:
        return options.pause
    hosts = {urlsplit(url).hostname for url in (options.url, options.baseline_url) if url}
    return SPIN_SECONDS if options.baseline_url and len(hosts) == 1 else 0.0


def _template_kwargs(options: TTFTOptions) -> dict[str, Any]:
    """Return the token's chat template variables (Llama-3's date). Every arm sends them, so that all render alike."""
    if options.token is not None:
        return options.token.manifest.template_kwargs
    return pinned_template_kwargs(chat_template_text(options.folder)) if options.folder else {}


def _settings(options: TTFTOptions) -> dict[str, Any]:
    """Return the options for the result, without keys and texts."""
    hidden = {"admin_key", "api_key", "prompt", "token", "servers"}
    public = {k: v for k, v in vars(options).items() if k not in hidden}
    servers = asdict(options.servers)
    servers["server_args"] = redact(servers["server_args"])
    servers["plugin_args"] = redact(servers["plugin_args"])
    public = {k: str(v) if isinstance(v, Path) else v for k, v in public.items()}
    return {**{k: redact_word(v) if isinstance(v, str) else v for k, v in public.items()}, **servers}
