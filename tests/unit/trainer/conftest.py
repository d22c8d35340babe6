"""A folder with a prompt and queries, and `train` in it on a tiny model."""

from __future__ import annotations

import json

import pytest

from tests.unit.trainer.commands import PROMPT, TEXTS, be_serve


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captain.txt").write_text(PROMPT)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.fixture
def train(here, tiny_model_dir):
    def run(*args):
        fixed = ["--dtype", "float32", "--response-tokens", 4, "--steps", 3, "--batch-size", 2]
        fixed += ["--answer-tokens", 8]
        return be_serve("train", "captain.txt", "--model", tiny_model_dir, *fixed, *args)

    return run
