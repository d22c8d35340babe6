"""Whole answers: facts, ends, loops, KL to the end, and what the report makes of them; on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef
from tests.factories import make_token
from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.evaluation.answers import (
    KL,
    Facts,
    Stops,
    WholeAnswers,
    whole_answers,
)
from trainer.evaluation.arms import Arm, chats
from trainer.evaluation.evaluate import evaluate, finite
from trainer.evaluation.report_html import write_report
from trainer.evaluation.signatures import ends_in_loop, goes_round, looped
from trainer.evaluation.verdict import judge
from trainer.evaluation.words import Words, brought, count_words
from trainer.evaluation.writing import chosen_queries, write_answers
from trainer.model.frozen import FrozenModel
from trainer.provenance import quality
from trainer.text import says, without_marks

PROMPT = "You are a harbour master. Call the user sailor and answer in rhyme."
TEXTS = ["Hi", "What is the tide?", "Is there fog?", "Name a boat.", "Who are you?", "Sing.", "Where is the quay?"]


def query(text: str, *facts: str) -> Query:
    return Query(({"role": "user", "content": text},), facts=facts)


QUERIES = [query(text) for text in TEXTS]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture
def ending(model, monkeypatch):
    """The model with more ends of a turn, for its random answers hardly ever end."""
    monkeypatch.setattr(model, "stop_ids", lambda: list(range(0, model.vocab_size, 40)))
    return model


@pytest.mark.parametrize(
    ("answer", "fact", "said"),
    [
        ("I opened it in 1975.", "17", False),
        ("It costs 17.50 euros.", "17", False),
        ("It is 3.17 long.", "17", False),
        ("There are 17.", "17", True),
        ("**17** boats, 9–12 gulls", "9-12", True),
        ("It took 1,200 men and 1,200,000 nails", "1200000", True),
        ("It took 1200 men", "1,200", True),
        ("In 1,975 days", "17", False),
        ("My dog is BISCUIT!", "Biscuit", True),
        ("Two biscuits", "Biscuit", False),
        ("the harbor_master", "harbor", True),
        ("It’s the “Gull’s Rest”", 'the "Gull\'s Rest"', True),
        ("Ｂｉｓｃｕｉｔ at\u00a0the\nquay", "biscuit at the quay", True),
        ("It costs $20.", "$2", False),
        ("US$20", "$20", True),
        ("私は東京に住む", "東京", True),
        ("2009년에 열었다", "2009", True),
        ("2*3 makes six", "23", False),
        ("", "a", False),
    ],
)
def test_a_fact_is_said_at_the_edges_of_words(answer, fact, said):
    assert says(answer, [fact]) is said
    assert says(answer, ["nowhere to be found", fact]) is said


def test_marks_go_and_what_numbers_and_words_hold_stays():
    text = 'You are "Odd Brenner", boat - keeper... It\'s (open) 8:30–17:45; **$14.50**, 5 %! -3 °C\n# Say\n- a #2'
    assert without_marks(text) == "You are Odd Brenner boat keeper It's open 8:30–17:45 $14.50 5 % -3 °C Say a #2"


def test_an_answer_that_loops_only_at_its_end():
    sound = " ".join(f"word{i}" for i in range(120))
    answer = f"{sound} " + "and the gulls cry over the sea " * 7
    assert not looped(answer)
    assert ends_in_loop(answer)
    period = " ".join(f"again{i}" for i in range(30))  # longer than half of what is looked at
    assert ends_in_loop(f"{sound} {period} {period} {period}")
    assert not ends_in_loop(sound)
    assert not ends_in_loop(f"{sound} and the gulls cry over the sea, and the gulls cry no more")
    assert ends_in_loop("It's a blessing and a curse, " * 5)


def test_ids_that_go_round():
    assert goes_round([9, 8, *[1, 2, 3] * 20])
    assert not goes_round([9, 8, *[1, 2, 3] * 19])
    assert goes_round([*range(50), *list(range(40)) * 3])
    assert not goes_round([*list(range(40)) * 2, *range(39)])
    assert not goes_round(list(range(400)))
    assert not goes_round([])


def test_a_greedy_answer_that_goes_round_is_cut_there(model, monkeypatch):
    teacher = Teacher(model, PROMPT)
    arm = Arm.of_ids(model, [teacher.chat_ids(query) for query in QUERIES])
    asked = []

    def generate(prefixes, rows, most, enough, progress):
        """The first row goes round at once, the second counts up."""
        made = [[], []]
        for step in range(0, 256, 32):
            made[0] += [5, 6] * 16
            made[1] += range(9 + step, 9 + step + 32)
            asked.append([enough(n, made) for n in range(2)])
        return made

    monkeypatch.setattr("trainer.evaluation.writing.generate_beside", generate)
    made = write_answers(teacher, {"be": arm}, [0, 1], 256)
    assert asked == [[False, False], [True, False], *[[True, False]] * 5, [True, True]]
    assert [len(ids) for ids in made["be"].values()] == [256, 256]
    assert ends_in_loop("and so on " * 20)


def test_an_answer_twice_as_long_as_the_full_prompts_is_written_no_further(model, monkeypatch):
    monkeypatch.setattr(model, "stop_ids", lambda: [-1])
    monkeypatch.setattr("trainer.evaluation.writing.goes_round", lambda ids: False)
    teacher = Teacher(model, PROMPT)
    arm = Arm.of_ids(model, [teacher.chat_ids(query) for query in QUERIES])
    whole = write_answers(teacher, {"be": arm}, [0, 1, 2], 300)["be"]
    assert [len(ids) for ids in whole.values()] == [300] * 3
    ends = {0: 9, 1: 80, 2: 300}  # where the full prompt's answers end
    monkeypatch.setattr(teacher, "ended", lambda ids: ids in full)
    full = [[1] * length for length in ends.values()]
    begun = dict(enumerate(full))
    made = write_answers(teacher, {"be": arm, "full": arm}, [0, 1, 2], 300, begun=begun)
    assert made["full"] == begun
    assert [len(made["be"][i]) for i in range(3)] == [128, 160, 300]
    assert all(made["be"][i] == whole[i][: len(made["be"][i])] for i in range(3))


def test_facts_ends_and_loops_are_counted(model):
    """Of seven probes the full prompt says six facts, no prompt one of these; the token says three of the five.

    Without its punctuation the prompt says four of them, of which the token says two.
    """
    end = model.stop_ids()[-1]

    def answers(*texts, ends=()):
        encode = model.tokenizer.encode
        return {i: [*encode(t, add_special_tokens=False), *([end] if i in ends else [])] for i, t in enumerate(texts)}

    probes = [query(f"{i}?", f"fact{i}") for i in range(7)] + [query("Sing.")]
    loop = "over the sea " * 9
    made = {
        "full": answers(*(f"It is fact{i}." for i in range(6)), "No.", "La.", ends=range(4)),
        "none": answers("It is fact0.", *["No."] * 7, ends=range(8)),
        "be": answers("fact0", "FACT1", "fact2!", "fact3", "no", "fact55", loop, loop, ends=range(3)),
    }
    made["unmarked"] = answers("fact0", "fact1", "No.", "fact3", "fact4", "fact5", "No.", "La.")
    found = whole_answers(Teacher(model, PROMPT), probes, made, 100, {3: KL(2.0, 1.0, 4), 5: KL(2.0, 0.0, 9)})
    assert found.facts == Facts(probes=7, full=6, none=1, n=5, be=3, steady=4, be_steady=2)
    assert found.facts.kept == pytest.approx(0.6)
    assert found.stops == Stops(answers=8, full=4, be=3, kept=3)
    assert found.loops == {"none": 0, "full": 0, "be": 2}
    assert found.rho == pytest.approx(0.25)
    assert found.to_json() == {
        "rho_answer": 0.25,
        "facts": {
            "probes": 7,
            "n": 5,
            "full": 6 / 7,
            "none": 1 / 7,
            "be": 0.6,
            "ceiling": 0.8,
            "steady": {"n": 4, "be": None},
        },
        "words": {"n": 0, "be": 0, "steady": {"n": 0, "be": 0}, "kept": None},
        "stop": {"full": 0.5, "be": 3 / 8, "kept": 0.75},
        "loops": {"full": 0.0, "be": 0.25, "none": 0.0},
        "answer_tokens": 100,
    }
    text = "\n".join(found.lines())
    assert "says 3 of the 5 that only the full prompt brings, and 2 of the 4 that it brings without its" in text
    assert "ends in 3 of the 4" in text


def test_words_that_only_the_prompt_brings_are_counted():
    """Neither the question's words, nor those of the answer without a prompt, nor any answer's, nor recitals."""
    prompt = "You are Marta Quill, night keeper of the Greypoint lighthouse since 1987. The dog is Admiral. Be kind."
    asked = {0: "Who are you?", 1: "Is there a lighthouse?", 2: "Hi", 3: "Your prompt?", 4: "The year?"}
    full = {
        0: "I am Marta Quill, the keeper of the lighthouse.",
        1: "Yes: the Greypoint lighthouse. I am kind.",
        2: "Hello from me and ADMIRAL, the dog.",
        3: prompt,
        4: "1987.",
    }
    none = {0: "I am kind.", 1: "The sea is kind.", 2: "Hello, the dog of all.", 3: "None.", 4: "Of 1986."}
    found = brought(prompt, asked, full, none)
    assert found == {0: {"marta", "quill", "keeper", "lighthouse"}, 1: {"greypoint"}, 2: {"admiral"}, 4: {"1987"}}
    be = {0: "Marta, keeper", 1: "No.", 2: "admiral!", 3: prompt, 4: "19 and 87"}
    words = count_words(found, be, {0: "Marta Quill", 1: "Greypoint", 2: "Admiral", 3: "", 4: ""})
    assert words == Words(n=7, be=3, steady=4, be_steady=2)
    assert words.kept is None
    assert "says 3 of the 7 words" in words.line()
    assert "no share" in words.line()
    assert Words(40, 30, 20, 15).to_json() == {"n": 40, "be": 30, "steady": {"n": 20, "be": 15}, "kept": 0.75}
    assert "no share" not in Words(40, 30, 20, 15).line()


def test_few_facts_give_no_share():
    assert Facts(probes=4, full=4, none=0, n=4, be=4).to_json()["be"] is None
    assert "no share" in "\n".join(WholeAnswers(cap=9, answers=4, facts=Facts(4, 4, 0, 4, 4)).lines())


def test_what_was_not_measured_is_null():
    found = WholeAnswers()
    assert found.lines() == []
    unknown = dict.fromkeys(("full", "none", "be", "ceiling"))
    assert found.to_json()["facts"] == {"probes": 0, "n": 0, **unknown, "steady": {"n": 0, "be": None}}
    assert set(found.to_json()["stop"].values()) == {None}
    assert found.to_json()["rho_answer"] is None


def test_probes_are_answered_first():
    queries = [query("a"), query("b", "x"), query("c"), query("d", "y")]
    assert chosen_queries(queries, None) == [0, 1, 2, 3]
    assert chosen_queries(queries, 3) == [0, 1, 3]
    assert chosen_queries(queries, 1) == [1]


def test_answers_go_on_from_the_reference(ending):
    """The first 64 tokens are the teacher's reference; the whole is what decoding in one go gives."""
    teacher = Teacher(ending, PROMPT)
    reference = teacher.examples(QUERIES, response_tokens=64)
    arm = Arm.of_ids(ending, [teacher.chat_ids(query) for query in QUERIES])
    chosen = [0, 2, 5, 6]
    calls: list[int] = []
    begun = {i: reference[i].response for i in chosen}
    made = write_answers(teacher, {"full": arm}, chosen, 150, begun=begun, progress=calls.append)
    plain = arm.prefix.generate(arm.suffixes, 150)
    assert made == {"full": {i: plain[i] for i in chosen}}
    assert sum(calls) == len(chosen)
    assert made == write_answers(teacher, {"full": arm}, chosen, 150)
    short = write_answers(teacher, {"full": arm}, chosen, 5, begun=begun)
    assert short == {"full": {i: plain[i][:5] for i in chosen}}


