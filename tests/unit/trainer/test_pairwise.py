"""The pairwise judge: a scripted server at the seam, real HTTP."""

from __future__ import annotations

import pytest

from be_serve.core.errors import InputError
from trainer.data.chat_server import Endpoint
from trainer.evaluation.pairwise import JUDGE_KEY, Tally, judge_pairs

SAMPLES = [
    {"query": "Hi", "full": "Ahoy, sailor!", "none": "Hello.", "be": "Ahoy!"},
    {"query": "Tide?", "full": "Ahoy! High.", "none": "High.", "be": "Low."},
]


@pytest.fixture
def judge(chat_server, monkeypatch):
    """Start a judge that answers by a function of (A, B); returns its URL, and what it was asked."""
    monkeypatch.setenv(JUDGE_KEY, "secret-key")

    def start(decide):
        def answer(body):
            text = body["messages"][1]["content"]
            return decide(*text.split("# Answer A\n")[1].split("\n\nWhich answer")[0].split("\n\n# Answer B\n"))

        url, asked = chat_server(answer)
        return Endpoint(url, "big-judge", role="judge", key_variable=JUDGE_KEY), asked

    return start


def ahoy(a, b):
    """Prefers the answer that says ahoy."""
    if ("Ahoy" in a) == ("Ahoy" in b):
        return "Both alike. [[C]]"
    return "A greets as told.\n[[A]]" if "Ahoy" in a else "B greets as told.\n[[B]]"


def test_a_judge_that_agrees_with_itself_is_counted(judge):
    server, asked = judge(ahoy)
    found = judge_pairs(server, "Greet with {Ahoy}.", SAMPLES)
    assert found == {"full": Tally(0, 1, 1, 0), "none": Tally(1, 1, 0, 0)}
    assert found["full"].score == 0.25
    assert found["none"].score == 0.75
    assert len(asked) == 8  # two rivals, two queries, both orders
    assert {request["key"] for request in asked} == {"Bearer secret-key"}
    assert all("Greet with {Ahoy}." in request["messages"][1]["content"] for request in asked)


def test_a_judge_that_prefers_a_place_finds_ties_only(judge):
    server, _ = judge(lambda a, b: "[[A]]")
    assert judge_pairs(server, "p", SAMPLES)["full"] == Tally(0, 2, 0, 0)


@pytest.mark.parametrize("answer", ["A is better.", "[[A]] or [[B]]", ""])
def test_an_unreadable_verdict_counts_for_nobody(judge, answer):
    server, _ = judge(lambda a, b: answer)
    found = judge_pairs(server, "p", SAMPLES)["none"]
    assert found == Tally(0, 0, 0, 2)
    assert found.score is None


def test_a_judge_that_refuses_is_named_without_its_key(judge):
    server, _ = judge(lambda a, b: 401)
    with pytest.raises(InputError, match=r"judge at http\S+ answered 401") as caught:
        judge_pairs(server, "p", SAMPLES)
    assert "secret-key" not in str(caught.value)


def test_a_judges_address_must_be_a_url_without_password():
    with pytest.raises(InputError, match="BE_JUDGE_KEY"):
        Endpoint("http://me:word@host", "m", role="judge", key_variable=JUDGE_KEY)
    nowhere = Endpoint("nowhere", "m", role="judge", key_variable=JUDGE_KEY)
    with pytest.raises(InputError, match="No answer from the judge"):
        judge_pairs(nowhere, "p", SAMPLES)
