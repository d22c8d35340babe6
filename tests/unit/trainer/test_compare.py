"""Methods side by side, and the speed benchmark, on a tiny model."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner

from be_serve.cli.main import cli
from be_serve.core.errors import InputError
from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.evaluation.evaluate import evaluate
from trainer.model.frozen import FrozenModel
from trainer.model.memory import peak_bytes, reset_peak
from trainer.model.soft_token import Row, SoftToken, scored_states
from trainer.optim.autoencoder import save_ae
from trainer.optim.objectives import Distil, Memorise, Tune, part_losses
from trainer.studies.compare import Method, Setting, compare
from trainer.studies.speed import PlainLoop, Trained, measure

PROMPT = "You are a harbour master. Call the user sailor and answer in rhyme."
TEXTS = ["Hi", "What is the tide?", "Is there fog?", "Name a boat.", "Who are you?", "Sing.", "Where is the quay?"]
QUERIES = [Query(({"role": "user", "content": text},)) for text in TEXTS]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def teacher(model):
    return Teacher(model, PROMPT)


@pytest.fixture(scope="module")
def examples(teacher):
    return teacher.examples(QUERIES, response_tokens=5)


def test_every_method_is_measured_alike(teacher, examples, tmp_path):
    ae = torch.randn(1, teacher.model.hidden_size)
    methods = [Method.parse(m) for m in ("kd:1", "kd:2", "pt:1", "memory:1", "joint:1", "stages:1", "truncate:3")]
    methods.append(Method.parse("fewshot:2"))
    methods.append(Method("summary", 1))
    setting = Setting(steps=4, batch_size=2)

    def run():
        return compare(
            teacher, examples[2:], QUERIES[:2], methods, setting, tmp_path, ae_1H=ae, summary="Rhyme.", quiet=True
        )

    lines = run()
    by_name = {line.method: line for line in lines}
    assert list(by_name) == ["none", *(str(m) for m in methods), "full"]
    assert by_name["none"].rho == pytest.approx(1.0)
    assert by_name["none"].gain_retained == pytest.approx(0.0)
    assert by_name["full"].rho == pytest.approx(0.0, abs=1e-6)
    assert by_name["full"].gain_retained == pytest.approx(1.0)
    assert by_name["kd:2"].k == 2
    assert by_name["fewshot:2"].k > by_name["full"].k  # the prompt's tokens and two questions with their answers
    assert len({round(line.figures["kl"], 6) for line in lines}) == len(lines)
    # The second call finds every training done and measures the same.
    assert [line.to_json() for line in run()] == [line.to_json() for line in lines]


def test_queries_that_draw_the_prompt_out_are_in_no_figure_but_one(teacher, monkeypatch):
    monkeypatch.setattr(Teacher, "recites", lambda self, example: example.query == QUERIES[0])
    vectors = torch.randn(2, teacher.model.hidden_size, generator=torch.Generator().manual_seed(0))
    found = evaluate(teacher, QUERIES, vectors, samples=2)
    without = evaluate(teacher, QUERIES[1:], vectors, samples=2)
    assert (found.recitals, without.recitals) == (1, 0)
    assert found.n_queries == len(QUERIES) - 1
    assert found.rho == pytest.approx(without.rho, rel=1e-4)
    assert without.rho_with_recitals == pytest.approx(without.rho)
    assert found.rho_with_recitals != pytest.approx(found.rho, rel=1e-4)
    assert [sample["query"] for sample in found.samples] == [query.text for query in QUERIES[1:3]]
    assert found.recitals_be == 0


def test_what_a_method_lacks_is_named(teacher, examples, tmp_path):
    for name, message in (("joint:1", "train-ae"), ("summary", "--summary")):
        with pytest.raises(InputError, match=message):
            compare(teacher, examples, QUERIES, [Method.parse(name)], Setting(steps=1), tmp_path)
    for text in ("kt:1", "kd:0", "kd:x", ""):
        with pytest.raises(InputError, match="No method"):
            Method.parse(text)


def test_prompt_tuning_is_the_responses_cross_entropy(model, examples):
    distil = Distil(model, examples, batch_size=2)
    token = SoftToken(torch.randn(2, model.hidden_size))
    (loss,) = part_losses(model, Tune(distil).parts(token.vectors, 0))
    rows = [distil.rows[i] for i in distil.plan(0)]
    logits = model.head(scored_states(model, rows, token.vectors))
    targets = torch.tensor([t for row in rows for t in row.response])
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_a_memory_token_reconstructs_without_an_ae(model):
    vectors = torch.randn(2, model.hidden_size)
    (part,) = Memorise(model, [5, 6, 7]).parts(vectors, 0)
    assert torch.equal(part.vectors_KH, vectors)
    assert part.rows == [Row((), (), [5, 6, 7])]


def test_compare_from_the_command_line(tmp_path, monkeypatch, tiny_model_dir, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captain.txt").write_text(PROMPT)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))
    save_ae("ae.safetensors", torch.randn(1, model.hidden_size), model, {})
    words = ["compare", "captain.txt", "--queries", "q.jsonl", "--model", tiny_model_dir, "--dtype", "float32"]
    words += ["--methods", "kd:1,joint:1", "--ae", "ae.safetensors", "--summary", "Rhyme.", "--steps", 2, "--json"]
    result = CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False, standalone_mode=False)
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert [line["method"] for line in found["methods"]] == ["none", "kd:1", "joint:1", "summary", "full"]
    assert json.loads(next(tmp_path.glob("runs/compare-captain-*/compare.json")).read_text()) == found


def test_the_plain_loop_computes_the_same_loss(model, teacher, examples):
    distil = Distil(model, examples, batch_size=3)
    vectors = torch.randn(2, model.hidden_size)
    for step in range(2):
        plain, ours = (loop.loss(vectors, step) for loop in (PlainLoop(teacher, distil), Trained(model, distil)))
        assert plain.item() == pytest.approx(ours.item(), rel=1e-4)


def test_the_peak_is_that_since_it_was_reset():
    cpu = torch.device("cpu")
    large = torch.ones(64 * 2**20)
    high = peak_bytes(cpu)
    del large
    reset_peak(cpu)
    # Where /proc is closed the peak of the whole process is all there is.
    assert peak_bytes(cpu) < high - 100 * 2**20 or not os.access("/proc/self/clear_refs", os.W_OK)


def test_speed_is_measured_in_turns(teacher, examples, model):
    measured = measure(teacher, examples, model.embed([5, 6]), steps=3, batch_size=2)
    assert {arm: len(s) for arm, s in measured.seconds.items()} == {"plain": 3, "be-serve": 3}
    found = measured.to_json(steps=160, batch=2, examples=7)
    assert found["largest_loss_difference"] < 1e-3
    assert found["arms"]["plain"]["tokens_per_second"] > 0
    with pytest.raises(InputError, match="No arm"):
        measure(teacher, examples, model.embed([5]), steps=1, batch_size=2, arms=["fast"])
