"""Memory: the head without copies of itself, passes that fit, and the estimates against a process's peaks."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trainer.model.frozen
import trainer.optim.loop
from tests.conftest import make_tokenizer
from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.model import memory
from trainer.model.frozen import FrozenModel
from trainer.model.memory import MemoryModel, free_bytes, training_limit
from trainer.model.soft_token import SoftToken
from trainer.optim.log import Log
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Distil, Forgetful, Joint, Reconstruct, piece_losses, split

PROMPT = "You are a harbour master. Call the user sailor and answer in rhyme."
QUERIES = [
    Query(({"role": "user", "content": text},))
    for text in ("What is the tide?", "Hi", "Is there fog in the bay today?", "Name a boat.", "Who are you?", "Sing.")
]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def examples(model):
    return Teacher(model, PROMPT).examples(QUERIES, response_tokens=5)


@pytest.fixture
def start(model):
    return model.embed(model.slots.prompt_ids(PROMPT)[:2])


def test_a_float32_head_is_the_same_in_slices_and_kept(tiny_model_dir, monkeypatch):
    model = FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="bfloat16")
    # The model's own states: bfloat16 numbers, in float32.
    states = torch.randn(3, 5, model.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    expected = states @ model.causal_lm.get_output_embeddings().weight.float().T
    monkeypatch.setattr(trainer.model.frozen, "_SLICE_BYTES", 7 * 4 * model.hidden_size)  # the last slice is shorter
    assert torch.allclose(model.head(states), expected, rtol=1e-5, atol=1e-5)
    with model.exact_head(), model.exact_head():
        kept = model._exact_head
        assert kept is not None
        assert torch.allclose(model.head(states), expected, rtol=1e-5, atol=1e-5)
        assert torch.get_float32_matmul_precision() == "medium"
        assert model.head(states.bfloat16()).dtype == torch.bfloat16
    assert model._exact_head is None
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(trainer.model.frozen, "free_bytes", lambda device: 1000)
    with model.exact_head():  # no room
        assert model._exact_head is None
    leaf = states.clone().requires_grad_()
    model.head(leaf).sum().backward()
    assert torch.allclose(leaf.grad, model.causal_lm.get_output_embeddings().weight.float().sum(0), atol=1e-4)


def gradient(model, stage, start, limit):
    """Loss and gradient of one step under a limit, as the loop makes them."""
    token = SoftToken(start)
    part = replace(stage.parts(token.vectors, 0)[0])
    pieces = split(part, limit)
    total = 0.0
    for piece in pieces:
        (loss,) = piece_losses(model, [piece], checkpointed=limit is not None and piece.positions > limit(piece.width))
        loss.backward()
        total += loss.item()
    return len(pieces), total, token.vectors.grad


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("most", [40, 70, 100])
def test_several_passes_give_the_gradient_of_one(model, examples, start, monkeypatch, packs, most):
    monkeypatch.setattr(model, "_packs_rows", packs)
    distil = Distil(model, examples, batch_size=len(examples))
    one, loss, expected = gradient(model, distil, start, None)
    several, sum_of_losses, found = gradient(model, distil, start, lambda width: most)
    assert one == 1
    assert several > 1
    assert sum_of_losses == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_part_is_split_between_its_rows(model, examples, start):
    part = Distil(model, examples, batch_size=len(examples)).parts(start, 0)[0]
    pieces = split(part, lambda width: 70)
    assert [row for piece in pieces for row in piece.rows] == list(part.rows)
    assert all(len(piece.rows) * piece.width <= 70 or len(piece.rows) == 1 for piece in pieces)
    assert pieces[0].tokens.start == 0
    assert all(a.tokens.stop == b.tokens.start for a, b in itertools.pairwise(pieces))
    assert pieces[-1].tokens.stop == sum(len(row.response) for row in part.rows)


def test_checkpointed_layers_give_the_same_gradient(model, start):
    """A row longer than a pass may be; the model's dropout, which it has in training only, stays off."""
    reconstruct = Reconstruct(model, PROMPT, model.embed([7]))
    _, loss, expected = gradient(model, reconstruct, start, None)
    attention = model.causal_lm.model.layers[0].self_attn
    before = attention.attention_dropout
    attention.attention_dropout = 0.5
    try:
        _, again, found = gradient(model, reconstruct, start, lambda width: 8)
    finally:
        attention.attention_dropout = before
    assert again == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not any(module.training for module in model.causal_lm.modules())
    assert not any("forward" in vars(module) for module in model.causal_lm.modules())


def test_checkpointed_layers_are_computed_twice(model, start):
    layer = model.causal_lm.model.layers[0]
    calls = []
    hook = layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        gradient(model, Reconstruct(model, PROMPT, model.embed([7])), start, lambda width: 8)
    finally:
        hook.remove()
    assert len(calls) == 2