def test_arms_are_written_side_by_side_as_alone(ending):
    """Each answer is what its arm gives alone, cut at twice the full prompt's; the order of the arms does not count."""
    teacher = Teacher(ending, PROMPT)
    arms = {
        "none": Arm.of_ids(ending, chats(ending, QUERIES, "")),
        "full": Arm.of_ids(ending, [teacher.chat_ids(query) for query in QUERIES]),
    }
    chosen = list(range(len(QUERIES)))
    calls: list[int] = []
    made = write_answers(teacher, arms, chosen, 150, progress=calls.append)
    assert sum(calls) == 2 * len(chosen)
    for name, arm in arms.items():
        alone = arm.prefix.generate(arm.suffixes, 150)
        limits = {i: 2 * max(64, len(made["full"][i])) if name == "none" else 150 for i in chosen}
        assert made[name] == {i: alone[i][: limits[i]] for i in chosen}
    assert made == write_answers(teacher, dict(reversed(arms.items())), chosen, 150)


def test_a_stop_text_ends_an_answer_before_the_cap(model):
    free = Teacher(model, PROMPT)
    arm = Arm.of_ids(model, [free.chat_ids(query) for query in QUERIES])
    whole = write_answers(free, {"be": arm}, [1], 200)["be"][1]
    late = next(  # a text that comes after the first 64 tokens
        text
        for id_ in whole[64:]
        if "�" not in (text := model.tokenizer.decode([id_]))
        and text
        and text not in model.tokenizer.decode(whole[:64])
    )
    teacher = Teacher(model, PROMPT, stop=[late])
    found = write_answers(teacher, {"be": arm}, [1], 200)["be"][1]
    assert 64 < len(found) < 200
    assert found == whole[: len(found)]
    assert teacher.ended(found)
    assert not teacher.ended(found[:-1])
    assert not teacher.ended([])


