"""Many prompts in one process, from the command line, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from be_serve.cli.main import cli
from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from trainer.batch import read_batch

TEXTS = ["Hi", "What is the tide?", "Is there fog?", "Name a boat.", "Who are you?", "Sing.", "Where is the quay?"]
FIXED = [
    "--dtype",
    "float32",
    "--answer-tokens",
    4,
    "--response-tokens",
    4,
    "--steps",
    3,
    "--batch-size",
    2,
    "--queries",
    "q.jsonl",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))
    (tmp_path / "files" / "policy.md").write_text("Never give a refund. Ask for the order number first.\n")
    return tmp_path


def write(here, *rows) -> str:
    file = here / "files" / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def train(model, *args) -> tuple[dict, int]:
    """Run `be-serve train`; the last JSON object and the exit status, 2 where a prompt failed."""
    words = ["train", "--model", model, *FIXED, *args, "--json"]
    result = CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)
    if result.exception and not isinstance(result.exception, InputError):
        raise result.exception
    found = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return json.loads(found[-1]), 2 if result.exception else 0


CAPTAIN = {"id": "captain", "prompt": "You are a harbour master. Answer in rhyme.", "summary": "Rhyme."}
POLICY = {"id": "policy", "prompt_file": "policy.md", "tokens": 3, "steps": 5}


def test_a_batch_makes_the_tokens_that_single_runs_make(here, tiny_model_dir):
    file = write(here, CAPTAIN, {"id": "bad", "prompt_file": "nowhere.txt"}, POLICY)
    found, status = train(tiny_model_dir, "--batch-file", file, "--tokens", 2, "-o", "out")
    assert status == 2
    captain, bad, policy = found["tokens"]
    assert "nowhere.txt" in bad["error"]
    assert (captain["k"], policy["k"]) == (2, 3)
    assert "summary" in captain["arms"]
    for row, extra in ((CAPTAIN, ["--tokens", 2]), (POLICY, ["--tokens", 3, "--steps", 5])):
        prompt = here / "files" / "policy.md" if "prompt_file" in row else here / "captain.txt"
        if "prompt" in row:
            prompt.write_text(row["prompt"])
        train(tiny_model_dir, prompt, *extra, "-o", f"alone/{row['id']}.safetensors")
        together, alone = (Token.load(here / folder / f"{row['id']}.safetensors") for folder in ("out", "alone"))
        torch.testing.assert_close(torch.tensor(together.vectors), torch.tensor(alone.vectors), atol=1e-3, rtol=1e-2)
        assert together.manifest.prompt.sha256 == alone.manifest.prompt.sha256


def test_a_batch_goes_on_where_it_stopped(here, tiny_model_dir):
    file = write(here, CAPTAIN)
    train(tiny_model_dir, "--batch-file", file, "-o", "out")
    first = (here / "out" / "captain.safetensors").read_bytes()
    file = write(here, CAPTAIN, POLICY)
    found, status = train(tiny_model_dir, "--batch-file", file, "-o", "out")
    assert status == 0
    assert found["tokens"][0] == {"id": "captain", "skipped": True}
    assert found["tokens"][1]["k"] == 3
    assert (here / "out" / "captain.safetensors").read_bytes() == first
    file = write(here, {**CAPTAIN, "prompt": "You are another one. Answer in prose."})
    found, _ = train(tiny_model_dir, "--batch-file", file, "-o", "out", "--fresh")
    assert "skipped" not in found["tokens"][0]


def test_a_changed_input_is_trained_again(here, tiny_model_dir):
    file = write(here, CAPTAIN)
    train(tiny_model_dir, "--batch-file", file, "-o", "out")
    changed = write(here, {**CAPTAIN, "summary": "Answer in verse."})
    found, _ = train(tiny_model_dir, "--batch-file", changed, "-o", "out")
    assert "skipped" not in found["tokens"][0]
    (here / "q.jsonl").write_text("".join(json.dumps({"query": f"{text} Well?"}) + "\n" for text in TEXTS))
    found, status = train(tiny_model_dir, "--batch-file", changed, "-o", "out")
    assert status == 2  # other queries make another run: its folder is refused, nothing in it is lost
    assert "--fresh" in found["tokens"][0]["error"]
    assert (here / "runs" / "prompts" / "captain" / "evaluation.json").exists()
    found, status = train(tiny_model_dir, "--batch-file", changed, "-o", "out", "--fresh")
    assert status == 0
    assert found["tokens"][0]["k"] == 16


def test_rows_of_one_prompt_share_the_teacher(here, tiny_model_dir):
    file = write(here, CAPTAIN, {**CAPTAIN, "id": "quick", "lr": 0.1})
    found, _ = train(tiny_model_dir, "--batch-file", file, "-o", "out")
    assert [token["id"] for token in found["tokens"]] == ["captain", "quick"]
    shards = list((here / "runs" / "prompts" / "teacher").glob("teacher-*"))
    assert len(shards) == 3  # for the training queries, those held out, and the prompt's sentences


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "A b", "prompt": "x"}, "line 1"),
        ({"id": "teacher", "prompt": "x"}, "taken"),
        ({"id": "a"}, "`prompt` or `prompt_file`"),
        ({"id": "a", "prompt": "x", "prompt_file": "y"}, "`prompt` or `prompt_file`"),
        ({"id": "a", "prompt": 3}, "must be a string"),
        ({"id": "a", "prompt": "\ud800"}, "line 1"),
        ({"id": "a", "prompt": "x", "teacher_url": "http://other"}, "`teacher_url` is no setting"),
        ({"id": "a", "prompt": "x", "model": "other"}, "`model` is no setting"),
        ({"id": "a", "prompt": "x", "stepz": 3}, "`stepz` is no setting"),
        (["a"], "JSON object"),
    ],
)
def test_a_faulty_batch_file_names_its_line(here, row, message):
    with pytest.raises(InputError, match=message):
        read_batch(write(here, row))


def test_ids_of_a_batch_differ(here):
    with pytest.raises(InputError, match="line 2: the id 'captain' was used before"):
        read_batch(write(here, CAPTAIN, CAPTAIN))
    with pytest.raises(InputError, match="holds no prompts"):
        read_batch(write(here))
