"""Threshold Filtering Packing: the path by hand, and packs that lose nothing."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from be_serve.core.errors import InputError
from trainer.data.corpus_packing import filtered_path, packed
from trainer.model.frozen import FrozenModel
from trainer.optim.autoencoder import AEConfig, TextBatches, train_ae


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def on_a_circle(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float) * torch.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_path_goes_to_the_nearest_that_is_no_copy():
    vectors = on_a_circle(0, 1, 40, 41, 80, 81, 200, 201)
    near = filtered_path(vectors, 2, 0.0, rng())
    assert all(a // 2 == b // 2 for a, b in zip(near[::2], near[1::2], strict=True))  # each beside its copy
    path = filtered_path(vectors, 2, 0.1, rng())
    pairs = list(zip(path[::2], path[1::2], strict=True))[:3]  # the last pair takes what is left
    assert all(a // 2 != b // 2 for a, b in pairs)
    assert abs(pairs[0][0] // 2 - pairs[0][1] // 2) == 1  # a neighbour on the circle, not just anybody


@given(st.integers(1, 30), st.integers(1, 6), st.floats(0, 2), st.integers(0, 5))
def test_every_sample_is_visited_once(count, pack, threshold, seed):
    vectors = F.normalize(torch.randn(count, 4, generator=rng(seed)), dim=-1)
    path = filtered_path(vectors, pack, threshold, rng(seed))
    assert sorted(path) == list(range(count))
    packs = packed([[i] for i in range(count)], path, pack)
    assert [i for one in packs for i in one] == path[: count // pack * pack]


@pytest.mark.parametrize("packing", ["random", "filtered"])
def test_an_ae_trains_on_packs(model, tmp_path, packing):
    file = tmp_path / "texts.jsonl"
    texts = [f"The tide number {i} rises and falls over the harbour wall {i * i} times." for i in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TextBatches(model, [str(file)], length=12, batch_size=2, seed=0, buffer=8)
    batch = next(data.packs(3, filtered=packing == "filtered"))
    assert [len(pack) for pack in batch] == [12, 12]
    config = AEConfig(steps=3, length=12, batch_size=2, packing=packing, held_out=2)
    result = train_ae(model, [str(file)], config, tmp_path / "run", quiet=True)
    assert result.ae_1H.isfinite().all()
    again = train_ae(model, [str(file)], config, tmp_path / "again", quiet=True)
    assert torch.equal(result.ae_1H, again.ae_1H)


def test_packs_hold_no_token_of_the_texts_held_out(model, tmp_path):
    """Texts of many lengths: short pieces do not tile them as long ones do."""
    file = tmp_path / "texts.jsonl"
    texts = [" ".join(f"w{i}n{j}" for j in range(3 + i % 7)) for i in range(80)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TextBatches(model, [str(file)], length=16, batch_size=2, seed=0, buffer=16)
    ids = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    whole = [sum(len(own) // 16 for own in ids[:n]) for n in range(len(ids))]
    first = next(n for n, pieces in enumerate(whole) if pieces >= 4)  # the first text with nothing held out
    assert len(data.head(4)) == 4
    behind = {tuple(own[i : i + 4]) for own in ids[first:] for i in range(0, len(own) - 3, 4)}
    stream = data.packs(4, filtered=False)
    seen = {tuple(pack[i : i + 4]) for _ in range(60) for pack in next(stream) for i in range(0, 16, 4)}
    assert seen <= behind


@pytest.mark.parametrize("options", [{"length": 4}, {"batch_size": 99}])
def test_settings_that_leave_no_pack_are_refused(model, tmp_path, options):
    (tmp_path / "t.txt").write_text("one two three four five six seven eight nine ten\n" * 20)
    data = TextBatches(
        model, [str(tmp_path / "t.txt")], **{"length": 16, "batch_size": 2, **options}, seed=0, buffer=16
    )
    with pytest.raises(InputError, match="Packing needs"):
        next(data.packs(4, filtered=True))