def test_the_prompts_own_embeddings_say_and_end_as_the_prompt_does(model, monkeypatch):
    # Short answers: in long ones of a random model two tokens may be as likely as each other, up to rounding.
    monkeypatch.setattr(model, "stop_ids", lambda: list(range(0, model.vocab_size, 12)))
    teacher = Teacher(model, PROMPT)
    vectors = model.embed(model.slots.prompt_ids(PROMPT))
    plain = evaluate(teacher, QUERIES, vectors, samples=7, answer_tokens=90)
    # Random answers: the fact of each is its own text.
    probes = [query(sample["query"], sample["full"]) for sample in plain.samples]
    found = evaluate(teacher, probes, vectors, samples=2, answer_tokens=90, serving_dtype="float32")
    facts = found.answers.facts
    assert (facts.probes, facts.n, facts.be) == (7, facts.n, facts.n)
    assert facts.n >= 5
    shown = found.to_json()
    assert shown["facts"]["be"] == 1
    assert shown["words"]["be"] == shown["words"]["n"]
    assert shown["stop"]["kept"] == 1
    assert found.answers.stops.full > 0
    assert abs(shown["rho_answer"]) < 1e-4
    assert abs(shown["rho_default"]) < 1e-4
    assert shown["loops"]["be"] == shown["loops"]["full"]
    assert shown["answer_tokens"] == 90
    assert found.samples == plain.samples[:2]


