"""Run the load benchmark: starts, warm-up and timed rounds."""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from be_serve.core.errors import ServerError
from be_serve.core.redaction import redact
from benchmarks.common.machine import hardware, versions
from benchmarks.load.figures import HISTOGRAMS, Round, load_figures, shares
from benchmarks.load.options import LoadOptions
from benchmarks.load.workload import Fleet


@dataclass
class LoadRun:
    """Rounds of one run, with its options and servers."""

    options: LoadOptions
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    rounds: list[Round] = field(default_factory=list)
    interrupted: bool = False
    servers: dict[str, list[str]] = field(default_factory=dict)
    """Command of each server at the last start."""
    injection: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in HISTOGRAMS})
    """Histograms of the plugin server, summed over all starts."""

    def result(self) -> dict[str, Any]:
        """Return all figures as plain data for JSON."""
        options = {**asdict(self.options), "folder": None, "out": None, "servers": None}  # redacted commands: "servers"
        return {
            "benchmark": "load",
            "date": self.started.isoformat(timespec="seconds"),
            "command": redact(sys.argv),
            "options": options,
            "hardware": hardware(),
            "versions": versions(),
            "servers": self.servers,
            "interrupted": self.interrupted,
            **load_figures(self.options, self.rounds),
            "injection_seconds": {name: found for name, counts in self.injection.items() if (found := shares(counts))},
        }


async def measure_load(options: LoadOptions, say: Callable[[str], None]) -> LoadRun:
    """Start both servers `starts` times, register the tokens and send the bursts; return the rounds.

    Ctrl-C and a server that fails to start again return the rounds so far with `interrupted` set.
    Before the first round they raise. Raises InputError and ServerError.
    """
    from tqdm import tqdm

    run, key = LoadRun(options), secrets.token_hex(16)
    rng = random.Random(f"order {options.seed}")  # noqa: S311
    with tqdm(total=options.rounds, unit="round", desc="load", file=sys.stderr) as bar:
        try:
            for number, share in enumerate(options.shares):
                bar.set_postfix_str(f"start {number + 1} of {len(options.shares)}")
                async with AsyncExitStack() as stack:
                    fleet = await Fleet.start(options, stack, key, other_first=number % 2 == 1)
                    run.servers = {name: redact(server.command) for name, server in sorted(fleet.servers.items())}
                    if number == 0:
                        say(f"Registering {options.registered} tokens ...")
                        await fleet.register()
                    await _warm_up(fleet)
                    before = (
                        await fleet.injection()
                    )  # excludes the first use, which loads the vectors from the registry
                    for _ in range(share):
                        run.rounds.append(await _round(fleet, number, rng))
                        bar.update()
                    for name, counts in (await fleet.injection()).items():
                        counts.subtract(before.get(name, {}))
                        run.injection[name].update(counts)
        except (asyncio.CancelledError, ServerError) as exc:
            if not run.rounds:
                raise
            say(f"Ended after {len(run.rounds)} rounds: {str(exc) or 'interrupted'}")
            run.interrupted = True
            if isinstance(exc, asyncio.CancelledError) and (task := asyncio.current_task()):
                task.uncancel()
    return run


async def _round(fleet: Fleet, start: int, rng: random.Random) -> Round:
    arms = fleet.options.arms
    return Round(start, {arm: await fleet.burst(arm) for arm in rng.sample(arms, len(arms))})


async def _warm_up(fleet: Fleet) -> None:
    for _ in range(fleet.options.warmup):
        for arm in fleet.options.arms:
            burst = await fleet.burst(arm)
            if burst.figures() is None:
                errors = {sample.error for sample in burst.samples if not sample.ok}
                raise ServerError(f"Arm {arm} failed during warm-up: {'; '.join(sorted(errors))}")
