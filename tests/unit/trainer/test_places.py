"""Literal places: which words a token keeps, and that training leaves them as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from be_serve.cli.main import cli
from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from trainer.batch import Entry, entry_config
from trainer.config import TrainConfig, make_config
from trainer.data.queries import Query
from trainer.data.recall import with_recall
from trainer.data.teacher import Example, Teacher
from trainer.evaluation.arms import Arm
from trainer.evaluation.readable import nearest_words, readable
from trainer.model import row_packing
from trainer.model.frozen import FrozenModel
from trainer.model.soft_token import Row, soft_token
from trainer.optim.loop import Optimisation, Training, fit
from trainer.optim.objectives import Distil, piece_losses, split
from trainer.optim.places import (
    Phrase,
    Residue,
    fill,
    find_literal,
    phrases,
    queries_by_sentence,
    rank,
    rank_words,
    surprise,
    votes,
    words,
)
from trainer.optim.starts import Search
from trainer.text import sentences

PROMPT = (
    "You are Odd Brenner, head boat keeper. The landing is open from 8:30 to 17:45; a boat costs 14 pounds. "
    'Say: "Mind the rope" at the end.'
)
KEPT = ("--places", "12", "--tokens", "2", "--keep-text", "14 pounds")
TEXTS = ["Hi", "What is the tide?", "Is there fog?", "Name a boat.", "Who are you?", "Sing.", "Where is the quay?"]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def examples(model):
    queries = [Query(({"role": "user", "content": text},)) for text in TEXTS]
    return Teacher(model, PROMPT).examples(queries, response_tokens=6)


def test_phrases_end_at_marks_and_not_within_numbers(model):
    texts = [phrase.text for phrase in phrases(model, PROMPT)]
    assert texts == [
        "You are Odd Brenner,",
        "head boat keeper.",
        "The landing is open from 8:30 to 17:45;",
        "a boat costs 14 pounds.",
        "Say:",
        '"Mind the rope"',
        "at the end.",
    ]
    assert [PROMPT.index(text) for text in texts] == [phrase.begin for phrase in phrases(model, PROMPT)]


def test_a_long_phrase_is_cut_and_a_repeated_one_listed_once(model):
    found = phrases(model, " ".join(f"word{n}" for n in range(30)) + ". Again. Again.")
    assert [len(phrase.text.split()) for phrase in found] == [12, 12, 6, 1]


def test_divergence_counts_for_the_words_that_the_prompt_holds(model):
    response = model.tokenizer.encode("It costs 14 pounds, Sir.", add_special_tokens=False)
    example = Example(Query(({"role": "user", "content": "?"},)), response, torch.zeros(len(response), 4))
    kl_T = torch.arange(1.0, len(response) + 1)
    [found] = votes(model, PROMPT, [example], [kl_T])
    assert set(found) == {"costs", "1", "4", "pounds"} or set(found) == {"costs", "14", "pounds"}
    ends = [len(model.tokenizer.decode(response[: n + 1])) for n in range(len(response))]
    inside = [n for n, end in enumerate(ends) if end > 3 and ([0, *ends][n]) < 8]  # "costs" is at 3 to 8
    assert found["costs"] == pytest.approx(sum(float(kl_T[n]) for n in inside))


def test_a_word_counts_for_one_phrase():
    boat, fare, other = Phrase("a boat", (1, 2), 0), Phrase("boat fare", (3, 4), 10), Phrase("nothing", (5,), 20)
    assert rank([boat, fare, other], {"boat": 4.0, "fare": 1.0}) == [fare, boat] or rank(
        [boat, fare, other], {"boat": 4.0, "fare": 1.0}
    ) == [fare]
    assert rank([other], {"boat": 4.0}) == []


def test_the_best_phrases_that_fit_stand_in_the_prompts_order():
    a, b, c = Phrase("a", (1,), 30), Phrase("b", (2, 2), 10), Phrase("c", (3, 3, 3), 0)
    assert fill([a, b, c], 6) == (3, 3, 3, 2, 2, 1)
    assert fill([a, c, b], 3) == (2, 2, 1)  # c does not fit behind a, b does
    assert fill([c], 2) == ()


def test_words_that_are_said_without_the_prompt_do_not_count(model):
    response = model.tokenizer.encode("pounds and pounds", add_special_tokens=False)
    example = Example(Query(({"role": "user", "content": "?"},)), response, torch.zeros(len(response), 4))
    assert votes(model, PROMPT, [example], [torch.full((len(response),), 0.01)]) == [{}]


def test_the_examples_on_which_a_sentence_bears_are_counted():
    said = [{"odd": 2.0}, {"odd": 1.0, "pounds": 3.0}, {"pounds": 1.0, "8": 1.0}, {"the": 4.0}, {}]
    assert queries_by_sentence(PROMPT, said) == [
        ("You are Odd Brenner, head boat keeper.", 2),
        ("The landing is open from 8:30 to 17:45; a boat costs 14 pounds.", 2),
        ('Say: "Mind the rope" at the end.', 0),
    ]
    assert queries_by_sentence("Be kind and be brave. Be kind and be brave. Be kind now.", [{"now": 1.0}]) == [
        ("Be kind and be brave.", 0),
        ("Be kind now.", 1),
    ]


def test_only_learned_places_move(model):
    literal_LH = model.embed([5, 6, 7]).float()
    token = soft_token(model.embed([8]).float(), 4, 0, literal_LH)
    assert token.vectors.shape == (4, model.hidden_size)
    token.vectors.square().sum().backward()
    assert set(token.parameters) == {"vectors", "basis", "mix"}
    assert torch.equal(token.vectors[:3].detach(), literal_LH)


def test_words_are_found_and_measured(model, examples):
    residue = Residue(model, PROMPT, examples, model.embed([9, 10]).float(), "system")
    assert [len(kl_T) for kl_T in residue.kl] == [len(example.response) for example in examples]
    expected = Search(model, examples, "system")._score([[9, 10]], None or Search(model, examples, "system")._cases, 32)
    assert residue.divergence([()], range(len(examples)))[0] == pytest.approx(expected[0], rel=1e-4)
    for trained in (True, False):
        found = find_literal(residue, PROMPT, 12, trained=trained)
        assert len(found.ids) <= 12
        assert found.kl_with <= found.kl_without


def test_words_lose_the_marks_at_their_edges(model):
    found = words(model, PROMPT)
    assert [word.text for word in found[:5]] == ["You", "are", "Odd", "Brenner", "head"]
    assert [word.text for word in found[-4:]] == ["rope", "at", "the", "end"]
    assert "8:30" in [word.text for word in found]
    assert all(PROMPT[word.begin :].lstrip('"').startswith(word.text) for word in found)
    nats = surprise(model, found)
    assert len(nats) == len(found)
    ids = [token for word in found for token in word.ids]
    with torch.no_grad():
        logits = model.head(model.body(model.embed(ids)[None])[0]).log_softmax(-1)
    second, at = found[1].ids, len(found[0].ids)
    own = -sum(float(logits[at + n - 1, token]) for n, token in enumerate(second)) / len(second)
    assert nats[1] == pytest.approx(own, rel=1e-4)


def test_words_rank_by_votes_and_surprise_and_votes_count_once():
    boat, fare, again, the = (Phrase(text, (n,), n) for n, text in enumerate(("boat", "fare", "boat", "the")))
    ranked = rank_words([boat, fare, again, the], {"boat": 9.0, "fare": 4.0}, [1.0, 4.0, 2.0, 0.0])
    assert ranked == [fare, boat, again, the]  # 2.1 x 2, 3.1 x 1, .1 x 1.4, 0


def test_vectors_near_words_of_the_prompt_can_be_read(model):
    ids = model.slots.prompt_ids(PROMPT)
    near = model.embed(ids[:5]).float() * 3 + 1e-3
    other = model.embed(model.tokenizer.encode("?!", add_special_tokens=False)).float()  # no words
    assert nearest_words(model, near) == list(ids[:5])
    words = sum(any(c.isalnum() for c in model.tokenizer.decode([token])) for token in ids[:5])
    assert readable(model, near, ids) == words > 0
    assert readable(model, torch.cat([near, other]), ids) == words


@pytest.fixture
def train(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keeper.txt").write_text(PROMPT)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))

    def run(*args):
        fixed = ["--dtype", "float32", "--response-tokens", "6", "--steps", "3", "--scores-only"]
        command = ["train", "keeper.txt", "--model", str(tiny_model_dir), "--queries", "q.jsonl", *fixed, *args]
        return CliRunner().invoke(cli, command, catch_exceptions=False, standalone_mode=False)

    return run


@pytest.mark.parametrize("freeze", [True, False])
def test_a_trained_token_tells_its_literal_places(train, model, freeze):
    kept = (*KEPT, "--freeze-literal") if freeze else KEPT
    result = train(*kept, "-o", "a.safetensors", "--run-dir", "r")
    assert not result.exception
    token = Token.load("a.safetensors")
    ids = model.tokenizer.encode("14 pounds", add_special_tokens=False)
    assert (token.manifest.k, token.manifest.literal) == (len(ids) + 2, len(ids))
    assert np.array_equal(token.vectors[: len(ids)], model.embed(ids).float().numpy()) is freeze
    assert "14 pounds" not in token.manifest.model_dump_json()
    # Trained on or not, the words can be read; of the two learned vectors, those that began at words.
    assert nearest_words(model, torch.from_numpy(token.vectors.copy()))[: len(ids)] == ids
    assert len(ids) <= token.manifest.quality["readable"] <= token.manifest.k
    again = train(*kept, "-o", "b.safetensors", "--run-dir", "r")
    assert not again.exception
    assert np.array_equal(Token.load("b.safetensors").vectors, token.vectors)  # continued, at its end


def test_the_trainer_chooses_words_or_keeps_none(train):
    shown = train("--places", "20", "--tokens", "2", "-o", "a.safetensors", "--run-dir", "r")
    assert not shown.exception
    found = json.loads(Path("r/evaluation.json").read_text())["training_queries"]
    assert [row["text"] for row in found] == [text for text, _ in queries_by_sentence(PROMPT, [])]
    assert all(0 <= row["queries"] <= len(TEXTS) for row in found)
    assert "No training query bears on" in shown.output or all(row["queries"] for row in found)
    mixed = Token.load("a.safetensors").manifest
    assert mixed.k == mixed.literal + 2 <= 20
    assert not train("--places", "20", "--no-literal", "-o", "b.safetensors").exception
    learned = Token.load("b.safetensors").manifest
    assert (learned.k, learned.literal) == (20, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"places": 4, "tokens": 4}, "leave no literal place"),
        ({"keep_text": "a", "tokens": 4}, "words need literal places"),
        ({"places": 8, "literal": False, "keep_text": "a"}, "words need literal places"),
        ({"places": 65}, "places"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(InputError, match=message):
        make_config({"prompt_file": "p", "model": "m", "id": "a", "output": "o", **settings})


def test_too_long_a_text_to_keep_is_refused(train):
    with pytest.raises(InputError, match="literal places are free"):
        train("--places", "5", "--tokens", "4", "--keep-text", "much too long a text for one place")


def test_a_manifest_with_more_literal_places_than_vectors_is_refused(train):
    train("--tokens", "1", "-o", "a.safetensors")
    manifest = Token.load("a.safetensors").manifest.model_dump()
    with pytest.raises(ValidationError, match="larger than k"):
        type(Token.load("a.safetensors").manifest).model_validate({**manifest, "literal": 2})


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("least", [1, 1000])
def test_literal_places_are_computed_once_with_the_same_gradient(
    model, examples, monkeypatch, wide, checkpointed, least
):
    monkeypatch.setattr("trainer.model.soft_token._COMMON_LEAST", least)
    if wide:
        monkeypatch.setattr(row_packing, "_PLAIN_WIDTH", 4)
    literal_LH = model.embed([5, 6, 7]).float()
    learned_KH = model.embed([8, 9]).float()
    found = []
    for given in (None, literal_LH):
        vectors_KH = torch.cat([literal_LH, learned_KH]).requires_grad_()
        stage = Distil(model, examples, batch_size=3, literal_LH=given)
        part = stage.parts(vectors_KH, 0)[0]
        assert (part.context is None) == (given is None)
        (loss,) = piece_losses(model, split(part, None), checkpointed=checkpointed)
        loss.backward()
        found.append((loss.item(), vectors_KH.grad[3:]))
        if given is not None:
            assert not vectors_KH.grad[:3].any()
            assert all(len(row.before) == 0 for row in part.rows)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def test_trainings_with_different_literal_places_go_side_by_side_as_alone(model, examples, tmp_path):
    def training(name, ids):
        literal_LH = model.embed(ids).float() if ids else None
        token = soft_token(model.embed([8, 9]).float(), 4, 0, literal_LH)
        (tmp_path / name).mkdir()
        stage = Distil(model, examples, batch_size=2, literal_LH=literal_LH)
        return Training(token, [(stage, 3)], Optimisation(lr=1e-2), folder=tmp_path / name, digest=name)

    together = [training("a", [5, 6, 7]), training("b", [11]), training("c", [])]
    fit(model, together, quiet=True)
    for name, ids, found in zip("abc", ([5, 6, 7], [11], []), together, strict=True):
        alone = training(f"{name}-alone", ids)
        fit(model, [alone], quiet=True)
        assert torch.allclose(alone.token.vectors, found.token.vectors, atol=1e-4)


def test_words_are_the_default_and_what_excludes_them_leaves_them_out():
    def settings(prompt_tokens=300, **given):
        base = {"prompt_file": "p", "model": "m", "id": "a", "output": "o"}
        found = make_config({**base, **given}).resolved(prompt_tokens)
        return found.k, found.learned, found.places is not None and found.literal, found.rank, found.recall

    assert settings() == (64, 0, True, 0, 0.25)
    assert settings(100) == (50, 0, True, 0, 0.25)  # at most half of the prompt
    assert settings(100, places=64) == (64, 0, True, 0, 0.25)
    assert settings(40, places=64) == (40, 0, True, 0, 0.25)
    assert settings(8) == (4, 0, True, 0, 0.25)
    assert settings(places=64, tokens=4) == (64, 4, True, 0, 0.25)
    assert settings(places=64, init="text:a b") == (64, 4, True, 0, 0.25)
    assert settings(places=64, keep_text="a b") == (64, 4, True, 0, 0)
    assert settings(freeze_literal=True) == (64, 4, True, 64, 0)
    assert settings(tokens=4) == (4, 4, False, 64, 0)
    assert settings(literal=False) == (4, 4, False, 64, 0)
    assert settings(init="random") == (4, 4, False, 64, 0)
    assert settings(literal=False, places=32) == (32, 32, False, 64, 0)
    assert settings(places=32, tokens=8, freeze_literal=True) == (32, 8, True, 64, 0)
    assert settings(places=32, rank=8, recall=0.5) == (32, 0, True, 8, 0.5)
    with pytest.raises(InputError, match="too few for literal places"):
        settings(8, keep_text="a")
    with pytest.raises(InputError, match="fewer than --tokens 16"):
        settings(8, tokens=16)
    with pytest.raises(InputError, match="has 1 tokens"):
        settings(1)


def test_options_exclude_the_words_of_a_settings_file():
    base = {"prompt_file": "p", "model": "m", "id": "a", "output": "o"}
    default = make_config(base).model_dump()
    asked = make_config({**base, "places": 32}).model_dump()

    def k_of(loaded, **given):
        return make_config(TrainConfig.overridden(loaded, given)).resolved(300).k

    assert k_of(default) == k_of(default, seed=1) == 64
    assert k_of(default, tokens=4) == k_of(asked, tokens=4) == 4
    assert k_of(default, init="random") == k_of(default, literal=False) == 4
    assert k_of(default, tokens=4, places=20) == 20
    with pytest.raises(InputError, match="nothing begins at words"):
        k_of(asked, init="random")
    assert k_of(asked, init="random", literal=False) == 32
    assert k_of(make_config({**base, "tokens": 4}).model_dump(), places=64) == 64


def test_keys_are_no_words(model):
    found = words(
        model,
        "The key is sk-abcdefghijklmnop12 or ghjk38dj2kq91, the code 1234, the boat a cream-colored yawl-rigged one.",
    )
    texts = [word.text for word in found]
    assert "1234" in texts
    assert "yawl-rigged" in texts
    assert not any("sk-" in text or "38dj" in text for text in texts)


def test_a_rows_tokens_exclude_the_batchs_places(tmp_path):
    row = Entry("a", {"tokens": 4, "init": "random"}, "You are a clerk.")
    found = entry_config(row, {"model": "m", "places": 64}, tmp_path)
    assert found.places is None


def test_a_long_run_without_spaces_is_cut_in_parts(model):
    found = words(model, "Say " + "波止場の船長は毎朝八時半に門を開ける" * 3)
    assert found[0].text == "Say"
    assert len(found) > 4
    assert all(len(part.ids) <= 4 for part in found[1:])
    assert [part.begin for part in found] == sorted({part.begin for part in found})
    ids = [token for part in found[1:] for token in part.ids]
    assert model.tokenizer.decode(ids).strip() == "波止場の船長は毎朝八時半に門を開ける" * 3


def test_the_learning_rate_is_in_the_models_own_units(model):
    rows = model.embed(torch.arange(model.vocab_size)).float()
    assert model.embedding_rms == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-4)
    config = make_config({"prompt_file": "p", "model": "m", "id": "a", "output": "o"})
    assert config.peak_lr(0.02) == pytest.approx(0.003)
    assert config.model_copy(update={"lr": 0.5}).peak_lr(0.02) == 0.5


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 2), (0.8, 28)])
def test_sentences_of_the_prompt_are_a_share_of_the_examples(model, examples, share, count):
    teacher = Teacher(model, PROMPT)
    found = with_recall(teacher, examples, share, response_tokens=64)
    assert found[: len(examples)] == examples
    own = found[len(examples) :]
    assert len(own) == count
    said = {model.tokenizer.decode(example.response[:-1]) for example in own}
    assert said <= set(sentences(PROMPT))
    assert len(said) == min(count, len(sentences(PROMPT)))
    assert len({example.query.text for example in own}) == min(count, 6)
    for example in own[:1]:  # what the full prompt's model makes of the sentence
        arm = Arm.of_ids(model, [teacher.chat_ids(example.query)])
        [states_TH] = arm.prefix.states([Row((), arm.suffixes[0], example.response)])
        assert torch.allclose(example.states_TH, states_TH, atol=1e-4)