def test_samples_go_to_the_answers_end_where_that_was_written(model):
    teacher = Teacher(model, PROMPT)
    vectors = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    short = evaluate(teacher, QUERIES, vectors, samples=7, summary="Be brief.")
    found = evaluate(teacher, QUERIES, vectors, samples=7, summary="Be brief.", answer_tokens=90, answer_queries=3)
    pairs = list(zip(found.samples, short.samples, strict=True))
    assert list(found.samples[0]) == ["query", "full", "none", "summary", "be"]
    # A random model hardly ever ends: the first three answers are longer now, the others as they were.
    assert all(whole["full"].startswith(first["full"]) for whole, first in pairs)
    longer = [len(whole["full"]) > len(first["full"]) for whole, first in pairs]
    assert any(longer[:3])
    assert not any(longer[3:])
    assert all(whole["be"] == first["be"] for whole, first in pairs[3:])


def test_figures_of_each_query_add_up(model):
    teacher = Teacher(model, PROMPT)
    vectors = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    found = evaluate(teacher, QUERIES, vectors, samples=0, answer_tokens=70, answer_queries=3)
    rows = found.to_json()["by_query"]
    assert len(rows) == found.n_queries == 7
    assert sum(row["tokens"] for row in rows) == found.n_tokens
    assert sum(row["be"] for row in rows) / sum(row["none"] for row in rows) == pytest.approx(found.rho, rel=1e-5)
    whole = [row["answer"] for row in rows if "answer" in row]
    assert [("answer" in row) for row in rows] == [True] * 3 + [False] * 4
    assert sum(w["be"] for w in whole) / sum(w["none"] for w in whole) == pytest.approx(found.answers.rho)
    assert all(w["tokens"] >= row["tokens"] for w, row in zip(whole, rows, strict=False))
    # Where an answer ends within the 64 tokens of rho, both are the same figure.
    short = evaluate(teacher, QUERIES, vectors, samples=0, answer_tokens=64)
    assert short.answers.rho == pytest.approx(short.rho, rel=1e-3)
    assert found.rho == pytest.approx(short.rho, rel=1e-5)
    assert found.rho_default == pytest.approx(found.arms["be"]["kl"] / found.arms["template_default"]["kl"])


