"""Query files of every form, near-duplicates, the split."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from be_serve.core.errors import InputError
from trainer.data.queries import (
    Query,
    drop_near_duplicates,
    parse_query,
    read_queries,
    split_held_out,
    write_queries,
)

TURNS = [
    {"role": "user", "content": "What is the tide?"},
    {"role": "assistant", "content": "High water."},
    {"role": "user", "content": "And tomorrow?"},
]


def query(text: str) -> Query:
    return Query(({"role": "user", "content": text},))


@pytest.mark.parametrize(
    ("row", "expected", "answer"),
    [
        ({"query": " Hi "}, "Hi", None),
        ({"question": "2+2?", "answer": "4"}, "2+2?", "4"),
        ({"instruction": "Translate.", "input": "Guten Tag"}, "Translate.\n\nGuten Tag", None),
        ({"instruction": "Sing.", "input": ""}, "Sing.", None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "Hi", None),
        ({"question_id": 1, "turns": ["Hi", "Shorter, please."]}, "Hi", None),
    ],
)
def test_every_form_of_a_row(row, expected, answer):
    found = parse_query(row)
    assert [m["content"] for m in found.messages] == [expected]
    assert found.messages[0]["role"] == "user"
    assert found.answer == answer


def test_multi_turn_rows():
    assert [m["content"] for m in parse_query({"messages": TURNS}).messages] == [t["content"] for t in TURNS]
    system = [{"role": "system", "content": "Be nice."}]
    closing = [{"role": "assistant", "content": "Low water."}]
    found = parse_query({"messages": system + TURNS + closing})
    assert list(found.messages) == TURNS
    assert found.answer == "Low water."
    assert parse_query({"messages": TURNS + closing, "answer": "Ebb."}).answer == "Ebb."


@pytest.mark.parametrize(
    "row",
    [
        [],
        {},
        {"query": ""},
        {"query": 3},
        {"query": "Hi", "answer": 4},
        {"instruction": "Hi", "input": 3},
        {"turns": []},
        {"turns": [3]},
        {"messages": "Hi"},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [TURNS[0], TURNS[2]]},
        {"query": "Hi", "fact": ""},
        {"query": "Hi", "fact": 1975},
        {"query": "Hi", "also": ["1975"]},
        {"query": "Hi", "fact": "1975", "also": "in 1975"},
        {"query": "Hi", "fact": "1975", "also": [" "]},
    ],
)
def test_refused_rows(row):
    with pytest.raises(ValueError, match=r"\w"):
        parse_query(row)


def test_a_probe_keeps_its_facts_and_trains_without_them(tmp_path):
    row = {"query": "When did you open?", "answer": "Long ago.", "fact": "1975", "also": ["nineteen seventy-five"]}
    turns = {"messages": TURNS, "fact": "low water"}
    probes = [parse_query(row), parse_query(turns)]
    assert probes[0].facts == ("1975", "nineteen seventy-five")
    write_queries(tmp_path / "q.jsonl", probes)
    assert read_queries(tmp_path / "q.jsonl") == probes
    assert [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()] == [row, turns]
    assert probes[0].chat_json() == {"query": "When did you open?", "answer": "Long ago."}
    assert "1975" not in probes[0].text
    training, held_out = split_held_out([*probes, *(query(str(i)) for i in range(8))], 2)
    assert {q.facts for q in training + held_out} == {(), probes[0].facts, probes[1].facts}


def test_probes_survive_near_duplicates():
    texts = ["How many ships came to the old pier in 1990", "How many ships came to the old pier in 1991"]
    one, other = (parse_query({"query": text, "fact": fact}) for text, fact in zip(texts, ("17", "30"), strict=True))
    plain = query("how many ships came to the old pier in 1990?")
    assert drop_near_duplicates([plain, one, other]) == [one, other]
    assert drop_near_duplicates([one, parse_query({"query": plain.text, "fact": "17"})]) == [one]


def test_what_resembles_a_test_query_is_dropped():
    test = [query("What is the tide today?"), query("what is the tide today")]
    found = [parse_query({"query": "What is the tide today", "fact": "high"}), query("Sing."), query("sing")]
    assert drop_near_duplicates(found, beside=test) == [found[1]]


def test_files(tmp_path):
    queries = [query("Hi"), parse_query({"messages": TURNS, "answer": "x"})]
    path = tmp_path / "q.jsonl"
    write_queries(path, queries)
    assert read_queries(path) == queries
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_queries(packed) == queries


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no queries"), ('{"query": "a"}\n{', "line 2"), ('{"other": 1}', "line 1"), (None, "Cannot read")],
)
def test_faulty_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_queries(path)


def test_near_duplicates():
    texts = [
        "How do I boil an egg?",
        "how do i boil an EGG",
        "How do I boil an egg for a long hike?",
        "Name five animals that live in the deep cold sea",
        "Name five animals that live in the deep cold sea now",
        "???",
    ]
    kept = [q.text for q in drop_near_duplicates([query(t) for t in texts])]
    assert kept == [texts[0], texts[2], texts[3], texts[5]]


@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=7), max_size=12))
def test_near_duplicates_equal_the_comparison_of_all_pairs(bags):
    queries = [query(" ".join(bag)) for bag in bags]
    slow = []
    for one in queries:
        words = set(one.text.split())
        others = [set(other.text.split()) for other in slow]
        if all(len(words & o) < 0.8 * len(words | o) for o in others):
            slow.append(one)
    assert drop_near_duplicates(queries) == slow


@given(st.integers(2, 60), st.integers(1, 40))
def test_the_split_is_disjoint_whole_and_repeatable(count, held_out):
    queries = [query(str(i)) for i in range(count)]
    training, held = split_held_out(queries, held_out)
    assert not {q.text for q in training} & {q.text for q in held}
    assert sorted(q.text for q in training + held) == sorted(q.text for q in queries)
    assert 1 <= len(held) <= max(1, min(held_out, count // 5))
    assert (training, held) == split_held_out(queries, held_out)


def test_the_last_of_a_file_are_held_out():
    """Users' traffic comes in order of time: a token is measured on the newest."""
    queries = [query(str(i)) for i in range(50)]
    training, held = split_held_out(queries, 8, latest=True)
    assert sorted(int(q.text) for q in held) == list(range(42, 50))
    assert [q.text for q in training] != [str(i) for i in range(42)]  # shuffled: fewer of them are drawn at random
    assert sorted(training + held, key=lambda q: int(q.text)) == queries


