"""The loop on a tiny model: golden losses, resuming, signals, checkpoints, settings."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from be_serve.core.errors import InputError, WrongModel
from tests.conftest import make_tokenizer
from trainer.config import RECIPES, TrainConfig, make_config
from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.from_text import identity_token
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import LowRankToken, SoftToken, scored_states
from trainer.optim.autoencoder import AEConfig, TextBatches, load_ae, save_ae, stream_texts, train_ae
from trainer.optim.checkpoint import Checkpoint
from trainer.optim.log import Log, draw_curves, smooth
from trainer.optim.loop import Optimisation, Stopped, Training, fit
from trainer.optim.losses import hidden_kl
from trainer.optim.objectives import Distil, Joint, Part, Reconstruct, split
from trainer.optim.starts import file_start
from trainer.optim.validation import Validation

PROMPT = "You are a harbour master. Call the user sailor and answer in rhyme."
QUERIES = [
    Query(({"role": "user", "content": text},))
    for text in ("What is the tide?", "Hi", "Is there fog?", "Name a boat.", "Who are you?", "Sing.")
]
# A refactor must give these losses; they were written down when the formulas were checked.
GOLDEN_RECONSTRUCT = [6.58576, 6.517848, 6.395467]
GOLDEN_JOINT = [2.713446, 2.428741, 2.674001, 2.657212, 2.5917, 2.386833]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def examples(model):
    return Teacher(model, PROMPT).examples(QUERIES, response_tokens=5)


@pytest.fixture
def start(model):
    return model.embed(model.slots.prompt_ids(PROMPT)[:2])


def make_stages(model, examples):
    ae = model.embed([7])
    reconstruct = Reconstruct(model, PROMPT, ae)
    distil = Distil(model, examples, batch_size=2, tau=2.0)
    return [(reconstruct, 3), (Joint(reconstruct, distil, 0.7), 6)]


SETTINGS = Optimisation(lr=0.05, warmup=2, checkpoint_every=2)


def train(model, vectors, stages, folder, digest="a"):
    """Train one token in `folder`; return it."""
    training = Training(SoftToken(vectors), stages, SETTINGS, folder=folder, digest=digest)
    fit(model, [training], quiet=True)
    return training.token


def curve(folder):
    rows = Log(folder / "log.jsonl").rows()
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    """A model and tokenizer that depend on no library's initialisation and on no text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer("chatml", vocab_size=260)  # the bytes and the special tokens: no merges
    assert len(tokenizer) == 260
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    causal_lm = LlamaForCausalLM(config)
    for n, (_, weight) in enumerate(sorted(causal_lm.named_parameters())):
        if weight.dim() > 1:
            weight.data = 0.4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(n))
    folder = tmp_path_factory.mktemp("golden")
    causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return FrozenModel.load(folder, name="golden", device="cpu", dtype="float32")


def test_golden_losses(golden_model, tmp_path):
    model = golden_model
    examples = Teacher(model, PROMPT).examples(QUERIES, response_tokens=5)
    start = model.embed(model.slots.prompt_ids(PROMPT)[:2])
    train(model, start, make_stages(model, examples), tmp_path)
    losses = [row["loss"] for row in curve(tmp_path)]
    assert losses == pytest.approx(GOLDEN_RECONSTRUCT + GOLDEN_JOINT, abs=2e-4)


class Around:
    """A stage around another."""

    def __init__(self, stage):
        self.stage, self.name = stage, stage.name

    def parts(self, vectors, step) -> list[Part]:
        return self.stage.parts(vectors, step)

    def told(self):
        return self.stage.told()

    def recall(self, rows):
        self.stage.recall(rows)


class StopAt(Around):
    """A stage that sends this process a signal in the middle of a step."""

    def __init__(self, stage, at, number):
        super().__init__(stage)
        self.at, self.number = at, number

    def parts(self, vectors, step) -> list[Part]:
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().parts(vectors, step)


