"""Queries for prompts without any: the pool, and what the model writes at each sentence."""

from __future__ import annotations

import re
from collections import Counter

import pytest

import trainer.data.aimed as aimed
from be_serve.core.errors import InputError
from tests.unit.trainer import commands
from trainer.data.aimed import aimed_queries, asked, asks, clean, same_script, whole_lines
from trainer.data.pool import draw, pool
from trainer.data.queries import drop_near_duplicates, read_queries
from trainer.data.synthesis import chats, synthesise
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
    answered = []

    def sample(model, chats, seed, progress):
        answered.extend(chats)
        return [f"{word} {word}s or {word}ing?" for word in WORDS[: len(chats)]]

    monkeypatch.setattr(aimed, "_sample", sample)
    found = aimed_queries(model, PROMPT, 6, seed=0)
    assert [made.sentence for made in found] == [0, 1, 2, 0, 1, 0]
    assert len(answered) == asked(6)
    # Behind others' messages at other sentences, a list for each sentence, then a word of each.
    last = [chat[-1]["content"] for chat in answered]
    assert all(PROMPT.split(". ")[n % 3] in ask for n, ask in enumerate(last[:2]))
    assert all("one a line" in ask for ask in last[:2])
    assert [re.findall('with "(.*?)"', ask)[0] for ask in last[2:]] == ["master", "sailor", "berth", "harbour", "user"]
    assert all(chat[-2]["role"] == "assistant" and "?" in chat[-2]["content"] for chat in answered)


def test_a_list_is_read_line_by_line_and_unusable_messages_are_dropped(model, monkeypatch):
    made = [
        "",
        "你好，船长先生，今天天气怎么样\nCall the user sailor\nOne\n1. Is the harbour open tonight?",
        '- "where do i moor"',
    ]
    monkeypatch.setattr(aimed, "_sample", lambda model, chats, seed, progress: (made * len(chats))[: len(chats)])
    usable = {"Is the harbour open tonight?", "where do i moor"}
    assert {found.query.text for found in aimed_queries(model, PROMPT, 8, seed=0)} == usable
    found = synthesise(model, PROMPT, 20, seed=0)
    assert len(found) == 20  # the pool makes up for them
    assert {query.text for query in found[:2]} == usable


def test_a_word_gives_one_message_and_a_list_eight(model, monkeypatch):
    lines = ["Here are six messages:", *(f"{word} {word}s or {word}ing, {n}?" for n, word in enumerate(WORDS))]
    answer = "\n".join(lines * 500)
    monkeypatch.setattr(aimed, "_likely", lambda model, found: list(found))
    (listed, *_), words = [[ask for ask in asks(PROMPT, 6) if ask.most == most] for most in (8, 1)]
    assert len(words) == 5
    for ask, least in ((listed, WORDS[7]), (words[0], WORDS[0])):
        monkeypatch.setattr(aimed, "asks", lambda prompt, count, ask=ask: [ask])
        monkeypatch.setattr(aimed, "_sample", lambda model, chats, seed, progress: [answer])
        found = [made.query.text for made in aimed_queries(model, PROMPT, 20, seed=0)]
        assert len(found) == ask.most
        assert found[-1].startswith(least)


def test_a_prompt_without_words_is_asked_for_lists():
    assert [ask.most for ask in asks("😀 a b", 10)] == [8] * asked(10)


def test_words_of_any_sentence_are_asked_for_last():
    """A contraction is as common as its parts, and the same word is asked for once."""
    words = [word for _, word in aimed._words_in_turn(["You're the trombonist's big-band hero, the Hero that's late"])]
    assert words[0] == "trombonist's"
    assert "You're" not in words
    assert [word.lower() for word in words].count("hero") == 1


def test_few_usable_messages_are_told(here, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(aimed, "_sample", lambda model, chats, seed, progress: [""] * len(chats))
    fast = ["--dtype", "float32", "--response-tokens", 4, "--steps", 3, "--batch-size", 2, "--answer-tokens", 8]
    result = commands.invoked(
        "train", "captain.txt", "--model", tiny_model_dir, *fast, "--synthesise", 12, "--tokens", 1
    )
    assert "Only 0 of 9 messages that the model wrote" in result.output


def test_the_least_likely_messages_are_dropped(model, monkeypatch):
    texts = [f"{word} {word}s or {word}ing?" for word in WORDS]
    monkeypatch.setattr(aimed, "_sample", lambda model, chats, seed, progress: (texts * 3)[: len(chats)])
    assert len(aimed_queries(model, PROMPT, 10, seed=0)) == 8


@pytest.mark.parametrize(
    ("text", "same"), [("Wie viel?", True), ("Сколько?", False), ("几点", False), ("17:45", True), ("quay λ", False)]
)
def test_a_message_is_in_the_prompts_script(text, same):
    assert same_script(text, PROMPT) == same


def test_a_message_is_read_without_its_bullet():
    assert clean('2) "What is the tide?"') == "What is the tide?"
    assert clean("12345 67 !!") is None
    assert clean("Hi") is None
    assert clean("Sure, here are six messages:") is None
    assert clean("What is \ud800 this?") is None
    assert clean(" ".join(["word"] * 61)) is None


def test_a_line_that_was_cut_off_is_left_out():
    assert whole_lines("Who are you?\nWhere is the", cut=True) == "Who are you?"
    assert whole_lines("Where is the", cut=True) == ""
    assert whole_lines("Who are you?\nWhere is it?", cut=False) == "Who are you?\nWhere is it?"


def test_a_larger_model_writes_the_queries(train, here, chat_server, monkeypatch):
    """Each sentence of the prompt is sent, the key with it; a message that came to no end is left out."""
    monkeypatch.setenv("BE_WRITER_KEY", "secret-key")

    def answer(body):
        if body["seed"] == 0:
            return "This one goes on and on", "length"
        return f"Which question has the number {body['seed']} of {['many', 'some', 'few'][body['seed'] % 3]}?"

    url, requests = chat_server(answer)
    written = ["--synthesise", 20, "--writer-url", url, "--writer-model", "large", "--tokens", 1, "--run-dir", "run"]
    train(*written)
    assert len(requests) == chats(20)
    assert {body["key"] for body in requests} == {"Bearer secret-key"}
    assert {body["model"] for body in requests} == {"large"}
    text = "\n".join(body["messages"][-1]["content"] for body in requests)
    assert all(sentence in text for sentence in sentences(commands.PROMPT))
    (file,) = (here / "run").glob("queries-*.jsonl")
    queries = [query.text for query in read_queries(file)]
    assert sum("Which question has the number" in query for query in queries) == 14
    assert not any("on and on" in query for query in queries)
    train(*written)
    assert len(requests) == chats(20)  # what it wrote is kept
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
