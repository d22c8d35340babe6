"""The plan of a run: what it counts, and that it writes nothing."""

from __future__ import annotations

import json

import pytest

from be_serve.core.errors import InputError
from tests.unit.trainer.commands import PROMPT, be_serve, last_json


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "source", [("--queries", "q.jsonl", "--tokens", 1), ("--synthesise", 20, "--summary", "Rhyme.")]
)
def test_a_plan_tells_the_run_and_writes_nothing(here, train, source):
    before = files(here)
    output = train(*source, "--plan", "--json")
    found = last_json(output)
    assert files(here) == before
    assert "Nothing was trained or written." in output
    assert found["steps"] == 3
    assert found["queries"]["source"] == ("file" if source[0] == "--queries" else "written")
    assert found["queries"]["training"] == (6 if source[0] == "--queries" else 16)
    assert set(found["phases"]) == {"load", "queries", "teacher", "start", "training", "evaluation"}
    assert found["minutes"] == pytest.approx(sum(found["phases"].values()), abs=0.01)
    assert (found["phases"]["queries"] > 0) == (source[0] != "--queries")
    assert 1 << 20 < found["peak_bytes"] < 1 << 36


def test_the_plan_of_a_batch_is_the_sum_of_its_rows(here, tiny_model_dir):
    rows = [
        {"id": "a", "prompt": PROMPT, "queries": "q.jsonl", "tokens": 1},
        {"id": "b", "prompt": PROMPT, "queries": "q.jsonl", "tokens": 2, "steps": 6},
        {"id": "c", "prompt_file": "captain.txt", "gold": True, "queries": "q.jsonl", "init": "mean"},
    ]
    (here / "batch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = files(here)
    arguments = ("--batch-file", "batch.jsonl", "--model", tiny_model_dir, "--dtype", "float32", "--steps", 3)
    found = last_json(be_serve("train", *arguments, "--plan", "--json"))
    assert files(here) == before
    assert [plan["id"] for plan in found["tokens"]] == ["a", "b", "c"]
    assert [plan["k"] for plan in found["tokens"]] == [1, 2, 4]
    assert [plan["steps"] for plan in found["tokens"]] == [3, 6, 3]
    assert found["minutes"] == pytest.approx(sum(plan["minutes"] for plan in found["tokens"]), abs=0.01)
    a, b, c = (plan["phases"] for plan in found["tokens"])
    assert a["load"] >= b["load"] == 0
    assert b["load"] == b["teacher"] == 0  # the answers of the first row serve the second
    assert c["start"] == 0


def test_a_plan_refuses_what_the_run_would(here, train):
    with pytest.raises(InputError, match="Cannot read"):
        train("--queries", "absent.jsonl", "--plan")
    (here / "captain.txt").write_text("Hi")
    with pytest.raises(InputError, match="fewer than --tokens"):
        train("--queries", "q.jsonl", "--tokens", 16, "--plan")
