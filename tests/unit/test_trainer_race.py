"""Starts that race: the one that trains best goes on, whatever its loss before training."""

from __future__ import annotations

import json
import math

import pytest
import torch

from trainer.config import make_config
from trainer.loop import Optimisation
from trainer.model import FrozenModel
from trainer.queries import Query
from trainer.race import race
from trainer.stages import Distil
from trainer.start_finder import StartFinder
from trainer.starts import Start, distinct, random_start
from trainer.teacher import Teacher

PROMPT = "You are a harbour master. Answer in rhyme, and call the user sailor."
QUERIES = [Query(({"role": "user", "content": text},)) for text in ("Hi", "Is there fog?", "Sing.", "Who are you?")]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def examples(model):
    return Teacher(model, PROMPT).examples(QUERIES, response_tokens=8)


def test_the_prompts_own_embeddings_win_against_noise(model, examples, tmp_path):
    ids = model.slots.prompt_ids(PROMPT)
    own = Start(model.embed(ids).float())
    noise = random_start(model, len(ids), 0)
    losses = race(
        model, [noise, own], Distil(model, examples, batch_size=2), Optimisation(1e-4), rank=0, seed=0, folder=tmp_path,
        steps=4, quiet=True,
    )  # fmt: skip
    assert losses[1] < 0.1 * losses[0]
    assert list(tmp_path.iterdir()) == []  # nothing is left of it


def test_a_start_that_diverges_does_not_win(model, examples, tmp_path):
    good = random_start(model, 1, 0)
    bad = Start(torch.full_like(good.vectors_KH, math.nan))
    stage = Distil(model, examples, batch_size=2)
    losses = race(model, [bad, good], stage, Optimisation(1e-3), rank=0, seed=0, folder=tmp_path, steps=4, quiet=True)
    assert losses[0] == math.inf
    assert losses[1] < math.inf


def test_the_winner_is_the_runs_start_and_the_search_is_kept(model, examples, tmp_path, monkeypatch):
    config = make_config({"prompt_file": "p", "model": "m", "id": "a", "output": "o", "tokens": 2, "starts": 3})
    said = []
    ids = model.slots.prompt_ids(PROMPT)
    finder = StartFinder(config, model, PROMPT, ids, cache=tmp_path, folder=tmp_path, say=said.append)
    starts = finder.candidates(examples, lambda count: None)
    assert 1 < len(starts) <= 3
    assert [start.kl for start in starts] == sorted(start.kl for start in starts)
    monkeypatch.setattr("trainer.start_finder.race", lambda *args, **kwargs: [3.0, 1.0, 2.0][: len(starts)])
    stage = Distil(model, examples, batch_size=2)
    assert finder.best(starts, stage, Optimisation(1e-2), quiet=True) is starts[1]
    assert any("1.000 in the race" in line for line in said)
    (kept,) = tmp_path.glob("starts-*.json")
    assert json.loads(kept.read_text())[0][1] == starts[0].kl
    monkeypatch.setattr("trainer.starts.Search.ranked", lambda *args: pytest.fail("searched again"))
    again = finder.candidates(examples, lambda count: None)
    assert [start.text for start in again] == [start.text for start in starts]


def test_one_start_does_not_race(model, examples, tmp_path, monkeypatch):
    config = make_config({"prompt_file": "p", "model": "m", "id": "a", "output": "o", "init": "random"})
    finder = StartFinder(config, model, PROMPT, [1, 2, 3], cache=tmp_path, folder=tmp_path, say=print)
    monkeypatch.setattr("trainer.start_finder.race", lambda *args, **kwargs: pytest.fail("one start raced"))
    starts = finder.candidates(examples, lambda count: None)
    assert finder.best(starts, Distil(model, examples), Optimisation(1e-2), quiet=True) is starts[0]


def test_candidates_of_the_same_words_are_one():
    found = distinct([([1, 2, 3, 4], 0.1), ([2, 3, 4, 5], 0.2), ([1, 2, 8, 9], 0.3), ([6, 7], 0.4), ([8], 0.5)], 3)
    assert [ids for ids, _ in found] == [[1, 2, 3, 4], [1, 2, 8, 9], [6, 7]]
    assert len(distinct([([1], 0.1), ([2], 0.2), ([1], 0.3)], 9)) == 2
