"""The GPU benchmark's own logic: steps kept and resumed, failures, the page, the shapes. No server, no GPU."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from be_serve.core.errors import InputError
from benchmarks.common.answers import Answer
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.parity import _compare, _Response
from benchmarks.gpu.report import report
from benchmarks.gpu.run import GpuRun
from benchmarks.gpu.shapes import PAPER_BOUND, PAPER_CASES, SHAPES, tiny
from benchmarks.gpu.steps import Interrupted, Plan, Step, StepFailed, chosen
from benchmarks.gpu.weights import make_model
from tests.conftest import make_tokenizer

RESULT = Path(__file__).parents[3] / "docs" / "results" / "2026-11-27-h100" / "gpu.json"


def make_run(tmp_path, monkeypatch, said, **steps):
    """A run whose steps are the given coroutines."""
    made = tuple(Step(name, name, 1, step, serves=False) for name, step in steps.items())
    monkeypatch.setattr(gpu_steps, "STEPS", made)
    plan = Plan(out=tmp_path / "out", models=tmp_path, tokenizer=tmp_path, tiny=True)
    return GpuRun.open(plan, said.append)


async def fine(plan, out, say):
    return {"value": 1}


async def broken(plan, out, say):
    raise StepFailed("no such luck")


async def stopped(plan, out, say):
    raise Interrupted("interrupted")


def test_a_failed_step_is_told_and_the_next_one_runs(tmp_path, monkeypatch):
    said: list[str] = []
    run = make_run(tmp_path, monkeypatch, said, first=broken, second=fine)
    assert asyncio.run(run.run()) == 1
    kept = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
    assert (kept["first"]["status"], kept["second"]["status"]) == ("failed", "done")
    assert "no such luck" in kept["first"]["error"]
    assert "**first: failed**" in (tmp_path / "out" / "README.md").read_text()

    # The same command repeats what failed and nothing else.
    run = make_run(tmp_path, monkeypatch, said, first=fine, second=broken)
    assert asyncio.run(run.run()) == 0
    assert "1 steps" in said[-4] or any(line.startswith("1 steps") for line in said)


def test_an_interrupted_step_ends_the_run_and_is_done_again(tmp_path, monkeypatch):
    said: list[str] = []
    run = make_run(tmp_path, monkeypatch, said, first=fine, second=stopped, third=fine)
    assert asyncio.run(run.run()) == 130
    assert "third" not in run.state["steps"]
    assert "To continue, run the same command again" in said[-1]
    run = make_run(tmp_path, monkeypatch, said, first=broken, second=fine, third=fine)
    assert asyncio.run(run.run()) == 0


def test_steps_that_start_servers_need_a_mode(tmp_path, monkeypatch):
    made = (Step("start", "", 1, broken, serves=False), Step("ttft", "", 1, fine))
    monkeypatch.setattr(gpu_steps, "STEPS", made)
    plan = Plan(out=tmp_path / "out", models=tmp_path, tokenizer=tmp_path, tiny=True)
    run = GpuRun.open(plan, lambda line: None)
    assert asyncio.run(run.run(["ttft"])) == 1  # `start` comes before it, unasked
    assert "did not start" in run.state["steps"]["ttft"]["error"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"tiny": false, "steps": {}}',
        "[]",
        '"x"',
        '{"tiny": true, "steps": []}',
        '{"tiny": true, "steps": {"start": []}}',
        '{"tiny": true, "steps": {"start": {"status": "done"}}}',
        '{"tiny": true, "steps": {"a": {"status": "done", "started": "x", "seconds": 1}}}',
        '{"tiny": true, "commands": 1}',
        '{"tiny": true, "commands": [[1]]}',
    ],
)
def test_a_folder_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(InputError, match="another --out"):
        GpuRun.open(Plan(out=tmp_path, models=tmp_path, tokenizer=tmp_path, tiny=True), lambda line: None)


def test_the_mode_of_an_earlier_run_is_one_of_ours(tmp_path):
    start = {"status": "done", "started": "2026-01-01", "seconds": 1, "figures": {"server_args": ["--enforce-eager"]}}
    plan = Plan(out=tmp_path, models=tmp_path, tokenizer=tmp_path, tiny=True)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"tiny": True, "steps": {"start": start}}))
    assert GpuRun.open(plan, lambda line: None).done("start")
    for words in (["--trust-remote-code"], "--enforce-eager", None):
        start["figures"] = {"server_args": words}
        file.write_text(json.dumps({"tiny": True, "steps": {"start": start}}))
        with pytest.raises(InputError, match="no known mode"):
            GpuRun.open(plan, lambda line: None)


async def test_a_command_that_fails_shows_no_secret(tmp_path):
    arguments = ["nothing.of.this.name", "https://me:hunter2@host.example/x", "--api-key", "hunter2-key"]
    (tmp_path / "log").write_text("asked https://me:hunter2@host.example/x with hunter2-key\n")
    with pytest.raises(StepFailed, match="ended with status") as caught:
        await gpu_steps.call(arguments, log=tmp_path / "log")
    assert "hunter2" not in str(caught.value)
    assert "host.example" in str(caught.value)


def test_an_error_with_a_secret_is_kept_without_it(tmp_path, monkeypatch):
    async def telling(plan, out, say):
        raise StepFailed("no answer from https://me:hunter2@host.example/x")

    said: list[str] = []
    run = make_run(tmp_path, monkeypatch, said, first=telling)
    assert asyncio.run(run.run()) == 1
    run.state["steps"]["first"]["error"] += " https://me:hunter2@host.example"  # as an older version kept it
    run.state["commands"].append(["--server-arg", "--api-key", "--server-arg", "hunter2"])
    kept = (tmp_path / "out" / "gpu.json").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert "hunter2" not in "".join([kept, report(run.state), *said])
    assert "host.example" in kept


def test_commands_are_kept_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run.sys, "argv", ["x", "--server-arg", "--hf-token hunter2"])
    run = GpuRun.open(Plan(out=tmp_path, models=tmp_path, tokenizer=tmp_path), lambda line: None, commit="abc")
    assert "hunter2" not in json.dumps(run.state)
    assert run.state["versions"]["git_commit"] == "abc"


def test_unknown_steps_are_named():
    with pytest.raises(InputError, match="parity"):
        chosen(("partiy",))
    assert len({step.name for step in chosen((), tiny=True)} & {"ttft-llama-3.2-1b", "ttft-llama-3.2-3b"}) == 0


def test_the_page_of_a_measured_run_holds_the_papers_figures_beside_ours():
    page = report(json.loads(RESULT.read_text()))
    assert "NVIDIA H100" in page
    assert "89.67 -> 40.36 (2.22x)" in page
    assert "27.8x" in page
    assert "resident-rows | 24 | 24 | 0 | 0" in page
    assert "trial run" not in page


def test_the_papers_bound_is_its_equation():
    for prompt, question in PAPER_CASES:
        assert (prompt + question) / (1 + question) == pytest.approx(PAPER_BOUND[prompt, question], rel=0.01)


@pytest.mark.parametrize(("name", "billions"), [("llama-3.2-1b", 1.24), ("llama-3.1-8b", 8.03), ("qwen3-4b", 4.02)])
def test_shapes_have_the_published_number_of_parameters(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-4b"])
def test_a_tiny_model_is_one_that_transformers_loads(tmp_path, name):
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path / "words")
    shape = tiny(SHAPES[name])
    make_model(shape, tmp_path / "model", tmp_path / "words")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.config.tie_word_embeddings == shape.tied
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 9, 40]])).logits[0, -1]
    # What the tokenizer cannot write as text is not likely to be sampled.
    assert int(logits.argmax()) < len(tokenizer)
    with safe_open(next((tmp_path / "model").glob("*.safetensors")), "pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").shape == (shape.vocabulary, shape.hidden)


def test_answers_are_compared_with_their_first_tokens():
    def asked(tokens, logprob):
        close = tuple(frozenset() for _ in tokens)
        return _Response(Answer(tuple(tokens), close), {"token_id:1": logprob})

    found = _compare([asked("ab", -1.0), asked("ab", -1.0)], [asked("ab", -1.25), asked("ac", -1.0)])
    assert (found["equal"], found["wrong"], found["first_logprob_difference"]) == (1, 1, 0.25)