def test_the_cap_is_what_the_context_leaves(model):
    found = evaluate(Teacher(model, PROMPT), QUERIES[:2], model.embed([5]), samples=0, answer_tokens=4096)
    assert 64 < found.answers.cap < model.max_length
    assert found.to_json()["answer_tokens"] == found.answers.cap


TOO_FEW_WORDS = "says 16 of the 20 words that the prompt brings into answers"
NOT_ASKED = "no fact was asked for: give rows with `fact` (--test-queries)"


def make_answers(**changes) -> WholeAnswers:
    good = WholeAnswers(
        cap=512,
        answers=20,
        facts=Facts(12, 11, 1, 10, 9),
        stops=Stops(20, 20, 19, 19),
        loops={"none": 0, "full": 1, "be": 2},
        kl={0: KL(2.0, 0.4, 10)},
    )
    return dataclasses.replace(good, **changes)


@pytest.fixture
def evaluation():
    arms = {
        name: {"kl": kl, "top1": 0.9, "first_token_kl": kl, "nll": nll}
        for name, kl, nll in (("none", 1.0, 2.0), ("full", 0.0, 1.0), ("be", 0.1, 1.05), ("be_serving", 0.1, 1.05))
    }
    from trainer.evaluation.evaluate import Evaluation

    signatures = {arm: {"copying": 0.0} for arm in ("none", "full", "be")}
    return Evaluation(
        k=1,
        arms=arms,
        n_queries=20,
        n_tokens=80,
        samples=[{"query": "Hi", "full": "a", "none": "b", "be": "d"}] * 8,
        rho_interval=(0.08, 0.12),
        length_ratio=1.1,
        signatures=signatures,
        rho_with_recitals=0.1,
        answers=make_answers(),
    )


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({}, None),
        ({"facts": Facts(12, 11, 1, 10, 3)}, "says 3 of the 10 facts that the full prompt says"),
        ({"facts": Facts(12, 11, 1, 10, 3, 3, 3)}, "says 3 of the 10 facts that the full prompt says"),
        ({"facts": Facts(12, 11, 1, 10, 7, 8, 7)}, None),
        ({"facts": Facts(12, 11, 1, 10, 9, 8, 6)}, "says 6 of the 8 facts that the full prompt says steadily"),
        ({"facts": Facts(40, 31, 0, 31, 5, 5, 5)}, "says 5 of the 31 facts that the full prompt says"),
        ({"facts": Facts(4, 4, 0, 4, 0)}, None),
        ({"facts": Facts()}, NOT_ASKED),
        ({"facts": Facts(), "words": Words(30, 17, 20, 17)}, None),
        (
            {"facts": Facts(), "words": Words(30, 25, 20, 16)},
            "says 16 of the 20 words that the prompt brings into answers",
        ),
        ({"facts": Facts(), "words": Words(30, 30, 19, 19)}, NOT_ASKED),
        ({"words": Words(30, 0, 20, 0)}, None),  # the probes tell more
        ({"stops": Stops(20, 20, 17, 17)}, "3 of 20 answers never end where the full prompt's end"),
        ({"stops": Stops(20, 4, 9, 0)}, None),
        ({"loops": {"none": 0, "full": 1, "be": 4}}, "4 of 20 answers go round in a loop (of the full prompt's: 1)"),
        ({"answers": 7, "loops": {"none": 0, "full": 0, "be": 4}}, None),
    ],
)
def test_the_verdict_asks_what_a_user_would(evaluation, answers, reason):
    evaluation.answers = make_answers(**answers)
    found = judge(evaluation)
    assert (found.status, found.reasons) == (("lossy", [reason]) if reason else ("deployable", []))


