"""The soak itself: right answers first, then the crowd, with an eye on memory."""

from __future__ import annotations

import asyncio
import random
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import httpx

from be_serve.core.redaction import redact
from benchmarks.common.answers import Count
from benchmarks.common.machine import gpus, hardware, resident, versions
from benchmarks.common.servers import ServerOptions, engine_settings, plugin_server
from benchmarks.soak.answers import MAX_MODEL_LEN, right_answers, shown
from benchmarks.soak.attacks import ATTACKS, Attacks
from benchmarks.soak.client import Asker
from benchmarks.soak.options import SoakOptions
from benchmarks.soak.workload import Crowd

COMPARED_KINDS = ("token", "plain", "long", "churn")
LEAST_SHOWN = 0.5
EXCESS_OF_TIES = 0.1
"""Share of ties that tokens' answers may have beyond plain ones'."""
MOST_GROWTH, LONG_ENOUGH = 1.05, 20 * 60
"""Memory's last tenth over its second tenth, in a run of at least so many seconds: caches fill at first."""


@dataclass
class SoakRun:
    """What was measured, and where."""

    options: SoakOptions
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    count: Count = field(default_factory=Count)
    shown: float = 0.0
    """Share of mix-ups of two tokens that would count as wrong."""
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Minute, and MiB of each of the server's processes, shared pages counted once (PSS)."""
    seconds: float = 0.0
    interrupted: bool = False
    command: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    """What steers the server's engine and its threads."""
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

    def faults(self) -> list[str]:
        """What was wrong, and what this run cannot have shown; empty for a clean one."""
        count, found = self.count, []
        for number, what in (
            (len(count.wrong), "wrong answers"),
            (count.failures.total(), "errors that are not the client's"),
            (count.succeeded.total(), "attempts succeeded"),
        ):
            if number:
                found.append(f"{number} {what}")
        found += [f"no right answer of kind {kind!r}" for kind in COMPARED_KINDS if not count.right[kind]]
        found += [f"no attempt of kind {kind!r}" for kind in ATTACKS if not count.attempts[kind]]
        if self.shown < LEAST_SHOWN:
            found.append(f"only {self.shown:.0%} of mix-ups would count as wrong: ask other questions (--seed)")
        ties = {kind: count.ties[kind] / max(1, count.ties[kind] + count.right[kind]) for kind in ("token", "plain")}
        if ties["token"] > ties["plain"] + EXCESS_OF_TIES:
            found.append(f"ties in {ties['token']:.0%} of the tokens' answers, in {ties['plain']:.0%} of plain ones")
        if not self.metrics.get("vllm:num_preemptions_total"):
            found.append("no request was preempted: a smaller --kv-tokens, or more --clients")
        if self.metrics.get("be_serve_row_writes_total", 0) <= self.options.tokens:
            found.append("rows hardly changed their owner: fewer --rows")
        growth = self.growth()
        if growth is not None and growth > MOST_GROWTH and self.seconds >= LONG_ENOUGH:
            found.append(f"memory grew to {growth:.2f} times its size")
        return found

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
            "env": self.env,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "answers": {
                "wrong": len(count.wrong),
                **{name: {"right": count.right[name], "ties": count.ties[name]} for name in sorted(count.right)},
            },
            "wrong": count.wrong[:20],
            "shown": self.shown,
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
            "faults": self.faults(),
        }


async def soak(options: SoakOptions, say: Callable[[str], None]) -> SoakRun:
    """Ask stock vLLM for the right answers, then load a server with tokens.

    Ctrl-C during the load returns what was measured, with `interrupted` set.
    Raises InputError and ServerError.
    """
    run = SoakRun(options)
    say("Asking stock vLLM for the right answers ...")
    tokens, references = await right_answers(options)
    run.shown = shown(references)
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
        server = plugin_server(own, options.out, MAX_MODEL_LEN, admin_key=key)
        # On a CPU the worker keeps up to 1,024 compiled products, one for each batch size that it meets, and
        # grows by 40 to 60 MiB a minute until then, in stock vLLM as here. That would hide any other growth.
        server.env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        run.env = engine_settings(server.env)
        await stack.enter_async_context(server)
        run.command = redact(server.command)
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=server.url,
                timeout=httpx.Timeout(300.0),
                trust_env=False,
                limits=httpx.Limits(max_connections=None),
            )
        )
        asker = Asker(options, http, key, tokens, run.count)
        await asker.register()
        await Attacks(asker).takeover(random.Random(f"takeover {options.seed}"))  # noqa: S311
        await _load(run, Crowd(asker, references), lambda: server.pid)
        try:
            run.metrics = await _metrics(http)
        except httpx.HTTPError as exc:
            run.count.failures[f"the server ended: {type(exc).__name__}"] += 1
    return run


async def _load(run: SoakRun, crowd: Crowd, pid: Callable[[], int]) -> None:
    """Let the crowd in, and look at the memory while it is there."""
    from tqdm import tqdm

    begin = time.monotonic()
    until = begin + 60 * run.options.minutes
    clients = [asyncio.create_task(crowd.work(n, until)) for n in range(run.options.clients)]
    try:
        with tqdm(total=round(60 * run.options.minutes), unit="s", desc="soak", file=sys.stderr) as bar:
            while not all(task.done() for task in clients):
                await asyncio.sleep(1)
                passed = time.monotonic() - begin
                bar.update(min(round(passed), bar.total) - bar.n)
                if len(run.memory) <= passed / 5:
                    sizes = {name: size / 2**20 for name, size in resident(pid()).items()}
                    run.memory.append((passed / 60, sizes))
                bar.set_postfix(
                    right=run.count.right.total(), wrong=len(run.count.wrong), failed=run.count.failures.total()
                )
        await asyncio.gather(*clients)
    except asyncio.CancelledError:
        run.interrupted = True
        if task := asyncio.current_task():
            task.uncancel()
    finally:
        for one in clients:
            one.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        run.seconds = time.monotonic() - begin


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
        f"(of mix-ups of two tokens {100 * result['shown']:.0f} % would count as wrong)",
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
    return [*lines, *(f"FAULT: {fault}" for fault in result["faults"])] if result["faults"] else [*lines, "clean"]