@pytest.mark.parametrize("latest", [True, False])
def test_turns_of_one_conversation_stay_on_one_side(latest):
    rows = []
    for n in range(12):
        turns = ({"role": "user", "content": f"Chat {n}"}, {"role": "assistant", "content": "Yes?"})
        rows += [Query(turns[:1]), Query((*turns, {"role": "user", "content": f"And {n}?"}))]
    training, held = split_held_out(rows, 5, latest=latest)
    assert len(held) == 4  # a fifth; whole conversations
    first = [{q.messages[0]["content"] for q in side} for side in (training, held)]
    assert not first[0] & first[1]
    if latest:
        assert first[1] == {"Chat 10", "Chat 11"}


def test_rows_that_all_begin_alike_are_split_all_the_same():
    hello = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"})
    rows = [Query((*hello, {"role": "user", "content": f"What is {n}?"})) for n in range(20)]
    training, held = split_held_out(rows, 4, latest=True)
    assert held == rows[::-1][:4]
    assert len(training) == 16


def test_one_query_cannot_be_split():
    with pytest.raises(InputError, match="At least two"):
        split_held_out([query("a")], 1)


def test_rows_are_json_objects_again():
    assert json.loads(json.dumps(parse_query({"messages": TURNS}).to_json())) == {"messages": TURNS}


def test_an_answer_that_was_cut_off_stays_marked(tmp_path):
    queries = [
        Query(({"role": "user", "content": "Hi"},), "Ahoy", cut=True),
        Query(({"role": "user", "content": "No"},), "Aye"),
    ]
    write_queries(tmp_path / "q.jsonl", queries)
    assert read_queries(tmp_path / "q.jsonl") == queries
    with pytest.raises(ValueError, match="`cut`"):
        parse_query({"query": "Hi", "cut": "yes"})
