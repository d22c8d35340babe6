"""Run the steps in order. Store each step as soon as it ends; skip finished steps."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import BEError, InputError
from be_serve.core.redaction import hide, redact, secrets_of
from benchmarks.common.machine import gpus, hardware, versions
from benchmarks.common.servers import engine_settings
from benchmarks.gpu.chart import draw
from benchmarks.gpu.report import report
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.steps import MODES, Interrupted, Plan, Say, Step, chosen, ensure_model


@dataclass
class GpuRun:
    """A plan and the results of its steps."""

    plan: Plan
    say: Say
    state: dict[str, Any]

    @classmethod
    def open(cls, plan: Plan, say: Say, *, commit: str | None = None, fresh: bool = False) -> GpuRun:
        """Return a run in `plan.out`; it continues an earlier run there.

        Raises InputError if the earlier result is damaged, or if only one of the two runs is tiny.
        """
        path = plan.out / "gpu.json"
        state: dict[str, Any] = {}
        if path.exists() and not fresh:
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as exc:
                raise InputError(f"{path} is damaged ({exc}). Use another --out, or --fresh.") from exc
            if fault := _fault(state):
                raise InputError(f"{path} is damaged ({fault}). Use another --out, or --fresh.")
            if state.get("tiny") != plan.tiny:
                raise InputError(f"{path} is from a run with{'out' if plan.tiny else ''} --tiny. Use another --out.")
        found = versions() | ({"git_commit": commit} if commit else {})
        state = {
            "benchmark": "gpu",
            "tiny": plan.tiny,
            "steps": {},
            "commands": [],
            **state,
            "hardware": hardware(),
            "versions": found,
            "environment": engine_settings(os.environ),
            "shapes": {name: vars(plan.shape(name)) | {"paper": None} for name in SHAPES},
        }
        state["commands"] = [*state["commands"], redact(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])]
        return cls(plan, say, state)

    def done(self, name: str) -> bool:
        """Return whether a step is finished."""
        return bool(self.state["steps"].get(name, {}).get("status") == "done")

    async def run(self, names: Sequence[str] = ()) -> int:
        """Run the steps; return the exit status: 0, 1 if a step failed, 130 after Ctrl-C."""
        steps = [step for step in chosen(tuple(names), self.plan.tiny) if not self.done(step.name)]
        if any(step.serves for step in steps) and not self.done("start") and "start" not in {s.name for s in steps}:
            steps = [*chosen(("start",)), *steps]
        minutes = sum(step.about_seconds(self.plan.tiny) for step in steps) / 60
        self.say(f"{len(steps)} steps, about {minutes:.0f} minutes plus the time to make the models: {_names(steps)}")
        if gpus() and find_spec("flashinfer") is None:
            # vLLM's sampler needs FlashInfer by default; without it the engine fails.
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
            self.say("FlashInfer is not installed, so vLLM samples without it (VLLM_USE_FLASHINFER_SAMPLER=0).")
        failed = False
        for number, step in enumerate(steps, 1):
            self.say(f"[{number}/{len(steps)}] {step.name}: {step.about}")
            status = await self._one(step)
            failed = failed or status == "failed"
            if status == "interrupted":
                self.say(
                    f"Stopped. The results so far are in {self.plan.out}. To continue, run the same command again."
                )
                return 130
        return int(failed)

    async def _one(self, step: Step) -> str:
        began, started = time.monotonic(), datetime.now().astimezone()
        out = self.plan.out / step.name
        out.mkdir(parents=True, exist_ok=True)
        entry: dict[str, Any] = {"started": started.isoformat(timespec="seconds")}
        try:
            if step.model:
                await ensure_model(self.plan, step.model, self.say)
                began = time.monotonic()
            plan = self.plan
            if step.serves:
                mode = self.state["steps"].get("start", {}).get("figures")
                if mode is None:
                    raise InputError("vLLM did not start. See the error of the step `start`.")
                plan = replace(plan, server_args=(*mode["server_args"], *plan.server_args))
            entry["figures"] = await step.run(plan, out, self.say)
            entry["status"] = "done"
        except (Interrupted, asyncio.CancelledError):
            entry["status"] = "interrupted"
        except (BEError, RuntimeError, OSError, ValueError, LookupError) as exc:  # other steps can still succeed
            why = hide(str(exc), secrets_of((*self.plan.server_args, *self.plan.quality_args), os.environ))
            entry |= {"status": "failed", "error": f"{type(exc).__name__}: {why}"}
            self.say(f"  failed: {why}")
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.state["steps"][step.name] = entry
        self.keep()
        self.say(f"  {entry['status']} after {entry['seconds']:.0f} s")
        return str(entry["status"])

    def keep(self) -> None:
        """Write the results so far: gpu.json, README.md and ttft.png."""
        out = self.plan.out
        write_atomically(out / "gpu.json", (json.dumps(self.state, indent=1) + "\n").encode())
        write_atomically(out / "README.md", (report(self.state) + "\n").encode())
        draw(self.state, out / "ttft.png")


def _fault(state: object) -> str:
    """What is wrong with an earlier result; empty if nothing is. Its server arguments go to vLLM's command line."""
    if not isinstance(state, dict):
        return "it holds no object"
    steps, commands = state.get("steps", {}), state.get("commands", [])
    if not isinstance(steps, dict) or not all(isinstance(entry, dict) for entry in steps.values()):
        return "its steps are no objects"
    if not isinstance(commands, list) or not all(isinstance(command, list) for command in commands):
        return "its commands are no lists"
    if not all(isinstance(word, str) for command in commands for word in command):
        return "a word of its commands is no text"
    for name, entry in steps.items():
        if not isinstance(entry.get("figures", {}), dict):
            return f"the figures of {name} are no object"
        complete = isinstance(entry.get("started"), str) and isinstance(entry.get("seconds"), int | float)
        if entry.get("status") not in ("done", "failed", "interrupted") or not complete:
            return f"{name} has no status, start or duration"
        if entry["status"] == "done" and "figures" not in entry:
            return f"{name} has no figures"
    start = steps.get("start", {}).get("figures")
    if start is not None and start.get("server_args") not in [list(arguments) for _, arguments in MODES]:
        return "the step start names server arguments of no known mode"
    return ""


def _names(steps: Sequence[Step]) -> str:
    return ", ".join(step.name for step in steps) or "none left"
