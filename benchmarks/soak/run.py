"""Run the soak: collect reference answers, load the server, sample its memory."""

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
from benchmarks.soak.answers import MAX_MODEL_LEN, detectable_share, right_answers
from benchmarks.soak.attacks import ATTACKS, Attacks
from benchmarks.soak.client import SoakClient
from benchmarks.soak.options import SoakOptions
from benchmarks.soak.workload import Workload

COMPARED_KINDS = ("token", "plain", "long", "churn")
MIN_DETECTABLE = 0.5
"""Minimum share of mix-ups that must count as wrong."""
EXCESS_OF_TIES = 0.1
"""How much the share of ties may be higher for answers with tokens than for plain answers."""
MOST_GROWTH, LONG_ENOUGH = 1.05, 20 * 60
"""Maximum ratio of memory in the last tenth to memory in the second tenth, for runs of at least this many seconds.

The first tenth does not count, because caches fill then.
"""


@dataclass
class SoakRun:
    """Counts and samples of one soak, with its options and server."""

    options: SoakOptions
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    count: Count = field(default_factory=Count)
    detectable: float = 0.0
    """Share of mix-ups of two tokens that would count as wrong (JSON key: `shown`)."""
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """(minute, process name -> MiB) samples; the unit is proportional set size (PSS)."""
    seconds: float = 0.0
    interrupted: bool = False
    command: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables that configure the server's engine and threads."""
    metrics: dict[str, float] = field(default_factory=dict)

    def growth(self) -> float | None:
        """Return median memory of the last tenth divided by that of the second tenth; None for too few samples."""
        n = len(self.memory) // 10
        if not n:
            return None
        sizes = [sum(sizes.values()) for _, sizes in self.memory]
        return statistics.median(sizes[-n:]) / statistics.median(sizes[n : 2 * n])

    def slopes(self) -> dict[str, float]:
        """Return the growth of each process in MiB per minute, by least squares over the last two thirds.

        Empty for too few samples.
        """
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
        """Return the detected faults and the checks that this run could not make; empty for a clean run."""
        count, found = self.count, []
        for number, what in (
            (len(count.wrong), "wrong answers"),
            (count.failures.total(), "server errors"),
            (count.succeeded.total(), "attacks succeeded"),
        ):
            if number:
                found.append(f"{number} {what}")
        found += [f"no right answer of kind {kind!r}" for kind in COMPARED_KINDS if not count.right[kind]]
        found += [f"no attack of kind {kind!r}" for kind in ATTACKS if not count.attempts[kind]]
        if self.detectable < MIN_DETECTABLE:
            found.append(f"only {self.detectable:.0%} of mix-ups would count as wrong; use another --seed")
        ties = {kind: count.ties[kind] / max(1, count.ties[kind] + count.right[kind]) for kind in ("token", "plain")}
        if ties["token"] > ties["plain"] + EXCESS_OF_TIES:
            found.append(f"ties in {ties['token']:.0%} of answers with tokens, in {ties['plain']:.0%} of plain answers")
        if not self.metrics.get("vllm:num_preemptions_total"):
            found.append("no request was preempted; use a smaller --kv-tokens or more --clients")
        if self.metrics.get("be_serve_row_writes_total", 0) <= self.options.tokens:
            found.append("rows hardly changed owners; use fewer --rows")
        growth = self.growth()
        if growth is not None and growth > MOST_GROWTH and self.seconds >= LONG_ENOUGH:
            found.append(f"memory grew to {growth:.2f} times its size")
        return found

    def result(self) -> dict[str, Any]:
        """Return all figures as plain data for JSON."""
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
            "shown": self.detectable,
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
    """Collect reference answers from stock vLLM, then load a server with tokens; return the counts.

    Ctrl-C during the load returns the counts so far with `interrupted` set.
    Raises InputError and ServerError.
    """
    run = SoakRun(options)
    say("Collecting reference answers from stock vLLM ...")
    tokens, references = await right_answers(options)
    run.detectable = detectable_share(references)
    key = secrets.token_hex(16)
    own = ServerOptions(
        **{
            **vars(options.servers),
            "plugin_args": (
                "--be-injection=resident-rows",  # the attacks need rows
                f"--be-rows={options.rows}",
                f"--num-gpu-blocks-override={-(-options.kv_tokens // (16 if gpus() else 128))}",
                f"--max-num-seqs={options.clients}",
                *options.servers.plugin_args,
            ),
        }
    )
    async with AsyncExitStack() as stack:
        say("Starting the plugin server ...")
        server = plugin_server(own, options.out, MAX_MODEL_LEN, admin_key=key)
        # On a CPU the worker caches up to 1,024 compiled matrix products, one for each batch size. Its memory then
        # grows by 40 to 60 MiB per minute, in stock vLLM too. A small cache keeps other growth visible.
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
        client = SoakClient(options, http, key, tokens, run.count)
        await client.register()
        await Attacks(client).takeover(random.Random(f"takeover {options.seed}"))  # noqa: S311
        await _load(run, Workload(client, references), lambda: server.pid)
        try:
            run.metrics = await _metrics(http)
        except httpx.HTTPError as exc:
            run.count.failures[f"the server ended: {type(exc).__name__}"] += 1
    return run