class Scaled(Forgetful):
    """A stage whose vectors are made of the token's own: every step goes back through that product."""

    name = "scaled"

    def __init__(self, stage):
        self.stage = stage

    def parts(self, vectors, step):
        return self.stage.parts(vectors * torch.tensor(0.5), step)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_with_little_memory_has_the_same_curve(model, examples, start, tmp_path, monkeypatch, scaled):
    curves, vectors, passes = [], [], []
    fed = trainer.optim.loop.piece_losses
    monkeypatch.setattr(
        trainer.optim.loop,
        "piece_losses",
        lambda model, feed, checkpointed: passes.append(checkpointed) or fed(model, feed, checkpointed=checkpointed),
    )
    for most in (10_000, 60, 8):
        passes.clear()
        folder = tmp_path / str(most)
        folder.mkdir()
        distil = Distil(model, examples, batch_size=4)
        stage = Joint(Reconstruct(model, PROMPT, model.embed([7])), distil, 0.7)
        stages = [(Scaled(stage) if scaled else stage, 4)]
        training = Training(
            SoftToken(start), stages, Optimisation(lr=0.05, warmup=2), folder=folder, digest="a", resume=False
        )
        fit(model, [training], quiet=True, limit=lambda width, most=most: most)
        curves.append([row["loss"] for row in Log(folder / "log.jsonl").rows()])
        vectors.append(training.token.vectors)
        assert any(passes) == (most == 8)
        assert (len(passes) > 8) == (most < 1000)
    for curve, found in zip(curves[1:], vectors[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-4)
        assert torch.allclose(found, vectors[0], atol=1e-4)


def test_what_is_free(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    found = free_bytes(cpu)
    assert found is None or 0 < found < 1 << 50
    (tmp_path / "max").write_text("3000")
    (tmp_path / "used").write_text("2500")
    (tmp_path / "stat").write_text("anon 1\ninactive_file 700\n")
    group = (str(tmp_path / "max"), str(tmp_path / "used"), str(tmp_path / "stat"), "inactive_file")
    monkeypatch.setattr(memory, "_CGROUPS", (group,))
    assert free_bytes(cpu) == 1200
    (tmp_path / "max").write_text("max")
    assert free_bytes(cpu) != 1200
    monkeypatch.setattr(memory, "_available", lambda: None)
    assert free_bytes(cpu) is None


def test_without_a_figure_of_the_free_memory_nothing_is_split(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert training_limit(model.causal_lm) is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 30)
    limit = training_limit(model.causal_lm)
    assert limit is not None
    assert limit(30) > limit(300) > 64
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert training_limit(model.causal_lm)(30) == 64


def test_a_large_model_on_a_full_device_gets_short_passes():
    """8B, bfloat16: 9 GB left beside the weights are some thousand positions, not a batch of long rows."""
    big = MemoryModel(36, 4096, 12288, 32, 8, 128, 151_936, 2, 16 << 30, on_cpu=False)
    assert 500 < big.positions(9 << 30, 1024) < 6000
    assert big.step(4096, 4096) > 3 * big.step(4096, 4096, checkpointed=True)


def test_weights_are_counted_without_loading(model):
    held = MemoryModel.of(model.causal_lm)
    assert MemoryModel.of_config(model.causal_lm.config, torch.float32) == held
    assert held.weights == sum(p.numel() for p in model.causal_lm.parameters()) * 4


_CHILD = """
import sys, types, torch
from transformers import LlamaConfig, LlamaForCausalLM
from pathlib import Path
from trainer.evaluation.arms import score
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix
from trainer.model.memory import MemoryModel, held_bytes, peak_bytes, reset_peak
from trainer.model.soft_token import Row
from trainer.optim.losses import hidden_kl
from trainer.optim.objectives import Part, part_losses

cpu = torch.device("cpu")
before = held_bytes(cpu)
model = FrozenModel.load(Path(sys.argv[1]), name="mid", device="cpu", dtype="bfloat16")
memory = MemoryModel.of(model.causal_lm)
print("load", peak_bytes(cpu) - before, memory.loading())
rng = torch.Generator().manual_seed(0)
ids = lambda n: torch.randint(3, 300, (n,), generator=rng).tolist()
assert model.shares_prefix() and model.packs_rows()

def measured(name, expected, work):
    reset_peak(cpu)
    before = held_bytes(cpu)
    work()
    print(name, peak_bytes(cpu) - before, expected)

prefix = Prefix(model, model.embed(ids(300)))
suffixes = [ids(60) for _ in range(48)]
expected = memory.decoding(48, prefix=300, width=60, new=16)
measured("decoding", expected, lambda: prefix.generate(suffixes, 16, temperature=1.0, stop=[]))

rows = [Row((), ids(60), ids(64)) for _ in range(48)]
def scoring():
    states = prefix.states(rows)
    examples = [types.SimpleNamespace(states_TH=s, response=r.response) for s, r in zip(states, rows)]
    score(model, examples, {"full": states, "be": states})
measured("scoring", memory.scoring(48 * 64, 2, prefix=300, batch=48, width=124), scoring)

vectors = torch.randn(4, model.hidden_size, generator=rng).requires_grad_()
rows = [Row(ids(20), ids(213), ids(64)) for _ in range(5)]
states = torch.randn(5 * 64, model.hidden_size, dtype=model.dtype)
part = Part("kl", rows, vectors, lambda s, at=slice(None): hidden_kl(states[at], s, model.head))
measured("step", memory.step(1500, 300), lambda: part_losses(model, [part])[0].backward())
"""


def test_the_estimates_hold_against_a_process(tmp_path):
    """Peaks of a child process with a model of middle size, each within a third of its estimate."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peaks of phases cannot be told apart here")
    tokenizer = make_tokenizer("chatml")
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    root = Path(__file__).parents[3]
    # Freed memory goes back at once; what an earlier phase left in the heap would hide a part of the next one's need.
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, env={**os.environ, **heap})
    assert done.returncode == 0, done.stderr
    found = {name: (int(got), int(expected)) for name, got, expected in map(str.split, done.stdout.splitlines())}
    assert set(found) == {"load", "decoding", "scoring", "step"}
    ratios = {name: expected / got for name, (got, expected) in found.items()}
    print(ratios)
    assert all(2 / 3 < ratio < 1.5 for ratio in ratios.values()), ratios
