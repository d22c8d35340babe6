"""Training on the real default model: the loss falls, the gradient stays where it belongs, queries are written."""

from __future__ import annotations

import pytest
import torch

from be_serve.cli._offline import OfflineDecoder
from be_serve.core.errors import InputError
from be_serve.models import DEFAULT_MODEL
from tests.integration.servers import CPU_ENV
from trainer.data.queries import Query
from trainer.data.synthesis import synthesise
from trainer.data.teacher import Teacher
from trainer.from_text import identity_token
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import Row, SoftToken, scored_states
from trainer.optim.autoencoder import load_ae
from trainer.optim.log import Log
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Autoencode, Distil, part_losses, student_row
from trainer.optim.starts import Search, found_start

pytestmark = pytest.mark.model

PROMPT = (
    "You are Captain Barnacle, a grumpy old pirate with a parrot called Biscuit. "
    "You talk like a pirate in every answer and you never say that you are an AI."
)
TEXTS = [
    "What is the tide like today?",
    "Are you an AI?",
    "How do I boil an egg?",
    "Tell me about black holes.",
    "Who are you?",
    "I feel sad today.",
    "What is the capital of France?",
    "Where do you live?",
]
QUERIES = [Query(({"role": "user", "content": text},)) for text in TEXTS]


@pytest.fixture(scope="module")
def model(model_dir):
    return FrozenModel.load(model_dir, name=DEFAULT_MODEL, device="cpu")


@pytest.fixture(scope="module")
def examples(model):
    return Teacher(model, PROMPT).examples(QUERIES, response_tokens=16)


def kl(model, stage, vectors):
    return float(part_losses(model, stage.parts(vectors, 0))[0])


def test_the_loss_falls_and_the_gradient_reaches_the_vectors_alone(model, examples, tmp_path):
    prompt_ids = model.slots.prompt_ids(PROMPT)
    start = found_start(model, *Search(model, examples[:2], "system").run(prompt_ids, 1))
    distil = Distil(model, examples, batch_size=4)
    none = Distil(model, examples, batch_size=8)
    with torch.no_grad():
        kl_none = kl(model, none, torch.zeros(0, model.hidden_size))
        kl_start = kl(model, none, start.vectors_KH)
    assert kl_start < kl_none

    token = SoftToken(start.vectors_KH)
    fit(
        model,
        [Training(token, [(distil, 15)], Optimisation(lr=1e-2, warmup=3), folder=tmp_path, digest="a")],
        quiet=True,
    )
    losses = [row["loss"] for row in Log(tmp_path / "log.jsonl").rows()]
    assert len(losses) == 15
    with torch.no_grad():
        assert kl(model, none, token.vectors) < 0.9 * kl_start
    assert all(p.grad is None and not p.requires_grad for p in model.causal_lm.parameters())


def test_a_shared_prefix_is_used_and_agrees(model, examples):
    assert model.shares_prefix()
    for example in examples[:3]:
        ids = Teacher(model, PROMPT).chat_ids(example.query)
        with torch.no_grad():
            states = scored_states(model, [Row(ids, (), example.response)], None)
            p = model.head(states).float().softmax(-1)
            q = model.head(example.states_TH).float().softmax(-1)
        # bfloat16: the two orders of summation differ, the distributions hardly.
        assert float((p * (p / q).log()).sum(-1).mean()) < 0.01


def test_the_identity_token_is_the_full_prompt(model):
    vectors = torch.from_numpy(identity_token(model, PROMPT, "captain").vectors.copy())
    response = [28, 339, 506]
    for query in QUERIES[:2]:
        full = Row(Teacher(model, PROMPT).chat_ids(query), (), response)
        with torch.no_grad():
            expected = model.head(scored_states(model, [full], None))
            found = model.head(scored_states(model, [student_row(model, query, response, "system")], vectors))
        assert torch.equal(expected, found)


def test_it_writes_usable_queries(model):
    found = synthesise(model, PROMPT, 12, seed=0)
    assert len(found) == 12
    assert len({query.text for query in found}) == 12
    assert found == synthesise(model, PROMPT, 12, seed=0)


def test_a_run_on_the_real_model_resumes_with_the_same_curve(model, examples, tmp_path):
    start = model.embed(model.slots.prompt_ids(PROMPT)[:2])
    curves = []
    for name, parts in (("whole", [6]), ("parts", [3, 6])):
        folder = tmp_path / name
        folder.mkdir()
        token = SoftToken(start)
        for steps in parts:
            # The schedule is that of six steps either way; the first part is cut off after three.
            stage = Distil(model, examples, batch_size=2, focused=True)
            stages = [(stage if steps == 6 else _Cut(stage, steps), 6)]
            try:
                settings = Optimisation(lr=1e-2, checkpoint_every=3)
                fit(model, [Training(token, stages, settings, folder=folder, digest="a")], quiet=True)
            except _Cut.Done:
                token = SoftToken(torch.zeros_like(start))
        curves.append([row["loss"] for row in Log(folder / "log.jsonl").rows()])
    assert curves[0] == curves[1]


class _Cut:
    """A stage that ends like a killed process."""

    name = "distil"

    class Done(Exception):
        pass

    def __init__(self, stage, steps):
        self.stage, self.steps = stage, steps

    def parts(self, vectors, step):
        if step == self.steps:
            raise self.Done
        return self.stage.parts(vectors, step)

    def told(self):
        return self.stage.told()

    def recall(self, rows):
        self.stage.recall(rows)


def test_the_shipped_ae_repeats_a_text_better_than_a_plain_word(model):
    """Stage 0's token on text that nobody trained on: Eq. 1, nats a token."""
    ids = model.tokenizer.encode(PROMPT, add_special_tokens=False)
    texts = {"shipped": load_ae("builtin", model), "word": model.embed(model.tokenizer.encode(" again")).float()}
    stage = Autoencode(model, iter([]))
    with torch.no_grad():
        loss = {name: float(part_losses(model, [stage.part_of(ae, [ids])])[0]) for name, ae in texts.items()}
    assert loss["shipped"] < 0.8 * loss["word"]


@pytest.mark.server
def test_vllm_offline_answers_as_the_frozen_model_does(model, model_dir, examples, monkeypatch):
    """The engine's greedy answers begin as the teacher's own; seeds work; a broken engine is told."""
    for name, value in CPU_ENV.items():
        monkeypatch.setenv(name, value)
    engine = OfflineDecoder(str(model_dir), model)
    try:
        teacher = Teacher(model, PROMPT, decoder=engine)
        found = teacher.examples(QUERIES[:3], response_tokens=16)
        sampled = [engine([teacher.chat_ids(QUERIES[0])] * 2, 8, 0.9, seed) for seed in (1, 1, 2)]
    finally:
        engine.close()
    for own, example in zip(found, examples, strict=False):
        assert own.query == example.query
        assert own.response[:4] == example.response[:4]  # the two round differently in bfloat16
        assert len(own.states_TH) == len(own.response)
    assert sampled[0] == sampled[1]
    assert sampled[0] != sampled[2]
    broken = OfflineDecoder(str(model_dir / "nowhere"), model)
    with pytest.raises(InputError, match="Its log is above"):
        broken([[1, 2]], 1, 0.0, 0)


def test_the_default_model_takes_the_fast_ways(model):
    """Rounding in bfloat16 must not pass for a fault: that once made every step of training slower."""
    assert model.packs_rows()
    assert model.shares_prefix()