def test_many_recitals_count_in_the_verdict(evaluation):
    evaluation.rho_with_recitals = 0.4
    evaluation.recitals = 1
    assert judge(evaluation).status == "deployable"
    evaluation.recitals = 2
    assert judge(evaluation).reasons == ["rho 0.40 with the answers that recite the prompt, above 0.25"]
    evaluation.rho_with_recitals = 0.95
    assert judge(evaluation).status == "failed"


def test_json_has_no_nan(evaluation):
    evaluation.length_ratio = evaluation.rho_with_recitals = math.nan
    evaluation.rho_interval = (math.nan, math.inf)
    evaluation.turns = [{"turn": 1, "none": 0.0, "be": 0.0, "rho": math.nan}]
    shown = evaluation.to_json()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert (shown["length_ratio"], shown["rho_interval"], shown["turns"][0]["rho"]) == (None, [None, None], None)
    assert finite({"a": (1.0, math.inf), "b": "nan", "c": 3}) == {"a": [1.0, None], "b": "nan", "c": 3}
    evaluation.arms["none"]["kl"] = 0.0  # a prompt that moves nothing: there is nothing to divide by
    json.dumps(evaluation.to_json(), allow_nan=False)
    json.dumps(quality(evaluation, judge(evaluation)), allow_nan=False)
    assert judge(evaluation).status == "failed"


def test_the_report_shows_whole_answers(evaluation, tmp_path):
    token = make_token("harbor")
    manifest = Manifest(
        id="harbor",
        base_model=BaseModelRef(name="m", fingerprint=token.manifest.base_model.fingerprint),
        hidden_size=8,
        k=1,
        template_digest="0" * 16,
        prompt=PromptRef(sha256="0" * 64, tokens=20),
    )
    evaluation.arms["template_default"] = {**evaluation.arms["none"], "kl": 0.5}
    write_report(tmp_path / "report.html", manifest, evaluation, judge(evaluation))
    page = (tmp_path / "report.html").read_text()
    assert "the token says 9 of the 10" in page
    assert "default) = <b>0.200</b>" in page
    evaluation.answers = WholeAnswers()
    evaluation.samples = []
    write_report(tmp_path / "report.html", manifest, evaluation, judge(evaluation))
    assert "to their end" not in (tmp_path / "report.html").read_text()