async def _load(run: SoakRun, workload: Workload, pid: Callable[[], int]) -> None:
    """Run the clients until the time is over and sample the server's memory every 5 seconds."""
    from tqdm import tqdm

    begin = time.monotonic()
    until = begin + 60 * run.options.minutes
    clients = [asyncio.create_task(workload.work(n, until)) for n in range(run.options.clients)]
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
    """Return the server's counters that show whether the load was heavy enough."""
    text = (await http.get("/metrics")).text
    wanted = ("vllm:num_preemptions_total", "be_serve_row_writes_total", "be_serve_resident_tokens")
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name.startswith(wanted) and not name.endswith("_created"):
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


def summary(result: dict[str, Any]) -> Sequence[str]:
    """Return the printed report, one line per item."""
    memory, answers = result["memory_mib"], dict(result["answers"])
    wrong = answers.pop("wrong")
    attempts = result["attempts"]
    lines = [
        f"{sum(result['requests'].values())} actions in {result['seconds'] / 60:.1f} min: "
        + ", ".join(f"{count} {name}" for name, count in sorted(result["requests"].items())),
        f"answers compared: {sum(one['right'] for one in answers.values())} right, "
        f"{sum(one['ties'] for one in answers.values())} ties, {wrong} wrong "
        f"({100 * result['shown']:.0f} % of mix-ups of two tokens would count as wrong)",
        "right and ties by action: "
        + ", ".join(f"{name} {one['right']} and {one['ties']}" for name, one in answers.items()),
        f"attacks: {sum(kind['made'] for kind in attempts.values())} made, "
        f"{sum(kind['succeeded'] for kind in attempts.values())} succeeded; "
        + ", ".join(f"{kind} {count['made']}/{count['succeeded']}" for kind, count in attempts.items()),
        f"  not counted, because the cache had evicted the blocks: {sum(result['attempts_void'].values())}",
        f"server errors: {sum(result['failures'].values())}",
        *(f"  {count} x {error}" for error, count in Counter(result["failures"]).most_common(10)),
    ]
    if memory:
        first, last = (sum(sizes.values()) for _, sizes in (memory[0], memory[-1]))
        lines.append(f"memory: {first:.0f} MiB at the start, {last:.0f} MiB at the end")
    if slopes := result["memory_slopes_mib_a_minute"]:
        lines.append(
            f"memory, last tenth / second tenth: {result['memory_growth']:.3f}; MiB/minute over the last two thirds: "
            + ", ".join(f"{name} {slope:+.2f}" for name, slope in slopes.items())
        )
    lines += [f"{name}: {value:.0f}" for name, value in sorted(result["metrics"].items())]
    return [*lines, *(f"FAULT: {fault}" for fault in result["faults"])] if result["faults"] else [*lines, "clean"]
