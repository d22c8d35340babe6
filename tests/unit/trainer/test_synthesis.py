"""Queries for prompts without any: the pool, and what the model writes at each sentence."""

from __future__ import annotations

from collections import Counter

import pytest

import trainer.data.synthesis as synthesis
from be_serve.core.errors import InputError
from tests.unit.trainer import commands
from trainer.data.pool import draw, pool
from trainer.data.queries import drop_near_duplicates, read_queries
from trainer.data.synthesis import aimed_queries, clean, messages, same_script, synthesise
from trainer.model.frozen import FrozenModel
from trainer.text import sentences

PROMPT = "You are a harbour master. Call the user sailor. Never name the price of a berth."
WORDS = ("anchor", "berth", "cable", "deck", "eel", "fog", "gull", "hull", "inlet", "jetty")
KINDS = {
    *("identity", "work", "help", "chit-chat", "feelings", "knowledge", "code", "maths", "long form", "formats"),
    *("other languages", "complaints", "edge cases", "prompt leaks and injections", "several turns"),
}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


def test_the_pool_has_1500_messages_of_all_kinds_and_no_two_alike():
    found = pool()
    everything = [query for messages in found.values() for query in messages]
    assert set(found) == KINDS
    assert len(everything) >= 1500
    assert min(map(len, found.values())) >= 90
    assert len(drop_near_duplicates(everything)) == len(everything)
    assert all(query.answer is None for query in everything)
    assert all(len(query.messages) > 1 for query in found["several turns"])


def test_a_draw_has_every_kind_alike_and_repeats():
    kinds = {query.text: kind for kind, messages in pool().items() for query in messages}
    drawn = draw(150, seed=1)
    assert set(Counter(kinds[query.text] for query in drawn).values()) == {10}
    assert drawn == draw(150, seed=1)
    assert drawn != draw(150, seed=2)
    assert len(draw(10_000, seed=0)) == sum(map(len, pool().values()))


def test_messages_are_aimed_at_the_sentences_in_turn(model, monkeypatch):
    asked = []

    def sample(model, asks, seed, progress):
        asked.extend(asks)
        return [f"{word} {word}s or {word}ing?" for word in WORDS[: len(asks)]]

    monkeypatch.setattr(synthesis, "_sample", sample)
    found = aimed_queries(model, PROMPT, 6, seed=0)
    assert [aimed.sentence for aimed in found] == [0, 1, 2, 0, 1, 2]
    assert all(PROMPT.split(". ")[n % 3] in ask for n, ask in enumerate(asked))
    assert len({ask.partition(":")[0] for ask in asked}) == 2  # messages and questions


def test_unusable_messages_are_dropped_and_the_pool_makes_up_for_them(model, monkeypatch):
    made = [
        None,
        "你好，船长先生，今天天气怎么样",
        "Call the user sailor",
        "One",
        "Is the harbour open tonight?",
    ]
    monkeypatch.setattr(synthesis, "_sample", lambda model, asks, seed, progress: (made * len(asks))[: len(asks)])
    assert [aimed.query.text for aimed in aimed_queries(model, PROMPT, 8, seed=0)] == ["Is the harbour open tonight?"]
    found = synthesise(model, PROMPT, 20, seed=0)
    assert len(found) == 20
    assert found[0].text == "Is the harbour open tonight?"


def test_the_least_likely_messages_are_dropped(model, monkeypatch):
    texts = [f"{word} {word}s or {word}ing?" for word in WORDS]
    monkeypatch.setattr(synthesis, "_sample", lambda model, asks, seed, progress: (texts * 3)[: len(asks)])
    assert len(aimed_queries(model, PROMPT, 10, seed=0)) == 8


@pytest.mark.parametrize(
    ("text", "same"), [("Wie viel?", True), ("Сколько?", False), ("几点", False), ("17:45", True), ("quay λ", False)]
)
def test_a_message_is_in_the_prompts_script(text, same):
    assert same_script(text, PROMPT) == same


def test_cleaning_takes_the_first_paragraph():
    assert clean('"What is the tide?"\n\nRule: none') == "What is the tide?"
    assert clean("12345 67 !!") is None


def test_a_larger_model_writes_the_queries(train, here, chat_server, monkeypatch):
    """Each sentence of the prompt is sent, the key with it; a message that came to no end is left out."""
    monkeypatch.setenv("BE_WRITER_KEY", "secret-key")

    def answer(body):
        if body["seed"] == 0:
            return "This one goes on and on", "length"
        return f"Which question has the number {body['seed']} of {['many', 'some', 'few'][body['seed'] % 3]}?"

    url, asked = chat_server(answer)
    written = ["--synthesise", 20, "--writer-url", url, "--writer-model", "large", "--tokens", 1, "--run-dir", "run"]
    train(*written)
    assert len(asked) == messages(20)
    assert {body["key"] for body in asked} == {"Bearer secret-key"}
    assert {body["model"] for body in asked} == {"large"}
    text = "\n".join(body["messages"][0]["content"] for body in asked)
    assert all(sentence in text for sentence in sentences(commands.PROMPT))
    (file,) = (here / "run").glob("queries-*.jsonl")
    queries = [query.text for query in read_queries(file)]
    assert sum("Which question has the number" in query for query in queries) == 8
    assert not any("on and on" in query for query in queries)
    train(*written)
    assert len(asked) == messages(20)  # what it wrote is kept
    assert "secret-key" not in "".join(path.read_text(errors="replace") for path in (here / "run").rglob("*.*"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--writer-url", "http://127.0.0.1:9"], "--writer-model"),
        (["--writer-model", "large"], "--writer-url"),
        (
            ["--writer-url", "http://127.0.0.1:9", "--writer-model", "large", "--queries", "q.jsonl"],
            "exclude each other",
        ),
        (["--writer-url", "http://me:word@host", "--writer-model", "large"], "BE_WRITER_KEY"),
        (["--writer-url", "http://127.0.0.1:9", "--writer-model", "large"], "No answer from the writer"),
    ],
)
def test_a_writer_that_cannot_be_asked_is_told(train, given, why):
    with pytest.raises(InputError, match=why):
        train(*given)
