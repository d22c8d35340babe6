"""Warm-up and timed rounds. A round sends every arm of every case once, in random order, one request at a time.

A case in a round starts with a full pass over all arms. `close` extra passes over the arms in
`CLOSE` follow. Each pass has its own number, and arms are compared within a pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from uuid import uuid4

from be_serve.core.errors import ServerError
from be_serve.process import Server
from benchmarks.common.client import Sample, ServerClient
from benchmarks.common.prompts import Chat
from benchmarks.common.servers import run_alone
from benchmarks.ttft.figures import Run
from benchmarks.ttft.workload import CLOSE, Arm, Case, ServerName, request_body

MAX_FAILURES = 5
"""Number of consecutive failures of one server that ends the run."""


@dataclass
class Rounds:
    """Sends the requests and stores the samples in `run`. The servers must be up."""

    run: Run
    chat: Chat
    clients: Mapping[ServerName, ServerClient]
    models: Mapping[ServerName, str]
    be_id: str
    own: Mapping[ServerName, Server] = field(default_factory=dict)
    """Servers that the benchmark started."""
    warmup: int = 1
    freeze: bool = True
    pause: float = 0.0
    """Seconds to wait before a request to the other server."""
    salt: str = field(default_factory=lambda: uuid4().hex)
    """Cache salt of the warm arm. It differs between runs, so that no run finds an earlier run's prompts."""
    _last: ServerName | None = None

    async def ask(self, case: Case, arm: Arm, number: int) -> Sample:
        """Send one request of an arm. `number` counts passes from the first warm-up round."""
        if self.freeze:
            run_alone(self.own, arm.server)
        if self.pause and self._last not in (None, arm.server):
            await asyncio.sleep(self.pause)
        self._last = arm.server
        client = self.clients[arm.server]
        body = request_body(
            arm,
            case,
            case.questions[number],
            model=self.models[arm.server],
            chat=self.chat,
            be_id=self.be_id,
            salt=f"{self.salt}-{case.name}" if arm.warm else uuid4().hex,
            max_tokens=self.run.max_tokens,
        )
        await client.healthy()  # opens the connection again if the server has closed it
        begin = perf_counter()
        await client.healthy()
        round_trip = perf_counter() - begin
        sample = await client.chat(body)
        sample.round_trip = round_trip
        return sample

    async def warm_up(self) -> None:
        """Run the untimed rounds: fill the warm arm's cache, check lengths and answers.

        Raises ServerError for the first failed request.
        """
        for number in range(self.warmup):
            for case in self.run.cases:
                samples = {arm.name: await self.ask(case, arm, number) for arm in self.run.arms}
                for arm in self.run.arms:
                    self._check(case, arm, samples[arm.name], note=number == 0)
                if number == 0 and self.run.token.get("made_here") and "floor" in samples:
                    self._compare_answers(case, samples)

    def _check(self, case: Case, arm: Arm, sample: Sample, *, note: bool) -> None:
        if not sample.ok:
            server = self.own.get(arm.server)
            tail = server.tail() if server and not server.alive else ""
            raise ServerError(
                f"Arm {arm.name} of case {case.name} failed on the {arm.server} server: {sample.error}{tail}"
            )
        if note and sample.prompt_tokens != case.input_tokens(arm):
            self.run.notes.append(
                f"arm {arm.name} of case {case.name} has {sample.prompt_tokens} input tokens, "
                f"expected {case.input_tokens(arm)}."
            )

    def _compare_answers(self, case: Case, samples: dict[str, Sample]) -> None:
        """Note a difference between the answers of the token and of the prompt whose embeddings it holds."""
        be, floor = samples["be"].text, samples["floor"].text
        self.run.token.setdefault("answers_as_its_text", {})[case.name] = be == floor
        if be != floor:
            self.run.notes.append(
                f"case {case.name}: the token answered {be!r}, the text with the same embeddings answered {floor!r}. "
                "The cause may be more than rounding."
            )

    async def measure(self) -> None:
        """Run the timed rounds. Ctrl-C and a failing server end them early; `run` keeps the samples."""
        from tqdm import tqdm

        run = self.run
        failures = dict.fromkeys(self.clients, 0)
        total, last = len(list(order(run))), None
        with (
            tqdm(total=total, unit="req", desc="TTFT", smoothing=0.02, mininterval=1.0, file=sys.stderr) as bar,
            _no_gc(),
        ):
            try:
                for number, case, arm in order(run):
                    if number != last:
                        gc.collect()
                        last = number
                    sample = await self.ask(case, arm, self.warmup + number)
                    run.samples.setdefault((case.name, arm.name), {})[number] = sample
                    bar.update()
                    failures[arm.server] = 0 if sample.ok else failures[arm.server] + 1
                    if not sample.ok:
                        tqdm.write(f"pass {number}, {case.name}, {arm.name}: {sample.error}", file=sys.stderr)
                    if failures[arm.server] == MAX_FAILURES:
                        run.stopped = self._why_stopped(arm.server, sample)
                        break
            except asyncio.CancelledError:
                run.interrupted = True
                if task := asyncio.current_task():
                    task.uncancel()
        run.hardware["load_average_after"] = [round(load, 2) for load in os.getloadavg()]

    def _why_stopped(self, name: ServerName, sample: Sample) -> str:
        server = self.own.get(name)
        tail = server.tail() if server else ""
        return f"The {name} server failed {MAX_FAILURES} times in a row. Last error: {sample.error}{tail}"


def order(run: Run) -> Iterator[tuple[int, Case, Arm]]:
    """Yield (pass, case, arm) of every request of a run, in the order that the seed determines.

    The arms of one pass are consecutive, so that compared requests are close in time.
    """
    rng = random.Random(f"order {run.seed}")  # noqa: S311
    close = [arm for arm in run.arms if arm.name in CLOSE]
    for number in range(run.rounds):
        for case in rng.sample(run.cases, len(run.cases)):
            for extra in range(1 + run.close):
                arms = close if extra else run.arms
                for arm in rng.sample(arms, len(arms)):
                    yield number * (1 + run.close) + extra, case, arm


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """Disable garbage collection during timed requests. The loop collects between passes."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
