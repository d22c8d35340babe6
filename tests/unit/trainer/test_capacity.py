"""Probe and fit on a tiny model: bits against their definition, and the two verbs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner

from be_serve.cli.main import cli
from be_serve.core.errors import InputError
from trainer.model.frozen import FrozenModel
from trainer.studies.capacity import Capacity, Fit, Probed, exact_prefix, probe, token_bits, will_it_fit
from trainer.text import sentences

PROMPT = "You are a harbour master. Order 4711 is lost.\nAnswer in rhyme."


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


def test_bits_are_the_negative_log_probability(model):
    ids = [5, 17, 9, 30]
    bits, right = token_bits(model, ids)
    with torch.no_grad():
        logits = model.causal_lm(input_ids=torch.tensor([ids])).logits[0, :-1]
    naive = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none") / math.log(2)
    torch.testing.assert_close(bits, naive, atol=1e-4, rtol=1e-4)
    assert right.tolist() == (logits.argmax(-1) == torch.tensor(ids[1:])).tolist()


def test_trained_vectors_hold_bits(model, tmp_path):
    texts = [[5, 17, 9, 30, 41, 8], [7, 7, 12, 40, 3, 22]]
    found = probe(model, texts, tmp_path, k=2, steps=60, lr=0.1, quiet=True)
    assert [text.tokens for text in found.texts] == [6, 6]
    assert all(text.gain > 1.0 for text in found.texts)
    assert found.bits_a_vector == pytest.approx(sum(text.gain for text in found.texts) / 4)
    assert probe(model, texts, tmp_path, k=2, steps=60, lr=0.1, quiet=True) == found


def test_the_exact_prefix_ends_where_one_percent_is_wrong():
    assert exact_prefix(torch.tensor([True] * 5 + [False])) == 5
    assert exact_prefix(torch.tensor([True] * 150 + [False] + [True] * 20 + [False] * 9)) == 171
    assert exact_prefix(torch.tensor([False, True])) == 0


def test_demand_is_shared_out_to_sentences(model):
    capacity = Capacity(1, 10, [Probed(10, 100.0, 40.0, 5)])
    found = will_it_fit(model, PROMPT, capacity)
    bits, _ = token_bits(model, model.tokenizer.encode(PROMPT, add_special_tokens=False))
    assert found.demand_bits == pytest.approx(float(bits.sum()), rel=1e-6)
    assert [text for text, _ in found.clauses] == sentences(PROMPT)
    assert 0.8 * found.demand_bits < sum(share for _, share in found.clauses) <= found.demand_bits + 1e-6
    with pytest.raises(InputError, match="single token"):
        will_it_fit(model, "a", capacity)


def test_the_recommendation_is_the_fewest_that_hold_it():
    assert Fit(130.0, 100.0, []).recommended_k() == 2
    assert Fit(69.0, 100.0, []).recommended_k() == 1
    assert Fit(5000.0, 100.0, []).recommended_k() is None


def test_probe_then_fit_from_the_command_line(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BE_HOME", str(tmp_path / "home"))
    (tmp_path / "p.txt").write_text(PROMPT)
    (tmp_path / "corpus.txt").write_text("The tide comes in twice a day and the gulls know it.\n\n" * 3)

    def run(*words):
        words = [str(w) for w in (*words, "--model", tiny_model_dir, "--dtype", "float32")]
        return CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False).stdout

    with pytest.raises(InputError, match="be-serve probe"):
        run("fit", "p.txt")
    out = run("probe", "--corpus", "corpus.txt", "--texts", 2, "--length", 8, "--steps", 5, "--json")
    assert len(json.loads(out.splitlines()[-1])["texts"]) == 2
    small = ("--corpus", "corpus.txt", "--texts", 2, "--length", 4, "--steps", 3, "--json")
    told = json.loads(run("probe", *small, "--one-step", "--shared").splitlines()[-1])
    assert [text["tokens"] for text in told["texts"]] == [4, 4]
    curve = json.loads(run("probe", *small, "--one-step", "--curve").splitlines()[-1])
    assert len(curve["line"]) == len(curve["bezier"]) == 11
    for wrong in (["--shared"], ["--one-step", "--tokens", 2], ["--one-step", "--shared", "--curve"]):
        with pytest.raises(InputError, match="one-step"):
            run("probe", *small, *wrong)
    out = run("fit", "p.txt", "--json")
    assert "keep these sentences as text" in out
    found = json.loads(out.splitlines()[-1])
    assert [c["text"] for c in found["clauses"] if c["verbatim"]] == ["Order 4711 is lost."]
