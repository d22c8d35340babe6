"""The picture of places against what they keep: what it reads, and that it is drawn."""

from __future__ import annotations

import json

import pytest

from be_serve.core.errors import InputError
from experiments.front import Point, draw, read_point

EVALUATION = {"k": 4, "rho": 0.5, "rho_interval": [0.4, 0.6], "facts": {"n": 30, "be": 0.3}}
ROW = {"name": "words", "vectors": 64, "rho": 0.2, "rho_interval": [0.1, 0.3], "facts": 20, "facts_of": 40}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "learned.json").write_text(json.dumps(EVALUATION))
    rows = [{**ROW, "prompt": "a"}, {**ROW, "prompt": "b", "facts": 10}, {**ROW, "name": "all"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_point_is_read_from_an_evaluation_or_a_row(files):
    assert read_point("learned=learned.json") == Point("learned", 4, 0.5, (0.4, 0.6), 9, 30)
    assert read_point("words=rows.json#all") == Point("words", 64, 0.2, (0.1, 0.3), 20, 40)
    assert read_point("words=rows.json#b/words").facts == 10


@pytest.mark.parametrize(
    "argument", ["learned.json", "a=none.json", "a=rows.json#words", "a=rows.json", "a=learned.json#"]
)
def test_what_names_no_single_token_is_told(files, argument):
    if argument == "a=learned.json#":
        (files / "learned.json").write_text(json.dumps({"k": 4}))
    with pytest.raises(InputError, match="no figures of one token"):
        read_point(argument)


def test_the_interval_of_a_share_is_wilsons():
    low, high = Point("a", 1, 0, (0, 0), 17, 30).facts_interval
    assert (low, high) == (pytest.approx(0.392, abs=1e-3), pytest.approx(0.727, abs=1e-3))
    low, high = Point("a", 1, 0, (0, 0), 0, 30).facts_interval
    assert low == pytest.approx(0, abs=1e-9)
    assert high == pytest.approx(0.114, abs=1e-3)


def test_the_picture_is_drawn(files):
    points = [
        read_point(argument) for argument in ("learned=learned.json", "words=rows.json#all", "words=rows.json#b/words")
    ]
    draw(points, files / "front.png", "A model, a prompt")
    assert (files / "front.png").read_bytes().startswith(b"\x89PNG")
