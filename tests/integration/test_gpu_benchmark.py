"""`python -m benchmarks.gpu --tiny`: every step of the GPU's benchmark, on tiny shapes and a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.server, pytest.mark.model, pytest.mark.more]


@pytest.mark.timeout(1800)
def test_every_step_in_its_tiny_form(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path / "out")]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    took = time.monotonic() - began
    state = json.loads((tmp_path / "out" / "gpu.json").read_text())
    failed = {name: step.get("error") for name, step in state["steps"].items() if step["status"] != "done"}
    assert (done.returncode, failed) == (0, {}), done.stderr[-4000:]
    figures = {name: step["figures"] for name, step in state["steps"].items()}
    assert figures["parity"]["wrong"] == 0
    for injection in ("resident-rows", "prompt-embeds"):
        assert figures["parity"]["compared"][injection]["equal"] == figures["parity"]["questions"]
    assert figures["parity"]["compared"]["no prompt"]["wrong"] > 0  # a wrong prompt would be seen
    assert figures["soak"]["answers"]["wrong"] == 0
    assert {"train-llama-3.1-8b", "ttft-qwen3-4b", "ttft-llama-3.1-8b", "plain", "quality"} <= set(figures)
    page = (tmp_path / "out" / "README.md").read_text()
    assert done.stdout.strip() == page.strip()
    assert "a trial run, not a result" in page
    for picture in ("ttft.png", "ttft-llama-3.1-8b/ttft.png", "plain/load.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    print(f"{took:.0f} s")

    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, "0 steps" in again.stderr) == (0, True)  # what is finished is not repeated
