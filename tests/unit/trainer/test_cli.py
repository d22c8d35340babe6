"""The training verbs from the command line to the files, on a tiny model."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from pathlib import Path

import click
import pytest
import torch
import yaml

import trainer.data.aimed
import trainer.run
from be_serve.cli._offline import OfflineDecoder
from be_serve.core.artifact import Token
from be_serve.core.errors import InputError, InvalidArtifact, InvalidBeId, WrongModel
from be_serve.core.prompts import prompt_sha256
from tests.conftest import make_tokenizer
from tests.unit.trainer.commands import PROMPT, TEXTS, be_serve, invoked, last_json
from trainer.config import make_config
from trainer.data.pool import pool
from trainer.data.queries import read_queries
from trainer.model.frozen import FrozenModel
from trainer.text import sentences


def test_train_eval_inspect(here, train, tiny_model_dir):
    output = train(
        "--queries", "q.jsonl", "--tokens", 2, "-o", "tokens/captain.safetensors", "--summary", "Rhyme.", "--json"
    )
    result = last_json(output)
    token = Token.load("tokens/captain.safetensors")
    manifest = token.manifest
    assert (manifest.id, manifest.k, manifest.placement, manifest.seed) == ("captain", 2, "system", 0)
    assert manifest.prompt.sha256 == prompt_sha256(PROMPT)
    assert manifest.prompt.text is None
    assert manifest.base_model.name == tiny_model_dir.name
    assert manifest.recipe["steps"] == 3
    assert not any("/" in str(value) for value in manifest.recipe.values())
    assert manifest.quality["rho"] == pytest.approx(result["rho"], abs=1e-4)
    assert set(manifest.quality["kl"]) == {"none", "template_default", "summary", "full", "be", "be_serving"}
    assert {"torch", "transformers", "be-serve"} <= set(manifest.versions)

    folder = here / result["run_dir"]
    for name in (
        "run.yaml",
        "log.jsonl",
        "curves.png",
        "checkpoint.safetensors",
        "heldout.jsonl",
        "evaluation.json",
        "report.html",
    ):
        assert (folder / name).exists(), name
    held_out = read_queries(folder / "heldout.jsonl")
    assert len(held_out) == 1

    (here / "checks.json").write_text('[{"check": "NoComma"}]')
    evaluated = last_json(
        be_serve(
            *["eval", "tokens/captain.safetensors", "--prompt", "captain.txt", "--queries", folder / "heldout.jsonl"],
            *["--dtype", "float32", "--summary", "Rhyme.", "--clauses", "--report", "report.html", "--json"],
            *["--checks", "checks.json", "--check-tokens", 8, "--answer-tokens", 70, "--model", tiny_model_dir],
        )
    )
    assert "captain" in (here / "report.html").read_text()
    assert set(evaluated["compliance"]["shares"]["NoComma()"]) == {"none", "full", "be"}
    assert [clause["text"] for clause in evaluated["clauses"]] == sentences(PROMPT)
    assert {"k", "rho", "rho_serving", "arms", "n_queries", "n_tokens", "samples"} <= set(evaluated)
    low, high = evaluated["rho_interval"]
    assert low - 1e-6 <= evaluated["rho"] <= high + 1e-6  # one query is held out: the interval is a point
    assert evaluated["verdict"] == manifest.quality["verdict"]
    assert (result["answer_tokens"], evaluated["answer_tokens"]) == (8, 70)
    unknown = dict.fromkeys(("full", "none", "be", "ceiling"))
    assert manifest.quality["facts"] == {"probes": 0, "n": 0, **unknown, "steady": {"n": 0, "be": None}}
    assert 0 <= manifest.quality["readable"] == result["readable"] <= manifest.k
    assert set(evaluated["stop"]) == {"full", "be", "kept"}
    assert set(evaluated["loops"]) == {"full", "be", "none"}
    assert evaluated["rho_answer"] > 0
    assert evaluated["rho_default"] > 0
    assert [row["tokens"] for row in evaluated["by_query"]] == [evaluated["n_tokens"]]
    lines = output.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("rho = KL(be) / KL(none) = "))
    assert lines[at + 1].startswith("gain retained")
    assert any("facts: not tested" in line and "--test-queries" in line for line in lines[at + 2 :])
    for arm in evaluated["arms"].values():
        assert set(arm) == {"kl", "top1", "first_token_kl", "nll"}
    assert evaluated["rho"] == pytest.approx(result["rho"], rel=1e-3)
    assert evaluated["arms"]["full"]["kl"] == 0
    assert evaluated["arms"]["full"]["top1"] == 1
    assert evaluated["rho"] == pytest.approx(evaluated["arms"]["be"]["kl"] / evaluated["arms"]["none"]["kl"])
    assert evaluated["samples"][0]["query"] == held_out[0].text

    shown = last_json(be_serve("inspect", "tokens/captain.safetensors", "--json"))
    assert shown["manifest"]["id"] == "captain"
    assert shown["checks"]["fits_dtype"] == {"float16": True, "bfloat16": True, "float32": True}
    assert "captain" in be_serve("inspect", "tokens/captain.safetensors")


def test_tokens_stand_together_and_are_a_start(here, train, tiny_model_dir):
    """Two tokens in one slot, measured as they are and trained on from there."""
    for name, init in (("a", "text:harbour"), ("b", "mean")):
        train("--queries", "q.jsonl", "--tokens", 1, "-o", f"{name}.safetensors", "--init", init)
    (here / "both.txt").write_text(f"{PROMPT}\n\nAnswer in verse.")
    common = (
        "--queries",
        "q.jsonl",
        "--prompt",
        "both.txt",
        "--model",
        tiny_model_dir,
        "--dtype",
        "float32",
        "--samples",
        0,
        "--answer-tokens",
        0,
        "--json",
    )
    together = last_json(be_serve("eval", "a.safetensors", "--with", "b.safetensors", *common))
    assert together["k"] == 2
    # Two untrained embeddings move a random model hardly at all.
    assert together["verdict"]["status"] == "failed"
    assert "hardly reads the token" in together["verdict"]["reasons"][0]
    settings = ("--queries", "q.jsonl", "--tokens", 2, "--steps", 0, "--init", "file:a.safetensors,b.safetensors")
    trained = last_json(train(*settings, "-o", "both.safetensors", "--with-prompt", "--json"))
    vectors = [Token.load(f"{name}.safetensors") for name in ("a", "b", "both")]
    assert (vectors[2].vectors == [*vectors[0].vectors, *vectors[1].vectors]).all()
    assert vectors[2].manifest.recipe["init"] == "file"
    assert trained["k"] == 2
    with pytest.raises(InputError, match="No token file at"):
        train("--queries", "q.jsonl", "--tokens", 2, "--init", "file:nowhere.safetensors", "-o", "c.safetensors")


def test_scores_only_leaves_out_answers_and_clauses(here, train):
    found = last_json(train("--queries", "q.jsonl", "--tokens", 1, "--scores-only", "--json"))
    assert found["samples"] == []
    assert found["clauses"] == []
    assert found["rho"] > 0
    assert found["verdict"]["status"] != "deployable"


def test_test_queries_are_only_measured_on(here, train):
    """What resembles them trains nothing, and the held-out part is left to validation."""
    rows = [{"query": "Name a boat.", "fact": "The Gull"}, {"query": "When is noon?"}, {"query": "What is the tide"}]
    (here / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--queries", "q.jsonl", "--tokens", 1, "--init", "mean", "--json")
    found = last_json(train(*common, "--test-queries", "t.jsonl", "--answer-queries", 1))
    folder = here / found["run_dir"]
    assert found["n_queries"] == len(found["by_query"]) == 3
    assert found["facts"]["probes"] == 1
    assert ["answer" in row for row in found["by_query"]] == [True, False, False]  # the probe comes first
    (held_out,) = read_queries(folder / "heldout.jsonl")
    assert held_out.text in set(TEXTS) - {"Name a boat.", "What is the tide?"}
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    assert settings["test_queries"] == str(here / "t.jsonl")
    assert settings["test_queries"] in make_config(settings).files()
    recipe = Token.load("captain.safetensors").manifest.recipe
    assert recipe["test_queries"] is True
    with pytest.raises(InputError, match="absent"):
        train(*common, "--test-queries", "absent.jsonl")


def test_facts_and_test_queries_do_not_begin_a_run_anew(here, train):
    """They are measured on alone: a run with others continues from its checkpoint."""
    common = ("--queries", "q.jsonl", "--tokens", 1, "--init", "mean", "--run-dir", "r", "--json")
    train(*common)
    (here / "q.jsonl").write_text("".join(json.dumps({"query": text, "fact": "sea"}) + "\n" for text in TEXTS))
    again = last_json(train(*common, "--answer-tokens", 4))
    assert again["before"]["steps"] == 3


def test_the_same_seed_gives_the_same_token(here, train):
    vectors = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train("--queries", "q.jsonl", "--tokens", 1, "-o", f"{name}.safetensors", "--seed", seed)
        vectors.append(Token.load(f"{name}.safetensors").vectors)
    assert (vectors[0] == vectors[1]).all()
    assert not (vectors[0] == vectors[2]).all()


def test_run_yaml_repeats_a_run(here, train):
    first = last_json(train("--queries", "q.jsonl", "--tokens", 1, "--init", "mean", "--with-prompt", "--json"))
    token = Token.load("captain.safetensors")
    assert token.manifest.prompt.text == PROMPT.rstrip()
    again = last_json(
        be_serve(
            "train",
            "--config",
            f"{first['run_dir']}/run.yaml",
            "--run-dir",
            "again",
            "-o",
            "again.safetensors",
            "--json",
        )
    )
    assert again["rho"] == first["rho"]
    assert Token.load("again.safetensors").manifest.id == "captain"
    assert (Token.load("again.safetensors").vectors == token.vectors).all()


def test_an_interrupted_command_continues(here, train, monkeypatch, capsys):
    whole = last_json(train("--queries", "q.jsonl", "--tokens", 1, "-o", "a.safetensors", "--json"))
    monkeypatch.setattr(trainer.run, "evaluate", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(click.Abort):
        train("--queries", "q.jsonl", "--tokens", 1, "-o", "b.safetensors", "--json")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (folder,) = (here / "runs").glob("b-*")
    output = be_serve("train", "--resume", folder, "--json")
    resumed, rows = last_json(output), (folder / "log.jsonl").read_text().splitlines()
    assert "before" not in whole
    spent = sum(json.loads(row)["seconds"] for row in rows)
    assert resumed["before"] == {"steps": len(rows), "seconds": pytest.approx(spent, abs=0.01)}
    assert f"; all since the run was continued: its {len(rows)} steps before took" in output
    assert resumed["arms"] == whole["arms"]
    assert resumed["start"] == whole["start"]
    assert "start" not in resumed["seconds"]  # nothing was searched again
    assert (Token.load("b.safetensors").vectors == Token.load("a.safetensors").vectors).all()
    assert Token.load("b.safetensors").manifest.recipe == Token.load("a.safetensors").manifest.recipe
    (here / "captain.txt").write_text("Another prompt, which is longer.")
    with pytest.raises(InputError, match="other settings"):
        be_serve("train", "--resume", folder)


def test_without_queries_the_pool_and_the_model_give_them(here, train, monkeypatch):
    # A random model's words are no language: what it samples is replaced, the rest is real.
    def sample(model, asks, seed, progress):
        rng = random.Random(seed)
        return ["What is " + " ".join(rng.choice("abcdefghij") * 3 for _ in range(4)) + "?" for _ in asks]

    monkeypatch.setattr(trainer.data.aimed, "_sample", sample)
    result = last_json(train("--synthesise", 12, "--init", "text:sailor rhyme", "--tokens", 1, "--json"))
    folder = here / result["run_dir"]
    written = read_queries(next(folder.glob("queries-*.jsonl")))
    assert 8 <= len(written) <= 12
    assert len({query.text for query in written}) == len(written)
    texts = {query.text for messages in pool().values() for query in messages}
    assert sum(query.text in texts for query in written) == 12 - 8  # the least likely fifth of ten is left out
    assert Token.load("captain.safetensors").manifest.recipe["queries"] == "synthetic"


def test_all_stages_with_an_ae(here, train, tiny_model_dir):
    (here / "corpus.txt").write_text("\n\n".join(f"The tide of day {i} was high at noon." for i in range(40)))
    shown = last_json(
        be_serve(
            *["train-ae", "--corpus", "corpus.txt", "--model", tiny_model_dir, "-o", "ae.safetensors", "--steps", 4],
            *["--length", 8, "--dtype", "float32", "--json"],
        )
    )
    assert set(shown["reconstruction"]) == {"before", "after"}
    result = last_json(
        train("--queries", "q.jsonl", "--tokens", 1, "--ae", "ae.safetensors", "--reconstruct-steps", 2, "--json")
    )
    rows = [json.loads(line) for line in (here / result["run_dir"] / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["reconstruct"] * 2 + ["joint"] * 3
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    joint = rows[-1]
    assert joint["loss"] == pytest.approx(0.1 * joint["reconstruction"] + 0.9 * joint["kl"], rel=1e-5)
    settings = yaml.safe_load((here / result["run_dir"] / "run.yaml").read_text())
    assert settings["lam"] == 0.9
    recipe = Token.load("captain.safetensors").manifest.recipe
    assert recipe["ae"] is True


@pytest.mark.parametrize("placement", ["block", "prefix"])
def test_placements_are_stored(here, train, placement):
    train("--queries", "q.jsonl", "--tokens", 1, "--init", "mean", "--placement", placement)
    assert Token.load("captain.safetensors").manifest.placement == placement


def test_an_offline_engine_decodes_and_ends_before_training(here, train, monkeypatch):
    """A scripted engine in place of vLLM; the real one is in tests/integration."""
    events = []

    class Scripted:
        name = "scripted"

        def __init__(self, folder, model):
            assert (Path(folder) / "config.json").exists()
            self.model = model

        def __call__(self, chats, max_tokens, temperature, seed):
            events.append("asked")
            prompt = self.model.slots.prompt_ids(PROMPT)
            assert all(set(prompt) <= set(chat) for chat in chats)
            return [[5, 6, self.model.stop_ids()[0]] for _ in chats]

        def close(self):
            events.append("closed")

    fitted = trainer.run.fit
    monkeypatch.setattr("be_serve.cli._offline.OfflineDecoder", Scripted)
    monkeypatch.setattr(trainer.run, "fit", lambda *a, **k: (events.append("trained"), fitted(*a, **k)))
    arguments = ("--queries", "q.jsonl", "--tokens", 1, "--teacher", "vllm", "--run-dir", "r", "--json")
    train(*arguments)
    assert events == ["asked", "closed", "trained"]
    train(*arguments)  # what was decoded is not decoded again
    assert events.count("asked") == 1
    with pytest.raises(InputError, match="excludes gold"):
        train("--queries", "q.jsonl", "--teacher", "vllm", "--gold")
    events.clear()
    with pytest.raises(InputError, match="Cannot read"):  # a failure before training ends the engine, too
        train("--queries", "absent.jsonl", "--teacher", "vllm", "--run-dir", "r2")
    assert events == ["closed"]


@pytest.mark.parametrize(
    ("child", "message"),
    [
        ("import sys; sys.exit(3)", "gave no answers"),
        ("import sys; sys.stdin.readline(); print('{\"respon', end='')", "gave no answers"),
        ('import sys\nfor line in sys.stdin: print(\'{"error": "too long"}\', flush=True)', "too long"),
    ],
)
def test_an_offline_engine_that_fails_is_told_and_ended(tiny_model_dir, monkeypatch, child, message):
    """A child process that dies, dies in the middle of a line, or refuses."""
    started = subprocess.Popen

    def start(command, **options):
        assert command[1] == "-P"
        return started([command[0], "-c", child], **options)

    monkeypatch.setattr("be_serve.cli._offline.subprocess.Popen", start)
    model = FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")
    engine = OfflineDecoder(str(tiny_model_dir), model)
    with pytest.raises(InputError, match=message):
        engine([[1, 2, 3]], 4, 0.0, 0)
    engine.close()
    assert engine._process is None
    if "no answers" in message:
        with pytest.raises(InputError, match="did not start before"):
            engine([[1, 2, 3]], 4, 0.0, 0)


def test_an_offline_engine_that_hangs_is_killed(tiny_model_dir, monkeypatch):
    started = subprocess.Popen
    child = (
        "import json, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "job = json.loads(sys.stdin.readline())\n"
        "print(json.dumps({'responses': [[7]] * len(job['chats'])}), flush=True)\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr("be_serve.cli._offline._PATIENCE", 0.5)
    monkeypatch.setattr(
        "be_serve.cli._offline.subprocess.Popen", lambda command, **o: started([command[0], "-c", child], **o)
    )
    model = FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")
    engine = OfflineDecoder(str(tiny_model_dir), model)
    assert engine([[1], [2]], 4, 0.0, 0) == [[7], [7]]
    process = engine._process
    engine.close()
    assert process.poll() == -signal.SIGKILL


def test_from_text(here, tiny_model_dir):
    output = be_serve("from-text", "captain.txt", "--model", tiny_model_dir, "-o", "self.safetensors")
    token = Token.load("self.safetensors")
    assert f"{token.manifest.k} vectors" in output
    assert token.manifest.recipe == {"method": "from-text"}
    evaluated = last_json(
        be_serve(
            *["eval", "self.safetensors", "--prompt", "captain.txt", "--queries", "q.jsonl", "--model", tiny_model_dir],
            *["--dtype", "float32", "--samples", 0, "--answer-tokens", 0, "--json"],
        )
    )
    assert abs(evaluated["arms"]["be"]["kl"]) < 1e-4
    assert evaluated["samples"] == []


def test_a_token_of_a_local_folder_is_evaluated_with_that_folder_given(here, tiny_model_dir):
    be_serve("from-text", "captain.txt", "--model", tiny_model_dir, "-o", "self.safetensors")
    with pytest.raises(InputError, match=rf"The token tells its model's name \({tiny_model_dir.name}\).*give --model"):
        be_serve("eval", "self.safetensors", "--prompt", "captain.txt", "--queries", "q.jsonl")


def test_refusals(here, train, tiny_model_dir, tmp_path_factory):
    with pytest.raises(InputError, match="Cannot read the prompt file"):
        be_serve("train", "absent.txt", "--model", tiny_model_dir)
    with pytest.raises(InputError, match="Give a prompt file"):
        be_serve("train", "--model", tiny_model_dir)
    with pytest.raises(InvalidBeId):
        train("--id", "No Good")
    with pytest.raises(InputError, match=r"\[AE\] file"):
        train("--lambda", 0.5)
    with pytest.raises(InputError, match="Cannot read"):
        train("--queries", "absent.jsonl")
    (here / "captain.txt").write_text("Hi")
    with pytest.raises(InputError, match="fewer than --tokens 9"):
        train("--queries", "q.jsonl", "--tokens", 9)
    (here / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(InvalidArtifact):
        be_serve("inspect", "broken.safetensors")


def test_eval_refuses_another_model(here, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    be_serve("from-text", "captain.txt", "--model", tiny_model_dir, "-o", "self.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    make_tokenizer("chatml").save_pretrained(tmp_path / "other")
    with pytest.raises(WrongModel, match="embedding"):
        be_serve(
            *["eval", "self.safetensors", "--prompt", "captain.txt", "--queries", "q.jsonl"],
            *["--model", tmp_path / "other"],
        )


@pytest.mark.parametrize(
    "url",
    ["http://me:hun@ter2@host", "https://host/v1?api_key=hunter2", "https://hunter2@host", "https://host:hunter2/v1"],
)
def test_a_teachers_url_with_a_secret_never_reaches_the_run_folder(url):
    settings = {"prompt_file": "p.txt", "model": "m", "id": "x", "output": "x.safetensors", "teacher_url": url}
    with pytest.raises(InputError, match="BE_TEACHER_KEY") as caught:
        make_config(settings)
    assert "ter2" not in str(caught.value)
    assert make_config({**settings, "teacher_url": "https://host:8000/v1"}).teacher_url


def test_responses_that_recite_or_loop_train_nothing(here, tiny_model_dir, monkeypatch):
    def told(folder, *args):
        """What the run says beside its result."""
        given = ["train", "captain.txt", "--model", tiny_model_dir, "--queries", "q.jsonl", "--init", "mean"]
        given += ["--tokens", 1, "--steps", 1, "--response-tokens", 4, "--answer-tokens", 8, "--run-dir", folder]
        return invoked(*given, *args).stderr

    judged = []
    monkeypatch.setattr("trainer.run.ends_in_loop", lambda text: judged.append(text) or len(judged) == 1)
    assert "1 responses that go round in a loop left out." in told("a")
    assert len(judged) == 6
    monkeypatch.setattr("trainer.run.ends_in_loop", lambda text: True)  # a model that does nothing else
    assert "left out" not in told("b")
    monkeypatch.setattr("trainer.data.teacher.recites", lambda text, prompt: True)
    with pytest.raises(InputError, match="--keep-recitals"):
        told("c")
    assert "left out" not in told("d", "--keep-recitals")
