"""The one-step probe on a tiny model: its input by hand, its training, sharing and curve."""

from __future__ import annotations

import pytest
import torch

from be_serve.core.errors import InputError
from trainer.model.frozen import FrozenModel
from trainer.optim.objectives import part_losses
from trainer.studies.one_step import OneStep, connect, probe_one_step, spread

TEXTS = [[5, 17, 9], [7, 12, 40]]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


def test_position_i_predicts_token_i_and_nothing_of_the_text_is_fed(model):
    pair = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    part = OneStep(model, TEXTS).part(1, pair)
    inputs = torch.stack([pair[0], pair[1], pair[1]])
    assert torch.equal(spread(pair, 3), inputs)
    with torch.no_grad():
        logits = model.causal_lm(inputs_embeds=inputs[None]).logits[0]
        naive = torch.nn.functional.cross_entropy(logits, torch.tensor(TEXTS[1]))
        assert part_losses(model, [part])[0].item() == pytest.approx(naive.item(), rel=1e-4)
    assert part.positions == 3


@pytest.mark.parametrize("shared", [False, True])
def test_two_vectors_tell_a_short_text(model, tmp_path, shared):
    texts = TEXTS[:1] if shared else TEXTS
    found = probe_one_step(model, texts, tmp_path, shared=shared, steps=200, lr=0.05, quiet=True)
    untrained = probe_one_step(model, texts, tmp_path / "none", shared=shared, steps=1, lr=1e-9, quiet=True)
    assert sum(told.accuracy for told in found) > sum(told.accuracy for told in untrained)
    assert all(told.tokens == 3 and told.bits >= 0 for told in found)
    assert found == probe_one_step(model, texts, tmp_path, shared=shared, steps=200, lr=0.05, quiet=True)


def test_the_best_of_several_starts_is_told(model, tmp_path):
    alone = [
        probe_one_step(model, TEXTS[:1], tmp_path / f"{seed}", seed=seed, steps=12, lr=0.05, quiet=True)[0].accuracy
        for seed in range(4)
    ]
    assert len(set(alone)) > 1  # else there is nothing to choose
    [best] = probe_one_step(model, TEXTS[:1], tmp_path / "all", restarts=4, steps=12, lr=0.05, quiet=True)
    assert best.accuracy == max(alone)
    assert best.mean_accuracy == pytest.approx(sum(alone) / 4)


def test_the_ends_of_a_curve_are_the_best_two_of_all_starts(model, tmp_path):
    curve = connect(model, TEXTS[0], tmp_path, restarts=3, steps=12, lr=0.05, quiet=True)
    assert sorted(curve.starts, reverse=True) == curve.starts
    assert [curve.line[0], curve.line[-1]] == curve.starts[:2]
    with pytest.raises(InputError, match="--restarts 2"):
        connect(model, TEXTS[0], tmp_path, restarts=1, steps=1, quiet=True)


def test_a_curve_begins_and_ends_at_its_solutions(model, tmp_path):
    curve = connect(model, TEXTS[0], tmp_path, steps=60, lr=0.05, quiet=True)
    assert len(curve.line) == len(curve.bezier) == 11
    assert curve.line[0] == curve.bezier[0]
    assert curve.line[-1] == curve.bezier[-1]
    assert all(0 <= share <= 1 for share in [*curve.line, *curve.bezier])
