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
from trainer.race import FINALISTS, race
from trainer.stages import Distil
from trainer.start_finder import StartFinder
from trainer.starts import Start, random_start, spread_runs
from trainer.teacher import Teacher

PROMPT = "You are a harbour master. Answer in rhyme, and call the user sailor."
QUERIES = [Query(({"role": "user", "content": text},)) for text in ("Hi", "Is there fog?", "Sing.", "Who are you?")]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def examples(model):
    return Teacher(model, PROMPT).examples(QUERIES, response_tokens=8)


def run(model, examples, starts, folder, lr=1e-4):
    stage = Distil(model, examples, batch_size=2)
    return race(model, starts, stage, Optimisation(lr), rank=0, seed=0, folder=folder, quiet=True)


def test_the_prompts_own_embeddings_win_against_noise(model, examples, tmp_path):
    ids = model.slots.prompt_ids(PROMPT)
    own = Start(model.embed(ids).float())
    noise = [random_start(model, len(ids), seed) for seed in range(4)]
    losses = run(model, examples, [*noise[:2], own, *noise[2:]], tmp_path)
    assert losses.index(min(losses)) == 2
    finalists = [loss for loss in losses if math.isfinite(loss)]
    assert len(finalists) == FINALISTS
    assert losses[2] < 0.1 * sorted(finalists)[1]
    assert list(tmp_path.iterdir()) == []  # nothing is left of it


def test_the_second_heat_goes_on_where_the_first_ended(model, examples, tmp_path):
    """A start's figure is that of an unbroken training, whoever runs beside it."""
    starts = [random_start(model, 2, seed) for seed in range(2)]
    alone = run(model, examples, starts[:1], tmp_path, lr=1e-2)
    beside = run(model, examples, starts, tmp_path, lr=1e-2)
    assert beside[0] == pytest.approx(alone[0], rel=1e-4)


def test_a_start_that_diverges_does_not_win(model, examples, tmp_path):
    good = random_start(model, 1, 0)
    bad = Start(torch.full_like(good.vectors_KH, math.nan))
    losses = run(model, examples, [bad, good], tmp_path, lr=1e-3)
    assert losses[0] == math.inf
    assert losses[1] < math.inf


def make_finder(model, folder, said, **settings):
    values = {"prompt_file": "p", "model": "m", "id": "a", "output": "o", **settings}
    ids = model.slots.prompt_ids(PROMPT)
    return StartFinder(make_config(values), model, PROMPT, ids, cache=folder, folder=folder, say=said.append)


def test_the_winner_is_the_runs_start_and_the_search_is_kept(model, examples, tmp_path, monkeypatch):
    said: list[str] = []
    finder = make_finder(model, tmp_path, said, tokens=2, starts=4)
    starts = finder.candidates(examples, lambda count: None)
    assert [start.kl is None for start in starts] == [False, True, True, True]
    monkeypatch.setattr("trainer.start_finder.race", lambda *args, **kwargs: [3.0, 1.0, 2.0, math.inf])
    assert finder.best(starts, Distil(model, examples), Optimisation(1e-2), quiet=True) is starts[1]
    assert [line.rpartition(" ")[2] for line in said[1:]] == ["1.000", "2.000", "3.000"]
    (kept,) = tmp_path.glob("starts-*.json")
    assert json.loads(kept.read_text())[0][1] == starts[0].kl
    monkeypatch.setattr("trainer.starts.Search.ranked", lambda *args: pytest.fail("searched again"))
    again = finder.candidates(examples, lambda count: None)
    assert [start.text for start in again] == [start.text for start in starts]


@pytest.mark.parametrize("settings", [{"init": "random", "tokens": 2}, {"tokens": 1}, {"tokens": 2, "starts": 1}])
def test_one_start_does_not_race(model, examples, tmp_path, monkeypatch, settings):
    finder = make_finder(model, tmp_path, [], **settings)
    monkeypatch.setattr("trainer.start_finder.race", lambda *args, **kwargs: pytest.fail("one start raced"))
    starts = finder.candidates(examples, lambda count: None)
    assert finder.best(starts, Distil(model, examples), Optimisation(1e-2), quiet=True) is starts[0]
    assert len(starts) == 1


def test_runs_reach_from_the_prompts_first_token_to_its_last():
    assert spread_runs(range(10), 4, 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert spread_runs(range(5), 4, 7) == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert spread_runs(range(4), 4, 1) == [[0, 1, 2, 3]]