@pytest.mark.parametrize(("stage", "at"), [(0, 1), (0, 2), (1, 0), (1, 3)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_with_the_same_curve(model, examples, start, tmp_path, stage, at, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = train(model, start, make_stages(model, examples), whole)

    stages = make_stages(model, examples)
    stages[stage] = (StopAt(stages[stage][0], at, number), stages[stage][1])
    with pytest.raises(Stopped):
        train(model, start, stages, parts)
    assert len(curve(parts)) == (0, 3)[stage] + at + 1
    resumed = train(model, torch.zeros_like(start), make_stages(model, examples), parts)
    assert curve(parts) == curve(whole)
    assert torch.equal(resumed.vectors, expected.vectors)


def test_a_killed_run_resumes_from_its_last_checkpoint(model, examples, start, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(model, start, make_stages(model, examples), whole)

    class Killed(Exception):
        pass

    stages = make_stages(model, examples)
    inner = stages[1][0]

    class Dies(Around):
        def parts(self, vectors, step):
            if step == 5:
                raise Killed
            return super().parts(vectors, step)

    stages[1] = (Dies(inner), 6)
    with pytest.raises(Killed):
        train(model, start, stages, parts)
    with (parts / "log.jsonl").open("a") as out:
        out.write('{"stage_index": 1, "st')  # killed in the middle of a line
    train(model, start, make_stages(model, examples), parts)
    assert curve(parts) == curve(whole)


def test_the_best_step_on_the_validation_queries_is_taken_and_survives_a_stop(model, examples, start, tmp_path):
    settings = replace(SETTINGS, lr=2.0)  # so large that later steps are worse
    distil = Distil(model, examples[:4], batch_size=2)
    validation = Validation(Distil(model, examples[4:]), checks=4)

    def begin(folder, check=validation):
        stages = [(distil, 8)]
        return Training(SoftToken(start), stages, settings, folder=tmp_path / folder, digest="a", validation=check)

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = begin("whole")
    fit(model, [whole], quiet=True)
    measured = {
        row["step"]: row["validation"] for row in Log(tmp_path / "whole" / "log.jsonl").rows() if "validation" in row
    }
    assert list(measured) == [2, 4, 6, 8]
    best = min(measured, key=measured.__getitem__)
    assert (whole.best.step, whole.best.kl) == (best, measured[best])
    assert validation.divergence(whole.vectors) == pytest.approx(measured[best])
    assert (best == 8) == torch.equal(whole.vectors, whole.token.vectors)
    own = [
        hidden_kl(e.states_TH, scored_states(model, [row], whole.vectors), model.head)
        for e, row in zip(examples[4:], validation.distil.rows, strict=True)
    ]
    assert measured[best] == pytest.approx(float(torch.cat(own).mean()), rel=1e-4)

    first = begin("cut")
    step = first.update

    def stop_at_five(*args):
        step(*args)
        if first.step == 5:
            first.save()
            raise Stopped

    first.update = stop_at_five
    with pytest.raises(Stopped):
        fit(model, [first], quiet=True)
    second = begin("cut")
    assert second.best.step in (2, 4)
    fit(model, [second], quiet=True)
    assert (second.best.step, second.best.kl) == (whole.best.step, whole.best.kl)
    assert torch.equal(second.vectors, whole.vectors)
    done = begin("cut")  # at its end
    assert torch.equal(done.vectors, whole.vectors)


def test_another_runs_checkpoint_is_refused(model, examples, start, tmp_path):
    stages = make_stages(model, examples)[:1]
    train(model, start, stages, tmp_path)
    with pytest.raises(InputError, match="other settings"):
        train(model, start, stages, tmp_path, "b")
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match="Damaged checkpoint"):
        Checkpoint.load(file, "a")


class Diverges(Around):
    """A stage whose loss is NaN from its second step on."""

    def parts(self, vectors, step):
        return [replace(part, weight=float("nan") if step else 1.0) for part in super().parts(vectors, step)]


def test_tokens_train_side_by_side_as_alone(model, examples, start, tmp_path):
    """Different k, stages and lengths; one diverges, which the others do not notice."""

    def trainings(folder):
        distil = Distil(model, examples, batch_size=2, seed=1)
        cases = {
            "joint": (start, make_stages(model, examples)),
            "one": (start[:1], [(distil, 5)]),
            "bad": (start, [(Diverges(distil), 4)]),
        }
        for name, (vectors, stages) in cases.items():
            (folder / name).mkdir(parents=True)
            yield name, Training(SoftToken(vectors), stages, SETTINGS, folder=folder / name, digest="a")

    together = dict(trainings(tmp_path / "together"))
    fit(model, list(together.values()), quiet=True)
    assert "diverged" in str(together["bad"].fault)
    assert together["bad"].steps_done == 1
    for name, alone in trainings(tmp_path / "alone"):
        fit(model, [alone], quiet=True)
        torch.testing.assert_close(together[name].token.vectors, alone.token.vectors, atol=1e-5, rtol=1e-4)
        assert len(curve(tmp_path / "together" / name)) == len(curve(tmp_path / "alone" / name))


def test_a_stop_saves_all_and_they_resume(model, examples, start, tmp_path):
    def trainings(folder, at=None):
        for name, steps in (("a", 5), ("b", 3)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            stage = Distil(model, examples, batch_size=2, seed=len(name))
            if at is not None and name == "a":
                stage = StopAt(stage, at, signal.SIGINT)
            yield Training(SoftToken(start), [(stage, steps)], SETTINGS, folder=folder / name, digest="a")

    fit(model, list(trainings(tmp_path / "whole")), quiet=True)
    with pytest.raises(Stopped):
        fit(model, list(trainings(tmp_path / "parts", at=2)), quiet=True)
    fit(model, list(trainings(tmp_path / "parts")), quiet=True)
    for name in "ab":
        assert curve(tmp_path / "parts" / name) == curve(tmp_path / "whole" / name)


def test_a_focused_stage_resumes_with_the_batches_of_an_uninterrupted_one(model, examples, start, tmp_path):
    """What an interrupted run learned of each example stands in its log."""

    def training(folder, at=None):
        folder.mkdir(exist_ok=True)
        stage = Distil(model, examples, batch_size=1, seed=3, focused=True)
        around = StopAt(stage, at, signal.SIGINT) if at is not None else stage
        return Training(SoftToken(start), [(around, 3 * len(examples))], SETTINGS, folder=folder, digest="a")

    fit(model, [training(tmp_path / "whole")], quiet=True)
    whole = Log(tmp_path / "whole" / "log.jsonl").rows()
    seen = [row["examples"][0][0] for row in whole]
    assert sorted(seen[: len(examples)]) == list(range(len(examples)))
    assert all(row["examples"][0][1] > 0 for row in whole)
    with pytest.raises(Stopped):
        fit(model, [training(tmp_path / "parts", at=2 * len(examples))], quiet=True)
    fit(model, [training(tmp_path / "parts")], quiet=True)
    rows = Log(tmp_path / "parts" / "log.jsonl").rows()
    assert [row["examples"] for row in rows] == [row["examples"] for row in whole]


def test_the_rate_warms_up_and_falls_to_a_tenth():
    settings = Optimisation(lr=1.0, warmup=4)
    rates = [settings.rate(step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert settings.rate(20, 20) == pytest.approx(0.1)


def test_curves_and_smoothing(tmp_path):
    draw_curves([{"kl": 1.0, "reconstruction": 3.0}, {"kl": 0.5}], tmp_path / "c.png", {"none": 1.2})
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_settings_are_checked_and_repeat(tmp_path):
    base = {"prompt_file": "p.txt", "model": "m", "id": "a", "output": "a.safetensors"}
    config = make_config({**base, "tokens": 2, "init": "text:a pirate"})
    config.save(tmp_path / "run.yaml")
    assert TrainConfig.load(tmp_path / "run.yaml") == config
    assert "prompt_file" not in config.recipe()
    for change, message in [
        ({"tokens": 17}, "tokens"),
        ({"lam": 0.9}, "need an"),
        ({"gold": True}, "gold answers"),
        ({"init": "text:"}, "init 'text:'"),
        ({"surprise": 1}, "surprise"),
    ]:
        with pytest.raises(InputError, match=message):
            make_config({**base, **change})
    paper = make_config({**base, **RECIPES["paper"], "ae": "ae.safetensors"})
    assert (paper.lam, paper.tau, paper.tokens, paper.init) == (0.9, 2.0, 1, "random")
    for content in ("- a", "{", None):
        path = tmp_path / "bad.yaml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError):
            TrainConfig.load(path)


@pytest.fixture
def corpus(tmp_path):
    lines = [
        json.dumps({"text": f"The tide of day {i} came in at dawn and left the harbour wall wet."}) for i in range(9)
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines))
    (tmp_path / "more.txt").write_text("Gulls sat on\nthe rail.\n\nThe fog came down upon the quay and stayed.\n")
    return [str(path), str(tmp_path / "more.txt")]


def test_a_corpus_is_streamed(model, corpus, tmp_path):
    assert list(stream_texts(corpus))[-2:] == [
        "Gulls sat on\nthe rail.\n",
        "The fog came down upon the quay and stayed.\n",
    ]
    data = TextBatches(model, corpus, length=8, batch_size=4, seed=0)
    held_out = data.head(3)
    seen = [piece for _, batch in zip(range(40), data, strict=False) for piece in batch]
    assert all(len(piece) == 8 for piece in seen)
    assert len({tuple(piece) for piece in seen}) > 8
    first = next(iter(stream_texts(corpus)))
    assert held_out[0] == model.tokenizer.encode(first, add_special_tokens=False)[:8]
    for faulty in ("not json", '{"other": 1}'):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(faulty)
        with pytest.raises(InputError, match="Cannot read the corpus"):
            list(stream_texts([str(bad)]))
    with pytest.raises(InputError, match="too few pieces"):
        TextBatches(model, corpus, length=500, batch_size=4, seed=0).head(3)


def test_the_autoencoder_trains_saves_and_is_checked(model, corpus, tmp_path):
    config = AEConfig(steps=6, length=8, batch_size=2, lr=0.05, held_out=4)
    result = train_ae(model, corpus, config, tmp_path / "run", quiet=True)
    assert result.after < result.before
    assert all(p.grad is None for p in model.causal_lm.parameters())
    again = train_ae(model, corpus, config, tmp_path / "run", quiet=True)  # finished: nothing is trained twice
    assert torch.equal(again.ae_1H, result.ae_1H)
    path = tmp_path / "ae.safetensors"
    save_ae(path, result.ae_1H, model, {"steps": 6})
    assert torch.equal(load_ae(path, model), result.ae_1H)

    other = FrozenModel(**{**vars(model), "fingerprint": model.fingerprint.model_copy(update={"config": "0" * 16})})
    with pytest.raises(WrongModel) as caught:
        load_ae(path, other)
    assert str(model.fingerprint) in caught.value.message
    assert str(other.fingerprint) in caught.value.message
    save_ae(path, torch.full((1, model.hidden_size), float("nan")), model, {})
    with pytest.raises(InputError, match="damaged"):
        load_ae(path, model)
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="no \\[AE\\] file"):
        load_ae(path, model)


def test_a_low_rank_token_begins_at_its_start_and_resumes_where_it_was(model, examples, start, tmp_path):
    """e = W z + b: the same curve with and without an interruption."""

    def run(token, stage, folder):
        folder.mkdir(exist_ok=True)
        fit(model, [Training(token, [(stage, 4)], SETTINGS, folder=folder, digest="d")], quiet=True)
        return token.vectors.detach()

    distil = Distil(model, examples, batch_size=2)
    assert torch.equal(LowRankToken(start, rank=3).vectors, start)
    whole = run(LowRankToken(start, rank=3), distil, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(LowRankToken(start, rank=3), StopAt(distil, 1, signal.SIGINT), tmp_path / "cut")
    again = run(LowRankToken(start, rank=3), distil, tmp_path / "cut")
    assert torch.equal(again, whole)
    assert not torch.equal(again, start)


def test_a_low_rank_token_trains_on_two_losses_in_separate_passes(model, examples, start, tmp_path, monkeypatch):
    """Parts of one token in two passes give the gradient that they give in one."""
    found = []
    for feeds in (lambda pieces: [pieces], lambda pieces: [[piece] for piece in pieces]):
        monkeypatch.setattr(
            "trainer.optim.loop._feeds",
            lambda parts, limit, feeds=feeds: feeds([piece for part in parts for piece in split(part, None)]),
        )
        ae = torch.ones(1, model.hidden_size)
        joint = Joint(Reconstruct(model, PROMPT, ae), Distil(model, examples, batch_size=2), 0.9)
        token = LowRankToken(start, rank=3)
        folder = tmp_path / str(len(found))
        folder.mkdir()
        fit(model, [Training(token, [(joint, 3)], SETTINGS, folder=folder, digest="d")], quiet=True)
        found.append(token.vectors.detach())
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.equal(found[0], start)


def test_a_token_file_is_a_start(model, tmp_path):
    token = identity_token(model, PROMPT, "captain")
    token.save(tmp_path / "t.safetensors")
    k = token.manifest.k
    assert torch.equal(file_start(model, k, str(tmp_path / "t.safetensors")).vectors_KH, torch.tensor(token.vectors))
    with pytest.raises(InputError, match=f"holds {k} vectors"):
        file_start(model, k + 1, str(tmp_path / "t.safetensors"))
    both = file_start(model, 2 * k, f"{tmp_path / 't.safetensors'},{tmp_path / 't.safetensors'}")
    assert torch.equal(both.vectors_KH, torch.tensor(token.vectors).repeat(2, 1))
    fingerprint = model.fingerprint.model_copy(update={"embedding": "0" * 16})
    base = token.manifest.base_model.model_copy(update={"fingerprint": fingerprint})
    other = replace(token, manifest=token.manifest.model_copy(update={"base_model": base}))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(WrongModel, match="differ in: embedding"):
        file_start(model, k, str(tmp_path / "other.safetensors"))
